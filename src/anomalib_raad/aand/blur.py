"""A Gaussian blur as two passes."""

from anomalib.models.components import GaussianBlur2d
from torch import nn


def gaussian_blur(sigma: float) -> nn.Sequential:
    """Blur of one channel along either side, as wide as scipy's; for maps wider than ``4 sigma``; 0 leaves them."""
    length = 2 * int(4 * sigma + 0.5) + 1
    kernels = [(length, 1), (1, length)] if sigma else []
    return nn.Sequential(*(GaussianBlur2d(sigma, kernel_size=size) for size in kernels))
