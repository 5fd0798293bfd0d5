"""Convolutions and poolings that can be quantized in place, by quantizers that are parts of them."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar, cast

import torch
from torch import nn

from .quantizers import InputQuantizer, WeightQuantizer

N = TypeVar("N", bound=nn.Module)
_ALL = slice(None)


class QuantConv2d(nn.Conv2d):
    """A convolution with a quantizer of its weights and one of its input, switched off until they are told their bits.

    Parameters keep the names and shapes of ``nn.Conv2d``, so state dicts of float networks have the same names.
    """

    bias: nn.Parameter
    learns_input_scale = True
    """Whether reconstruction may adapt the input's scale."""
    weight_quantizer: WeightQuantizer
    input_quantizer: InputQuantizer

    @classmethod
    def from_conv(cls, conv: nn.Conv2d) -> "QuantConv2d":
        """Take over the weights of a convolution; the result computes the same until it is quantized.

        Raises:
            ValueError: If it has no bias.
        """
        if conv.bias is None:
            msg = f"{conv} has no bias; only convolutions with one can be quantized"
            raise ValueError(msg)
        layer = cls(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,  # type: ignore[arg-type]  # a pair, which torch declares as any tuple
            conv.stride,  # type: ignore[arg-type]
            conv.padding,  # type: ignore[arg-type]
            conv.dilation,  # type: ignore[arg-type]
            conv.groups,
            padding_mode=conv.padding_mode,
        )
        layer.weight, layer.bias = conv.weight, cast("nn.Parameter", conv.bias)
        layer.weight_quantizer = WeightQuantizer(conv.out_channels)
        layer.input_quantizer = InputQuantizer()
        return layer

    @property
    def bits(self) -> int:
        """Bit-width of the weights; 0: not quantized."""
        return self.weight_quantizer.bits

    def quantize_weight_(self, bits: int) -> None:
        """Choose the weights' scales and quantize them from now on."""
        self.weight_quantizer.choose_(self.weight, bits)

    def quantize_input_(self, values: torch.Tensor, bits: int) -> None:
        """Choose the input's grid by a sample of its values, of any shape, and quantize it from now on."""
        self.input_quantizer.choose_(values, bits)

    @torch.no_grad()
    def dequantize_(self) -> None:
        """Keep the quantized weights and compute in floating point from now on."""
        self.weight.copy_(self.quantized_weight())
        self.weight_quantizer.bits = self.input_quantizer.bits = 0

    def set_weight_(self, weight: torch.Tensor) -> None:
        """Replace the weights and, if they are quantized, their scales."""
        self.weight.copy_(weight)
        if self.bits:
            self.weight_quantizer.choose_(self.weight, self.bits)

    def quantized_weight(self, channels: slice = _ALL) -> torch.Tensor:
        """The weights that the convolution uses, ``(out, in, h, w)``, or those of some output channels."""
        return self.weight_quantizer(self.weight, channels)

    def quantized_input(self, x: torch.Tensor) -> torch.Tensor:
        """The values that the convolution sees of its input."""
        return self.input_quantizer(self.prepare(x))

    def forward(self, x: torch.Tensor, channels: slice = _ALL) -> torch.Tensor:
        """Convolve; ``channels`` computes only those output channels."""
        exact = self.input_quantizer.computes_integers and self.weight_quantizer.computes_integers
        if self.bits and self.input_quantizer.bits and exact and not self.training:
            return self._convolve_integers(x, channels)
        return self.convolve(self.quantized_input(x), self.quantized_weight(channels), self.bias[channels])

    def _convolve_integers(self, x: torch.Tensor, channels: slice) -> torch.Tensor:
        """As an integer kernel does it: sums of integers are exact up to 2^24, those of their multiples are not."""
        scale = self.weight_quantizer.scale[channels]
        inputs = self.input_quantizer.integers(self.prepare(x))
        sums = self.convolve(inputs, self.weight_quantizer.integers(self.weight, channels), None)
        # Sums of 16 bits would be rounded once more, and scaling them in place by numbers of 32 takes 20 times as long.
        output = sums.to(scale.dtype).mul_((self.input_quantizer.scale * scale).view(1, -1, 1, 1))
        return output.add_(self.bias[channels].view(1, -1, 1, 1))

    def prepare(self, x: torch.Tensor) -> torch.Tensor:
        """What comes before the input's quantizer; nothing in an ordinary layer."""
        return x

    def convolve(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """The convolution itself, of what :meth:`forward` has quantized."""
        return self._conv_forward(x, weight, bias)


class QuantAvgPool2d(nn.AvgPool2d):
    """An average pooling with a quantizer of its input, switched off until :meth:`quantize_input_`.

    An integer kernel then reads and writes single bytes where the feature maps are largest. In training mode the input
    stays as it is: the quantizer behind the pooling loses more, and rounding the largest maps takes most of the time.
    """

    input_quantizer: InputQuantizer

    @classmethod
    def from_pool(cls, pool: nn.AvgPool2d) -> "QuantAvgPool2d":
        """Take over the settings of a pooling."""
        layer = cls(pool.kernel_size, pool.stride, pool.padding, pool.ceil_mode, pool.count_include_pad)
        layer.input_quantizer = InputQuantizer()
        return layer

    def quantize_input_(self, values: torch.Tensor, bits: int) -> None:
        """Choose the input's grid by a sample of its values, of any shape, and quantize it from now on."""
        self.input_quantizer.choose_(values, bits)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Pool, outside training what the quantizer leaves."""
        return super().forward(x if self.training else self.input_quantizer(x))


def make_quantizable_(network: N) -> N:
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
    for layer in quantizable_layers(network).values():
        layer.dequantize_()
    for pooling in quantizable_poolings(network).values():
        pooling.input_quantizer.bits = 0


@contextmanager
def other_quantizers(stand_ins: Mapping[nn.Module, Mapping[str, nn.Module]]) -> Iterator[None]:
    """Let layers compute with other quantizers while the context is open.

    Args:
        stand_ins: For each layer its parts that are replaced, by name.
    """
    own = {layer: {name: layer.get_submodule(name) for name in parts} for layer, parts in stand_ins.items()}
    try:
        for layer, parts in stand_ins.items():
            for name, part in parts.items():
                layer.set_submodule(name, part)
        yield
    finally:
        for layer, parts in own.items():
            for name, part in parts.items():
                layer.set_submodule(name, part)


def quantizable_layers(network: nn.Module) -> dict[str, QuantConv2d]:
    """The quantizable convolutions of a network by name, in order of definition."""
    return {name: module for name, module in network.named_modules() if isinstance(module, QuantConv2d)}


def quantizable_poolings(network: nn.Module) -> dict[str, QuantAvgPool2d]:
    """The quantizable poolings of a network by name."""
    return {name: module for name, module in network.named_modules() if isinstance(module, QuantAvgPool2d)}
