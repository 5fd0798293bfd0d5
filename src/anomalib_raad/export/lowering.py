"""Quantized layers written as OpenVINO's integer kernels want them: every bit-width in an 8-bit container.

The CPU plugin runs a convolution in integers when its weights are an 8-bit constant times a step per output channel and
its input a FakeQuantize with 256 levels, and a pooling when its input is one. A grid of b bits is part of such a grid:
the weights as they are, the input by cutting it off at its largest value first.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
import torch.ao.quantization.fx._decomposed  # registers the operators
from torch import nn

from anomalib_raad.quantization.layers import (
    QuantAvgPool2d,
    QuantConv2d,
    computing_by,
    quantizable_layers,
    quantizable_poolings,
)
from anomalib_raad.quantization.quantizers import input_range

_ALL = slice(None)
_DECOMPOSED = torch.ops.quantized_decomposed  # the quantization operators of exported programs


def integer_kernels(network: nn.Module) -> AbstractContextManager[None]:
    """Let the quantized layers of a network compute in those operators while the context is open."""
    convolutions = [layer for layer in quantizable_layers(network).values() if layer.bits]
    poolings = [pooling for pooling in quantizable_poolings(network).values() if pooling.input_bits]
    replacements: dict[nn.Module, Callable[..., torch.Tensor]] = {
        **{layer: _IntegerConvolution(layer) for layer in convolutions},
        **{pooling: _IntegerPooling(pooling) for pooling in poolings},
    }
    return computing_by(replacements)


class _Grid:
    """The grid of a layer's input."""

    def __init__(self, layer: QuantConv2d | QuantAvgPool2d) -> None:
        step, zero_point, self.bits = float(layer.input_step), int(layer.input_zero_point), layer.input_bits
        self.arguments = (step, zero_point, *input_range(8), torch.uint8)
        self.top = (input_range(self.bits)[1] - zero_point) * step

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.bits < 8:
            x = x.clamp(max=self.top)
        return _DECOMPOSED.dequantize_per_tensor(_DECOMPOSED.quantize_per_tensor(x, *self.arguments), *self.arguments)


class _IntegerConvolution:
    @torch.no_grad()
    def __init__(self, layer: QuantConv2d) -> None:
        self.layer = layer
        self.integers = layer.integer_weight().to(torch.int8)
        self.weight_step = layer.weight_step.clone()
        self.grid = _Grid(layer) if layer.input_bits else None

    def __call__(self, x: torch.Tensor, channels: slice = _ALL) -> torch.Tensor:
        layer = self.layer
        x = layer.prepare(x)
        if self.grid:
            x = self.grid(x)
        weight = self.integers[channels].float() * self.weight_step[channels]
        return layer.convolve(x, weight, layer.bias[channels] if layer.bias is not None else None)


class _IntegerPooling:
    def __init__(self, pooling: QuantAvgPool2d) -> None:
        self.pooling, self.grid = pooling, _Grid(pooling)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.pooling.pool(self.grid(x))
