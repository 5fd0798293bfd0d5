"""What the fit of any model of this package shares."""
