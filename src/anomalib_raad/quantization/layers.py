"""Convolutions and poolings that can be quantized in place: bits, steps and zero-points are their own state."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .quantizers import (
    BITS,
    check_bits,
    fake_quantize,
    grid_points,
    input_range,
    search_input_grid,
    search_weight_step,
    weight_range,
)

_ALL = slice(None)


class _QuantizedInput(nn.Module):
    """What has a grid for its input, a step and a zero-point: buffers, whose bit-width (0: off) is extra state."""

    bit_widths: tuple[str, ...] = ("input_bits",)
    input_bits: int
    input_step: torch.Tensor
    input_zero_point: torch.Tensor

    def add_input_grid_(self) -> None:
        """Register the grid, switched off."""
        self.input_bits = 0
        self.register_buffer("input_step", torch.ones(()))
        self.register_buffer("input_zero_point", torch.zeros(()))

    def quantize_input_(self, values: torch.Tensor, bits: int) -> None:
        """Choose the grid with the least squared rounding error on a sample of the input's values, of any shape."""
        step, zero_point = search_input_grid(values, bits)
        self.input_step.copy_(step)
        self.input_zero_point.copy_(zero_point)
        self.input_bits = bits

    def quantized_input(self, x: torch.Tensor, scale: torch.Tensor | float = 1.0) -> torch.Tensor:
        """The values that are seen of an input, if its step were ``scale`` times what it is."""
        if not self.input_bits:
            return x
        return fake_quantize(x, self.input_step * scale, self.input_zero_point, *input_range(self.input_bits))

    def dequantize_(self) -> None:
        """Compute in floating point from now on."""
        self.input_bits = 0

    def get_extra_state(self) -> dict[str, int]:
        """Bit-widths for the state dict."""
        return {name: getattr(self, name) for name in self.bit_widths}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restore the bit-widths."""
        for name, bits in state.items():
            if name not in self.bit_widths or bits not in {0, *BITS}:
                allowed = " and ".join(self.bit_widths)
                msg = f"the state dict says {name}={bits!r}; allowed are {allowed} of 0 (off) or {BITS}"
                raise ValueError(msg)
            setattr(self, name, bits)

    def extra_repr(self) -> str:
        """Show the bit-widths."""
        return ", ".join([super().extra_repr(), *(f"{name}={getattr(self, name)}" for name in self.bit_widths)])


class QuantConv2d(_QuantizedInput, nn.Conv2d):
    """A convolution whose weights and input are fake-quantized once :meth:`quantize_` has been called.

    Weights have one step per output channel (symmetric grid), the input has one step and zero-point (affine grid).
    Parameters keep the names and shapes of ``nn.Conv2d``, so state dicts of float networks load. The grid is part of
    the state dict too: the steps as buffers, the bit-widths (0: not quantized) as extra state.
    """

    bit_widths = ("bits", "input_bits")
    full_range = False  # of 8-bit weights; in checkpoints up to format 2 it was used
    weight_step: torch.Tensor

    @classmethod
    def from_conv(cls, conv: nn.Conv2d) -> "QuantConv2d":
        """Take over the weights of a convolution; the result computes the same until it is quantized."""
        layer = cls(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,  # type: ignore[arg-type]  # a pair, which torch declares as any tuple
            conv.stride,  # type: ignore[arg-type]
            conv.padding,  # type: ignore[arg-type]
            conv.dilation,  # type: ignore[arg-type]
            conv.groups,
            bias=conv.bias is not None,
            padding_mode=conv.padding_mode,
        )
        layer.weight, layer.bias = conv.weight, conv.bias
        layer.bits = 0
        layer.register_buffer("weight_step", torch.ones(conv.out_channels, 1, 1, 1))
        layer.add_input_grid_()
        return layer

    def quantize_(self, bits: int, inputs: torch.Tensor | None, input_bits: int | None = None) -> None:
        """Choose the grids with the least squared rounding error and quantize from now on.

        Args:
            bits: Bit-width of the weights, one of 2, 3, 4, 8.
            inputs: Sample of the input's values, any shape. ``None`` leaves the input as it is.
            input_bits: Bit-width of the input; ``None``: the weights'.
        """
        input_bits = bits if input_bits is None else input_bits
        for width in (bits, input_bits):
            check_bits("the bit-width of a layer", width)
        self.bits = bits
        self._choose_weight_step_()
        if inputs is not None:
            self.quantize_input_(inputs, input_bits)

    @property
    def weight_range(self) -> tuple[int, int]:
        """Smallest and largest integer of a quantized weight."""
        return weight_range(self.bits, self.full_range)

    def quantized_weight(self, channels: slice = _ALL) -> torch.Tensor:
        """The weights the convolution uses, shape ``(out, in, h, w)``, or those of some output channels."""
        if not self.bits:
            return self.weight[channels]
        return fake_quantize(self.weight[channels], self.weight_step[channels], 0, *self.weight_range)

    def integer_weight(self, channels: slice = _ALL) -> torch.Tensor:
        """The quantized weights in steps, without a gradient, shape ``(out, in, h, w)``."""
        return grid_points(self.weight[channels], self.weight_step[channels], 0, *self.weight_range)

    def quantized_input(self, x: torch.Tensor, scale: torch.Tensor | float = 1.0) -> torch.Tensor:
        """The values that the convolution sees of its input, if its step were ``scale`` times what it is."""
        return super().quantized_input(self.prepare(x), scale)

    def learned_steps(self) -> list[torch.Tensor]:
        """The steps that fine-tuning learns beside the weights (LSQ, arXiv 1902.08153)."""
        return [self.weight_step, self.input_step]

    def prepare(self, x: torch.Tensor) -> torch.Tensor:
        """What comes before the input's quantizer; nothing in an ordinary layer."""
        return x

    def forward(self, x: torch.Tensor, channels: slice = _ALL) -> torch.Tensor:
        """Convolve; ``channels`` computes only those output channels."""
        if self.input_bits and not self.training:
            return self._convolve_integers(x, channels)
        bias = self.bias[channels] if self.bias is not None else None
        return self.convolve(self.quantized_input(x), self.quantized_weight(channels), bias)

    def _convolve_integers(self, x: torch.Tensor, channels: slice) -> torch.Tensor:
        """As an integer kernel does it: sums of integers are exact up to 2^24, those of their multiples are not."""
        step = self.weight_step[channels]
        inputs = grid_points(self.prepare(x), self.input_step, self.input_zero_point, *input_range(self.input_bits))
        # Sums of 16 bits would be rounded once more, and scaling them in place by numbers of 32 takes 20 times as long.
        sums = self.convolve(inputs, self.integer_weight(channels), None).to(step.dtype)
        output = sums.mul_((self.input_step * step).view(1, -1, 1, 1))
        return output if self.bias is None else output.add_(self.bias[channels].view(1, -1, 1, 1))

    def convolve(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """The convolution itself, of what :meth:`forward` has quantized."""
        return self._conv_forward(x, weight, bias)

    @torch.no_grad()
    def dequantize_(self) -> None:
        """Keep the quantized weights and compute in floating point from now on."""
        super().dequantize_()
        self.weight.copy_(self.quantized_weight())
        self.bits = 0

    def set_weight_(self, weight: torch.Tensor) -> None:
        """Replace the weights and, if they are quantized, their steps."""
        self.weight.copy_(weight)
        if self.bits:
            self._choose_weight_step_()

    def _choose_weight_step_(self) -> None:
        self.weight_step.copy_(search_weight_step(self.weight, self.bits))
        self.full_range = False

    def get_extra_state(self) -> dict[str, int]:
        """Bit-widths and range for the state dict."""
        return {**super().get_extra_state(), "full_range": self.full_range}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restore bit-widths and range."""
        self.full_range = bool(state.get("full_range", True))
        super().set_extra_state({name: bits for name, bits in state.items() if name != "full_range"})


class QuantAvgPool2d(_QuantizedInput, nn.AvgPool2d):
    """An average pooling whose input is fake-quantized once :meth:`quantize_input_` has been called.

    An integer kernel then reads and writes single bytes where the feature maps are largest. In training mode the input
    stays as it is: the quantizer behind the pooling loses more, and with all of them a step of stage 3 would take 1.6
    times as long (processor time, 256x256, bfloat16).
    """

    @classmethod
    def from_pool(cls, pool: nn.AvgPool2d) -> "QuantAvgPool2d":
        """Take over the settings of a pooling."""
        layer = cls(pool.kernel_size, pool.stride, pool.padding, pool.ceil_mode, pool.count_include_pad)
        layer.add_input_grid_()
        return layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Pool what :meth:`quantized_input` leaves."""
        return self.pool(x if self.training else self.quantized_input(x))

    def pool(self, x: torch.Tensor) -> torch.Tensor:
        """The pooling itself."""
        return super().forward(x)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:  # noqa: ANN401
        """Checkpoints of format 1 know of no grid here: theirs is off."""
        fresh = self.from_pool(self).state_dict(prefix=prefix)
        state_dict.update({name: value for name, value in fresh.items() if name not in state_dict})
        super()._load_from_state_dict(state_dict, prefix, *arguments)


def learned_steps(network: nn.Module) -> list[torch.Tensor]:
    """The steps of all layers of a network that fine-tuning may learn."""
    return [step for layer in quantizable_layers(network).values() for step in layer.learned_steps()]


def make_quantizable_(network: nn.Module) -> nn.Module:
    """Replace a network's convolutions and average poolings by those that can be quantized, in place."""
    for parent in list(network.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.Conv2d:
                setattr(parent, name, QuantConv2d.from_conv(child))
            elif type(child) is nn.AvgPool2d:
                setattr(parent, name, QuantAvgPool2d.from_pool(child))
    return network


def dequantize_(network: nn.Module) -> None:
    """Let a network compute in floating point from now on, with the weights as quantization left them."""
    for module in network.modules():
        if isinstance(module, _QuantizedInput):
            module.dequantize_()


@contextmanager
def computing_by(replacements: Mapping[nn.Module, Callable[..., torch.Tensor]]) -> Iterator[None]:
    """Let each layer compute by another function while the context is open."""
    for layer, function in replacements.items():
        vars(layer)["forward"] = function
    try:
        yield
    finally:
        for layer in replacements:
            del vars(layer)["forward"]


def quantizable_layers(network: nn.Module) -> dict[str, QuantConv2d]:
    """The quantizable convolutions of a network by name, in order of definition."""
    return {name: module for name, module in network.named_modules() if isinstance(module, QuantConv2d)}


def last_layer(network: nn.Module) -> QuantConv2d:
    """The last quantizable convolution of a network."""
    *_, last = quantizable_layers(network).values()
    return last


def quantizable_poolings(network: nn.Module) -> dict[str, QuantAvgPool2d]:
    """The quantizable poolings of a network by name."""
    return {name: module for name, module in network.named_modules() if isinstance(module, QuantAvgPool2d)}
