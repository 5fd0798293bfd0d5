"""AGPNet: reconstruct normal features from copies that are disturbed where attention says that they matter."""
