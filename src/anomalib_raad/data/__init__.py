"""Data: solar cells from PyPI, the split of the training images, images for the penalty."""
