import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from anomalib_raad.quantization.layers import (
    QuantAvgPool2d,
    QuantConv2d,
    make_quantizable_,
    other_quantizers,
    quantizable_layers,
    quantizable_poolings,
)
from anomalib_raad.quantization.uniform import BITS


@pytest.fixture
def conv() -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(3, 5, kernel_size=3, padding=1, stride=2)


def quantized(layer: QuantConv2d, bits: int, values: torch.Tensor) -> QuantConv2d:
    layer.quantize_weight_(bits)
    layer.quantize_input_(values, bits)
    return layer


def test_unquantized_layer_is_the_convolution(conv: nn.Conv2d) -> None:
    x = torch.randn(2, 3, 9, 9)
    layer = QuantConv2d.from_conv(conv)
    assert torch.equal(layer(x), conv(x))
    assert layer.weight is conv.weight
    assert torch.equal(layer(x, slice(1, 3)), conv(x)[:, 1:3])


@pytest.mark.parametrize("bits", BITS)
def test_quantized_layer_equals_integer_convolution(conv: nn.Conv2d, bits: int) -> None:
    """Integers in, integers out: accumulate int32 products and scale once."""
    x = torch.rand(2, 3, 9, 9)
    layer = quantized(QuantConv2d.from_conv(conv), bits, x)
    x_int = (x / layer.input_quantizer.scale).round().clamp(0, 2**bits - 1).double()
    half = min(2 ** (bits - 1), 64)
    w_int = (layer.weight / layer.weight_quantizer.scale).round().clamp(-half, half - 1).double()
    accumulated = F.conv2d(x_int, w_int, padding=1, stride=2)
    scale = layer.input_quantizer.scale * layer.weight_quantizer.scale.view(1, -1, 1, 1)
    expected = accumulated * scale + layer.bias.view(1, -1, 1, 1)
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5)  # in training
    torch.testing.assert_close(layer.eval()(x).double(), expected, rtol=2e-7, atol=1e-7)
    assert torch.equal(layer(x, slice(1, 3)), layer(x)[:, 1:3])
    for channel in layer.quantized_weight().detach():
        assert len(channel.unique()) <= 2**bits


def test_in_bfloat16_only_the_sums_of_integers_are_rounded(conv: nn.Conv2d) -> None:
    image = torch.randn(2, 3, 9, 9)
    layer = quantized(QuantConv2d.from_conv(conv).eval(), 8, image)
    inputs = torch.round(layer.quantized_input(image) / layer.input_quantizer.scale)
    sums = F.conv2d(inputs, layer.weight_quantizer.integers(layer.weight), None, conv.stride, conv.padding)
    scale = (layer.input_quantizer.scale * layer.weight_quantizer.scale).view(1, -1, 1, 1)
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(image)
    torch.testing.assert_close(output, sums.bfloat16().float() * scale + layer.bias.view(1, -1, 1, 1))


def test_the_input_stays_as_it_is_until_it_is_quantized(conv: nn.Conv2d) -> None:
    layer = QuantConv2d.from_conv(conv).eval()
    layer.quantize_weight_(4)
    assert (layer.bits, layer.input_quantizer.bits) == (4, 0)
    x = torch.randn(2, 3, 9, 9)
    torch.testing.assert_close(layer(x), F.conv2d(x, layer.quantized_weight(), conv.bias, 2, 1))


def test_state_dict_carries_the_whole_state(conv: nn.Conv2d) -> None:
    layer = quantized(QuantConv2d.from_conv(conv), 3, torch.randn(100))
    fresh = QuantConv2d.from_conv(nn.Conv2d(3, 5, kernel_size=3, padding=1, stride=2))
    fresh.load_state_dict(layer.state_dict())
    x = torch.randn(1, 3, 8, 8)
    assert (fresh.bits, fresh.input_quantizer.bits) == (3, 3)
    assert torch.equal(fresh(x), layer(x))


def test_a_convolution_without_bias__error() -> None:
    with pytest.raises(ValueError, match="has no bias"):
        QuantConv2d.from_conv(nn.Conv2d(3, 5, 1, bias=False))


def test_other_quantizers_are_there_for_a_while_only(conv: nn.Conv2d) -> None:
    class Doubling(nn.Module):
        computes_integers, bits = False, 8

        def forward(self, weight: torch.Tensor, channels: slice) -> torch.Tensor:
            return 2 * weight[channels]

    layer, x = QuantConv2d.from_conv(conv), torch.randn(2, 3, 9, 9)
    own = layer.weight_quantizer
    with other_quantizers({layer: {"weight_quantizer": Doubling()}}):
        torch.testing.assert_close(layer(x), F.conv2d(x, 2 * conv.weight, conv.bias, 2, 1))
    assert layer.weight_quantizer is own
    assert torch.equal(layer(x), conv(x))


@pytest.fixture
def pooling() -> QuantAvgPool2d:
    """A pooling whose grid ends at 1."""
    pooling = QuantAvgPool2d.from_pool(nn.AvgPool2d(2, 2, padding=1))
    pooling.quantize_input_(torch.linspace(0, 1, 256), 8)
    return pooling


def test_a_pooling_equals_the_mean_of_integers(pooling: QuantAvgPool2d) -> None:
    x = 1.2 * torch.rand(2, 3, 8, 9)
    integers = F.pad((255 * x).round().clamp(max=255), (1, 1, 1, 1))[..., :10]
    sums = sum(integers[..., row::2, column::2] for row in (0, 1) for column in (0, 1))
    torch.testing.assert_close(pooling.eval()(x), sums / 4 / 255)


def test_a_pooling_in_training_or_without_a_grid_is_the_pooling(pooling: QuantAvgPool2d) -> None:
    x = torch.rand(2, 3, 8, 9)
    expected = F.avg_pool2d(x, 2, padding=1)
    assert torch.equal(pooling.train()(x), expected)
    assert not torch.equal(pooling.eval()(x), expected)
    pooling.input_quantizer.bits = 0
    assert torch.equal(pooling(x), expected)


def test_state_dict_of_a_pooling(pooling: QuantAvgPool2d) -> None:
    fresh = QuantAvgPool2d.from_pool(nn.AvgPool2d(2))
    fresh.load_state_dict(pooling.state_dict())
    assert fresh.input_quantizer.bits == 8
    assert fresh.input_quantizer.scale == pooling.input_quantizer.scale


def test_make_quantizable_replaces_nested_layers_in_place() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(4, 2, 1)))
    before = list(network.parameters())
    x = torch.randn(1, 3, 4, 4)
    expected = network(x)
    assert make_quantizable_(network) is network
    assert list(quantizable_layers(network)) == ["0", "2.1"]
    assert list(quantizable_poolings(network)) == ["2.0"]
    assert all(a is b for a, b in zip(before, network.parameters(), strict=True))
    assert torch.equal(network(x), expected)
