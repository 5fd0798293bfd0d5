"""Resizing that is the same in training and after export."""

import torch
from anomalib.pre_processing import PreProcessor
from torch import nn
from torchvision.transforms.v2 import Compose, Resize, Transform


class RaadPreProcessor(PreProcessor):
    """A pre-processor that resizes exported models' images as it resizes those in training.

    anomalib drops the antialiasing of ``Resize`` on export, since neither ONNX nor OpenVINO's reader of PyTorch has the
    operator; the exported model would see other images than the one that was trained.
    """

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        """Resize images of shape ``(N, 3, H, W)``; only called outside Lightning's loops."""
        return exportable(self.transform)(batch) if self.transform else batch


class AntialiasedResize(nn.Module):
    """``torchvision.transforms.v2.Resize(size, antialias=True)``, bilinear, for float images, as two matrix products.

    Args:
        size: Height and width of the result.
    """

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        self.size = size

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Resize images of shape ``(N, C, H, W)`` to ``(N, C, *size)``."""
        height, width = self.size
        return _weights(images[0, 0, :, 0], height) @ images @ _weights(images[0, 0, 0], width).T


def _weights(line: torch.Tensor, goal: int) -> torch.Tensor:
    """What each pixel of a line of the source gives to each of ``goal`` pixels, ``(goal, length)``.

    A triangle about the goal's centre, two goal pixels wide, but no narrower than two pixels of the source. The length
    is a tensor, since OpenVINO cannot read arithmetic on sizes. Places are integers, in pixels divided by ``2 goal``,
    since runtimes that compute in bfloat16 would round them to multiples of two pixels beyond 256.
    """
    ones = torch.ones_like(line, dtype=torch.int32)
    length = ones.sum(dtype=torch.int32)
    pixels = goal * (2 * ones.cumsum(0, dtype=torch.int32) - 1)
    centres = length * (2 * torch.arange(goal, dtype=torch.int32, device=line.device) + 1)
    half_width = 2 * length.clamp(min=goal)
    triangle = (half_width - (pixels - centres[:, None]).abs()).clamp(min=0)
    return triangle.to(line.dtype) / triangle.sum(dim=1, keepdim=True, dtype=torch.int32).to(line.dtype)


def exportable(transform: Transform) -> nn.Module:
    """A transform with every antialiased ``Resize`` to a fixed size replaced by :class:`AntialiasedResize`."""
    if isinstance(transform, Compose):
        return nn.Sequential(*(exportable(part) for part in transform.transforms))
    if isinstance(transform, Resize) and transform.antialias and len(transform.size) == 2:
        return AntialiasedResize(tuple(transform.size))
    return transform
