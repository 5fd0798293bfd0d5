"""The student of reverse distillation: a bottleneck over all levels, and a decoder that mirrors the backbone."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from anomalib.models.components.backbone import get_decoder
from anomalib.models.image.reverse_distillation.components import get_bottleneck_layer
from torch import nn
from torchvision.models.resnet import BasicBlock

_LEAST_WIDTH = 32  # of a decoder's level, and of the bottleneck
_NARROWING = 4  # of the bottleneck: a wide one lets anomalies through, the more the longer it trains
_RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50_32x4d", "resnext101_32x8d",
            "wide_resnet50_2", "wide_resnet101_2")  # fmt: skip  # which anomalib mirrors
_WIDE = 128  # width of the bottleneck's groups for wide ResNets, as in the authors' code


class Student(nn.Module):
    """Bottleneck and decoder for any backbone of three or more levels, each half the size of the one before.

    Every level ends in a linear 1x1 convolution, since a backbone's features may have either sign.

    Args:
        channels: Channels of the levels, fine to coarse.
    """

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        last = channels[-1]
        self.gather = nn.ModuleList(_halvings(channels[number:]) for number in range(len(channels)))
        width = max(last // _NARROWING, _LEAST_WIDTH)
        joined = len(channels) * last
        shortcut = nn.Sequential(nn.Conv2d(joined, width, 1, 2, bias=False), nn.BatchNorm2d(width))
        self.bottleneck = nn.Sequential(BasicBlock(joined, width, 2, shortcut), BasicBlock(width, width))
        self.doublings, self.blocks, self.heads = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for level in reversed(channels):
            narrower = max(level, _LEAST_WIDTH)
            doubling = nn.ConvTranspose2d(width, narrower, 2, 2, bias=False)
            self.doublings.append(nn.Sequential(doubling, nn.BatchNorm2d(narrower), nn.ReLU()))
            self.blocks.append(BasicBlock(narrower, narrower))
            self.heads.append(nn.Conv2d(narrower, level, 1))
            width = narrower
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and module not in self.heads:
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, features: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Reconstruct the levels ``(N, C_k, H_k, W_k)`` from themselves through the bottleneck."""
        gathered = [gather(level) for gather, level in zip(self.gather, features, strict=True)]
        x = self.bottleneck(torch.cat([_cut(level, features[-1]) for level in gathered], dim=1))
        found: list[torch.Tensor] = []
        parts = zip(self.doublings, self.blocks, self.heads, strict=True)
        for level, (doubling, block, head) in zip(reversed(features), parts, strict=True):
            x = block(_cut(doubling(x), level))
            found.insert(0, head(x))
        return found


class ResNetStudent(nn.Module):
    """anomalib's bottleneck and mirrored ResNet of reverse distillation, whose levels end in a ReLU.

    Args:
        name: One of the ResNets that anomalib mirrors.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self.bottleneck = get_bottleneck_layer(name, **({"width_per_group": _WIDE} if name.startswith("wide") else {}))
        del self.bottleneck.conv4, self.bottleneck.bn4  # which nothing uses
        self.decoder = get_decoder(name)

    def forward(self, features: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Reconstruct the levels ``(N, C_k, H_k, W_k)`` from themselves through the bottleneck."""
        found = self.decoder(self.bottleneck(list(features)))
        return [_cut(level, target) for level, target in zip(found, features, strict=True)]


def build_student(backbone: str, channels: Sequence[int], layers: Sequence[int]) -> nn.Module:
    """The student that anomalib has for the ResNets that it mirrors, ours for any other backbone.

    Args:
        backbone: timm's name, with or without the tag of its weights.
        channels: Channels of the levels, fine to coarse.
        layers: Which of timm's feature maps they are.
    """
    name = backbone.partition(".")[0]
    return ResNetStudent(name) if name in _RESNETS and tuple(layers) == (1, 2, 3) else Student(channels)


def _halvings(widths: Sequence[int]) -> nn.Sequential:
    """Convolutions of stride 2 from each width to the next."""
    parts: list[nn.Module] = []
    for width, goal in pairwise(widths):
        parts += [nn.Conv2d(width, goal, 3, 2, 1, bias=False), nn.BatchNorm2d(goal), nn.ReLU()]
    return nn.Sequential(*parts)


def _cut(found: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Cells beyond a level's own: halving rounds odd sizes up, so doubling gives up to one more."""
    return found[..., : like.shape[-2], : like.shape[-1]]
