"""Quantized convolutions written as OpenVINO's integer kernels want them: every bit-width in an 8-bit container.

The CPU plugin runs a convolution in integers when its weights are an 8-bit constant times a step per output channel and
its input a FakeQuantize with 256 levels. A grid of b bits is part of such a grid: the weights as they are, the input by
cutting it off at its largest value first.
"""

from contextlib import AbstractContextManager

import torch
import torch.ao.quantization.fx._decomposed  # registers the operators
from torch import nn

from anomalib_raad.quantization.layers import QuantConv2d, computing_by, quantizable_layers
from anomalib_raad.quantization.quantizers import input_range

_ALL = slice(None)
_DECOMPOSED = torch.ops.quantized_decomposed  # the quantization operators of exported programs


def integer_convolutions(network: nn.Module) -> AbstractContextManager[None]:
    """Let the quantized convolutions of a network compute by :class:`_IntegerConvolution` while the context is open."""
    layers = quantizable_layers(network).values()
    return computing_by({layer: _IntegerConvolution(layer) for layer in layers if layer.bits})


class _IntegerConvolution:
    """What a quantized layer computes, in operators that OpenVINO recognises."""

    @torch.no_grad()
    def __init__(self, layer: QuantConv2d) -> None:
        self.layer = layer
        self.integers = (layer.quantized_weight() / layer.weight_step).round().to(torch.int8)
        self.weight_step = layer.weight_step.clone()
        self.step, self.zero_point = float(layer.input_step), int(layer.input_zero_point)
        self.top = (input_range(layer.input_bits)[1] - self.zero_point) * self.step

    def __call__(self, x: torch.Tensor, channels: slice = _ALL) -> torch.Tensor:
        layer = self.layer
        x = layer.prepare(x)
        if layer.input_bits:
            if layer.input_bits < 8:
                x = x.clamp(max=self.top)
            grid = (self.step, self.zero_point, *input_range(8), torch.uint8)
            x = _DECOMPOSED.dequantize_per_tensor(_DECOMPOSED.quantize_per_tensor(x, *grid), *grid)
        weight = self.integers[channels].float() * self.weight_step[channels]
        return layer.convolve(x, weight, layer.bias[channels] if layer.bias is not None else None)
