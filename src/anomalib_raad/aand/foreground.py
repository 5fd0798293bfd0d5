"""Where normal images show the part, found without anybody's help: synthetic anomalies belong there."""

from collections.abc import Iterable

import numpy as np
import torch
from skimage.filters import threshold_otsu
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torchvision.transforms.v2.functional import resize, rgb_to_grayscale

from .blur import Blur

_SIDE, _SIGMA = 256, 8.0  # pixels
_APART = 0.8  # share of the variance between the two classes; an even spread of grey levels has 0.75
_AGREEING = 0.9  # share of the border that must be of one class to be background
_BORDER = 0.05  # of a side


class Foreground(nn.Module):
    """Otsu's threshold on blurred grey images; the class that the images' border has is background.

    Everything is foreground where the border has both classes, or where the grey levels do not fall into two.

    Attributes:
        threshold: Grey level between the classes; NaN as long as everything is foreground.
        sign: 1 where the foreground is the brighter class, -1 where it is the darker one.
    """

    threshold: torch.Tensor
    sign: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.blur = Blur(_SIGMA)
        self.register_buffer("threshold", torch.tensor(torch.nan))
        self.register_buffer("sign", torch.ones(()))

    def find_(self, images: Iterable[torch.Tensor]) -> float:
        """Find threshold and sign on normal images ``(1, 3, H, W)``.

        Returns:
            The share of the pixels that is foreground.
        """
        grey = [self._blurred(image) for image in images]
        values = np.concatenate([image.flatten().cpu().numpy() for image in grey])
        self.threshold.fill_(torch.nan)
        threshold = float(threshold_otsu(values))
        bright = values > threshold
        if bright.all() or not bright.any():
            return 1.0
        between = bright.mean() * (1 - bright.mean()) * (values[bright].mean() - values[~bright].mean()) ** 2
        border = float(torch.cat([_border(image) > threshold for image in grey]).float().mean())
        if between / values.var() < _APART or 1 - _AGREEING < border < _AGREEING:
            return 1.0
        self.threshold.fill_(threshold)
        self.sign.fill_(1.0 if border <= 1 - _AGREEING else -1.0)
        return float(bright.mean() if self.sign > 0 else (~bright).mean())

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """1 where images ``(N, 3, H, W)`` show the part, ``(N, 1, H, W)``."""
        if self.threshold.isnan():
            return torch.ones_like(images[:, :1])
        mask = ((self._blurred(images) - self.threshold) * self.sign > 0).to(images.dtype)
        return F.interpolate(mask, size=images.shape[-2:])

    def _blurred(self, images: torch.Tensor) -> torch.Tensor:
        """Grey images ``(N, 1, 256, 256)``, so that the blur has the same share of any image."""
        return self.blur(resize(rgb_to_grayscale(images.float()), [_SIDE, _SIDE], antialias=True))


def _border(image: torch.Tensor) -> torch.Tensor:
    """The outermost pixels of an image ``(1, 1, H, W)``, as a vector."""
    inner = torch.ones_like(image, dtype=torch.bool)
    rows, columns = (max(round(_BORDER * side), 1) for side in image.shape[-2:])
    inner[..., rows:-rows, columns:-columns] = False
    return image[inner]
