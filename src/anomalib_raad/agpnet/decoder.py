"""The decoder: a plain vision transformer that reconstructs a map of features."""

from collections.abc import Iterable
from typing import cast

import torch
from timm.layers import Attention
from timm.models.vision_transformer import Block
from torch import nn

from .attention import received_attention


class Decoder(nn.Module):
    """Reconstructs feature maps ``(N, C, h, w)`` of any size.

    Args:
        channels: C.
        width: Width of the blocks, a multiple of four times the number of heads.
        depth: K, number of blocks.
        heads: Heads of each block's attention.

    Raises:
        ValueError: If the heads do not divide the width.
    """

    def __init__(self, channels: int, width: int = 256, depth: int = 4, heads: int = 8) -> None:
        super().__init__()
        if width % heads or width % 4:
            msg = f"decoder_width is {width}; a multiple of 4 and of decoder_heads, {heads}, is needed"
            raise ValueError(msg)
        self.enter = nn.Linear(channels, width)
        self.blocks = nn.ModuleList(Block(width, heads, qkv_bias=True) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.leave = nn.Linear(width, channels)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Reconstruct features ``(N, C, h, w)``."""
        tokens = self._enter(features)
        for block in self.blocks:
            tokens = block(tokens)
        return self.leave(self.norm(tokens)).mT.unflatten(-1, features.shape[-2:])

    def attention(self, features: torch.Tensor) -> torch.Tensor:
        """A_learn (Eq. 2): what each cell of ``(N, C, h, w)`` receives, mean over the blocks, ``(N, 1, h, w)``."""
        tokens, received = self._enter(features), []
        for block in cast("Iterable[Block]", self.blocks):
            received.append(received_attention(cast("Attention", block.attn), block.norm1(tokens)))
            tokens = block(tokens)
        return torch.stack(received).mean(0).unflatten(-1, (1, *features.shape[-2:]))

    def _enter(self, features: torch.Tensor) -> torch.Tensor:
        height, width = features.shape[-2:]
        tokens = self.enter(features.flatten(2).mT)
        return tokens + positions(height, width, tokens.shape[-1], tokens.device).to(tokens.dtype)


def positions(height: int, width: int, channels: int, device: torch.device) -> torch.Tensor:
    """The fixed code of sines and cosines for the cells of a map, ``(height * width, channels)``, row by row."""
    rates = 1e4 ** (-torch.arange(channels // 4, device=device) / (channels / 4))
    angles = [torch.arange(size, device=device)[:, None] * rates for size in (height, width)]
    rows, columns = (torch.cat([angle.sin(), angle.cos()], 1) for angle in angles)
    return torch.cat([rows.repeat_interleave(width, 0), columns.repeat(height, 1)], 1)
