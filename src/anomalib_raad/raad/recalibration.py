"""Recalibrated attention: anomaly maps relative to what normal images show at the same place.

    M'(p) = M(p) / b(p),    b = 1 + r (c / mean_p c - 1),    c(p) = m(p) + 2 s(p)

``m`` and ``s`` are mean and standard deviation of the map at place p over normal training images, smoothed over
neighbouring cells. ``r`` is the reliability of c: how far two halves of the images agree on it. Where places do not
differ, or images are too few to tell, r is 0 and nothing changes.
"""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

_CELLS = 32  # a side of the stored bias, that of the maps of 128x128 pixels
_DEVIATIONS = 2.0
_LEAST = 0.05  # of the mean bias; quieter places would turn rounding errors into anomalies


class Recalibration(nn.Module):
    """The bias of a model's maps by place, as a buffer, and the division by it.

    Args:
        maps: Number of maps.
    """

    bias: torch.Tensor

    def __init__(self, maps: int = 2) -> None:
        super().__init__()
        self.register_buffer("bias", torch.ones(1, maps, _CELLS, _CELLS))

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        """Divide maps of shape ``(N, M, h, w)`` by their bias, and smooth them."""
        return smooth(maps / F.interpolate(self.bias, size=maps.shape[-2:], mode="bilinear", align_corners=False))

    @torch.no_grad()
    def reset_(self) -> None:
        """Forget the bias."""
        self.bias.fill_(1.0)

    @torch.no_grad()
    def fit_(self, maps: Sequence[torch.Tensor]) -> None:
        """Set the bias from the maps of normal images, each ``(1, M, h, w)`` and not negative."""
        values = torch.cat([F.interpolate(each.float(), size=(_CELLS, _CELLS), mode="area") for each in maps])
        self.bias.copy_((1 + _reliability(values) * (_relative(values) - 1)).clamp(min=_LEAST))


def _reliability(values: torch.Tensor) -> torch.Tensor:
    """How well the bias of maps ``(N, M, h, w)`` is known, from 0 to 1, shape ``(M, 1, 1)``."""
    if len(values) < 2:
        return values.new_zeros(values.shape[1], 1, 1)
    first, second = (_relative(half).flatten(1) - 1 for half in (values[::2], values[1::2]))
    agreement = F.cosine_similarity(first, second).clamp(min=0)
    return (2 * agreement / (1 + agreement)).view(-1, 1, 1)  # of the whole, from its halves: Spearman-Brown


def _relative(values: torch.Tensor) -> torch.Tensor:
    """``c / mean_p c`` of maps ``(N, M, h, w)``, shape ``(M, h, w)``; 1 everywhere where maps are zero."""
    mean, variance = (smooth(smooth(x[None]))[0] for x in (values.mean(0), values.var(0, correction=0)))
    level = mean + _DEVIATIONS * variance.sqrt()
    average = level.mean((-2, -1), keepdim=True)
    return torch.where(average > 0, level / average, torch.ones_like(level))


def smooth(maps: torch.Tensor) -> torch.Tensor:
    """Average each cell of maps ``(N, M, h, w)`` with its neighbours, weighted 1, 2, 1 along either side."""
    maps = F.pad(maps, (1, 1, 1, 1), mode="replicate")
    for _ in range(2):  # sums of slices, since a pooling or a convolution of these few values would leave integers
        maps = (maps[..., 1:, :] + maps[..., :-1, :]) / 2
        maps = (maps[..., 1:] + maps[..., :-1]) / 2
    return maps
