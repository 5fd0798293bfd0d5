"""Noise where attention says that it matters (Eq. 2 and 4)."""

import torch
from torch.nn import functional as F  # noqa: N812

_EPSILON = 1e-12


def normalized(attention: torch.Tensor) -> torch.Tensor:
    """Phi: maps ``(N, 1, h, w)`` from the least to the largest of each image, as 0 to 1; 0 where they are constant."""
    low, high = attention.amin((-2, -1), keepdim=True), attention.amax((-2, -1), keepdim=True)
    return (attention - low) / (high - low + _EPSILON)


def most_attended(attention: torch.Tensor, size: tuple[int, int], share: float) -> torch.Tensor:
    """B: 1 at the share of an image's pixels where its attention ``(N, 1, h, w)`` is highest, ``(N, 1, *size)``."""
    pixels = F.interpolate(attention, size=size, mode="bilinear").flatten(2)
    number = round(share * pixels.shape[-1])
    chosen = torch.zeros_like(pixels).scatter_(-1, pixels.topk(number, dim=-1).indices, 1)
    return chosen.unflatten(-1, size)


def disturbed(features: torch.Tensor, strength: torch.Tensor) -> torch.Tensor:
    """F' (Eq. 4): features ``(N, C, h, w)`` and Gaussian noise of a strength ``(N, 1, h, w)``.

    A strength of 1 is the root mean square of an image's features.
    """
    power = features.square().mean((1, 2, 3), keepdim=True).sqrt()
    return features + torch.randn_like(features) * power * strength
