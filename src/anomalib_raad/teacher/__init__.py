"""The teacher: where it comes from and how one is distilled."""
