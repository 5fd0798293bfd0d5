"""A Gaussian blur as two passes."""

import torch
from anomalib.models.components import GaussianBlur2d
from torch import nn


class Blur(nn.Module):
    """Blur of one channel along either side, as wide as scipy's, in float32 whatever else computes in bfloat16.

    Args:
        sigma: In pixels; for maps wider than ``4 sigma``. 0 leaves them as they are.
    """

    def __init__(self, sigma: float) -> None:
        super().__init__()
        self.sigma = sigma
        self.reach = int(4 * sigma + 0.5)
        length = 2 * self.reach + 1
        kernels = [(length, 1), (1, length)] if sigma else []
        self.passes = nn.Sequential(*(GaussianBlur2d(sigma, kernel_size=size) for size in kernels))

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        """Blur maps ``(N, 1, H, W)``."""
        if torch.is_autocast_enabled(maps.device.type):  # never while a model is exported, which knows no autocast
            with torch.autocast(maps.device.type, enabled=False):
                return self.passes(maps.float())
        return self.passes(maps)
