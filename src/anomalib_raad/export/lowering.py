"""Quantized layers written as OpenVINO's integer kernels want them: every bit-width in an 8-bit container.

The CPU plugin runs a convolution in integers when its weights are an 8-bit constant times a scale per output channel
and its input a FakeQuantize with 256 levels, and a pooling when its input is one. A grid of b bits is part of such a
grid: the weights as they are, the input by cutting it off at its largest value first.
"""

from contextlib import AbstractContextManager

import torch
import torch.ao.quantization.fx._decomposed  # registers the operators
from torch import nn

from anomalib_raad.quantization.layers import (
    QuantAvgPool2d,
    QuantConv2d,
    other_quantizers,
    quantizable_layers,
    quantizable_poolings,
)
from anomalib_raad.quantization.quantizers import InputQuantizer
from anomalib_raad.quantization.uniform import input_range

_ALL = slice(None)
_DECOMPOSED = torch.ops.quantized_decomposed  # the quantization operators of exported programs


def integer_kernels(network: nn.Module) -> AbstractContextManager[None]:
    """Let the quantized layers of a network compute in those operators while the context is open."""
    stand_ins: dict[nn.Module, dict[str, nn.Module]] = {}
    layers = quantizable_layers(network).values()
    inputs: list[QuantConv2d | QuantAvgPool2d] = [*layers, *quantizable_poolings(network).values()]
    for layer in layers:
        if layer.bits:
            stand_ins[layer] = {"weight_quantizer": _ExportedWeight(layer)}
    for part in inputs:
        if part.input_quantizer.bits:
            stand_ins.setdefault(part, {})["input_quantizer"] = _ExportedInput(part.input_quantizer)
    return other_quantizers(stand_ins)


class _ExportedInput(nn.Module):
    """The grid of a layer's input as a pair of operators."""

    computes_integers = False

    def __init__(self, quantizer: InputQuantizer) -> None:
        super().__init__()
        scale, zero_point, self.bits = float(quantizer.scale), int(quantizer.zero_point), quantizer.bits
        self.arguments = (scale, zero_point, *input_range(8), torch.uint8)
        self.top = (input_range(self.bits)[1] - zero_point) * scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.bits < 8:
            x = x.clamp(max=self.top)
        return _DECOMPOSED.dequantize_per_tensor(_DECOMPOSED.quantize_per_tensor(x, *self.arguments), *self.arguments)


class _ExportedWeight(nn.Module):
    """Weights as an 8-bit constant times their scales."""

    computes_integers = False
    integers: torch.Tensor
    scale: torch.Tensor

    @torch.no_grad()
    def __init__(self, layer: QuantConv2d) -> None:
        super().__init__()
        self.bits = layer.bits
        self.register_buffer("integers", layer.weight_quantizer.integers(layer.weight).to(torch.int8))
        self.register_buffer("scale", layer.weight_quantizer.scale.clone())

    def forward(self, weight: torch.Tensor, channels: slice = _ALL) -> torch.Tensor:
        del weight
        return self.integers[channels].float() * self.scale[channels]
