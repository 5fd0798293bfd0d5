"""What a model weighs: bits and bytes of its weights."""

from collections.abc import Collection

from torch import nn

from .layers import QuantConv2d, quantizable_layers


def average_bits(layers: Collection[QuantConv2d]) -> float:
    """Bits of a weight of these layers, on average; 32 where there are none."""
    weights = sum(layer.weight.numel() for layer in layers)
    return sum(layer.weight.numel() * (layer.bits or 32) for layer in layers) / weights if weights else 32.0


def model_bytes(model: nn.Module) -> int:
    """Bytes of a model's weights: each quantized weight in its bits, everything else in 32.

    A quantized layer has its weights' scales and its input's scale and zero point besides.
    """
    layers = quantizable_layers(model).values()
    weights = sum(layer.weight.numel() * (layer.bits or 32) for layer in layers)
    others = sum(p.numel() for p in model.parameters()) - sum(layer.weight.numel() for layer in layers)
    grids = sum(layer.weight_quantizer.scale.numel() + 2 for layer in layers if layer.bits)
    return (weights + 32 * (others + grids)) // 8
