"""The quantizers of a layer: bits, scale and zero point of its weights and of its input, as state of their own."""

from typing import Any

import torch
from torch import nn

from .uniform import (
    BITS,
    check_bits,
    fake_quantize,
    grid_points,
    input_range,
    search_input_grid,
    search_weight_scale,
    weight_range,
)

_ALL = slice(None)


class Quantizer(nn.Module):
    """A uniform grid. Its bit-width is extra state, 0 while it is switched off, and its numbers are buffers."""

    computes_integers = True
    """Whether a layer may sum the grid's integers; stand-ins that learn or are exported only have real values."""
    scale: torch.Tensor

    def __init__(self, scale: torch.Tensor) -> None:
        super().__init__()
        self.bits = 0
        self.register_buffer("scale", scale)

    def get_extra_state(self) -> dict[str, int]:
        """Bit-width for the state dict."""
        return {"bits": self.bits}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restore the bit-width."""
        bits = state.get("bits")
        if bits not in {0, *BITS}:
            msg = f"the state dict says bits={bits!r}; allowed are 0 (off) and {BITS}"
            raise ValueError(msg)
        self.bits = bits

    def extra_repr(self) -> str:
        """Show the bit-width."""
        return f"bits={self.bits}"


class WeightQuantizer(Quantizer):
    """A symmetric grid with a scale for each output channel.

    Args:
        out_channels: Output channels of the layer.
    """

    def __init__(self, out_channels: int) -> None:
        super().__init__(torch.ones(out_channels, 1, 1, 1))

    def choose_(self, weight: torch.Tensor, bits: int) -> None:
        """Choose the scales with the least squared rounding error of weights ``(out, in, h, w)``."""
        check_bits("the bit-width of a layer", bits)
        self.bits = bits
        self.scale.copy_(search_weight_scale(weight, bits))

    def forward(self, weight: torch.Tensor, channels: slice = _ALL) -> torch.Tensor:
        """The weights that are used of some output channels."""
        if not self.bits:
            return weight[channels]
        return fake_quantize(weight[channels], self.scale[channels], 0, *weight_range(self.bits))

    def integers(self, weight: torch.Tensor, channels: slice = _ALL) -> torch.Tensor:
        """The quantized weights divided by their scales, without a gradient."""
        return grid_points(weight[channels], self.scale[channels], 0, *weight_range(self.bits))


class InputQuantizer(Quantizer):
    """An affine grid with one scale and zero point for all of an input."""

    zero_point: torch.Tensor

    def __init__(self) -> None:
        super().__init__(torch.ones(()))
        self.register_buffer("zero_point", torch.zeros(()))

    def choose_(self, values: torch.Tensor, bits: int) -> None:
        """Choose the grid with the least squared rounding error on a sample of the input's values, of any shape."""
        check_bits("the bit-width of an input", bits)
        self.bits = bits
        scale, zero_point = search_input_grid(values, bits)
        self.scale.copy_(scale)
        self.zero_point.copy_(zero_point)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The values that are seen of an input."""
        return fake_quantize(x, self.scale, self.zero_point, *input_range(self.bits)) if self.bits else x

    def integers(self, x: torch.Tensor) -> torch.Tensor:
        """The quantized input, less the zero point, divided by the scale; without a gradient."""
        return grid_points(x, self.scale, self.zero_point, *input_range(self.bits))
