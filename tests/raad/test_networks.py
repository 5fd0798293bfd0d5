import pytest
import torch
from anomalib.models.image.efficient_ad.torch_model import AutoEncoder
from torch import nn
from torch.nn import functional as F  # noqa: N812

from anomalib_raad.raad.networks import Autoencoder, ImageConv2d, PatchDescriptionNetwork
from anomalib_raad.teacher.pdn import create_pdn


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("size", ["small", "medium"])
def test_a_pdn_is_anomalibs(size: str, padding: bool) -> None:
    torch.manual_seed(0)
    network, image = PatchDescriptionNetwork(size, 24, padding), torch.rand(2, 3, 64, 72)
    network.margin = 0
    theirs = create_pdn(size, 24, padding)
    theirs.load_state_dict(dict(network.named_parameters()))
    with torch.no_grad():
        expected = theirs(image)
        torch.testing.assert_close(network(image), expected)
        torch.testing.assert_close(network(image, slice(5, 9)), expected[:, 5:9])
        *_, last = network.features(image)
        torch.testing.assert_close(network.head(last), expected)
        assert torch.equal(network.head_input(image), last)
        x = image
        for block in network.blocks():
            x = block(x)
        torch.testing.assert_close(x, expected)
    assert len(network.blocks()) == 3


@pytest.mark.parametrize("padding", [False, True])
def test_the_autoencoder_is_anomalibs_at_256_pixels(padding: bool) -> None:
    torch.manual_seed(0)
    network, image = Autoencoder(24, padding).eval(), torch.rand(2, 3, 256, 256)
    network.unseen = 0
    theirs = AutoEncoder(24, padding).eval()
    theirs.load_state_dict(dict(network.named_parameters()))
    with torch.no_grad():
        expected = theirs(image, (256, 256))
        torch.testing.assert_close(network(image, expected.shape[-2:]), expected)
        assert network(image[..., :100], torch.Size([5, 7])).shape == (2, 24, 5, 7)
    assert network.head is network.decoder.deconv8


@pytest.mark.parametrize("padding", [0, 1])
def test_quantizing_a_first_layer_folds_the_normalisation_into_it(padding: int) -> None:
    torch.manual_seed(0)
    layer = ImageConv2d.from_conv(nn.Conv2d(3, 5, 4, padding=padding))
    images = torch.randint(256, (2, 3, 9, 9)) / 255
    with torch.no_grad():
        expected = layer(images)
        layer.quantize_weight_(8)
        layer.quantize_input_(images, 4)  # which changes nothing: an image has its own grid
        assert layer.input_quantizer.bits == 8
        grey = torch.tensor([124, 116, 104]).view(1, 3, 1, 1) / 255
        padded = grey.expand(2, 3, 9 + 2 * padding, 9 + 2 * padding).clone()
        padded[..., padding : padding + 9, padding : padding + 9] = images
        folded = F.conv2d(padded, layer.weight, layer.bias)
        # The grey is ImageNet's mean up to half a step of 8 bits.
        torch.testing.assert_close(folded, expected, rtol=0, atol=0.05 if padding else 1e-5)
        quantized = F.conv2d(padded, layer.quantized_weight(), layer.bias)
        torch.testing.assert_close(layer(images), quantized, rtol=0, atol=1e-5)
        torch.testing.assert_close(layer(images + 0.4 / 255), quantized, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="quantized already"):
        layer.quantize_weight_(8)


@pytest.mark.parametrize("error", [-1e-6, 0.0, 1e-6])
def test_a_first_layer_rounds_ties_up_whatever_float32_makes_of_them(error: float) -> None:
    """Resizing by powers of two makes many, and runtimes that rounded them differently would see other images."""
    layer = ImageConv2d.from_conv(nn.Conv2d(3, 5, 4)).requires_grad_(requires_grad=False)
    layer.quantize_weight_(8)
    steps = torch.arange(255, dtype=torch.float64)

    def rounded(values: torch.Tensor) -> torch.Tensor:
        return (255 * layer.quantized_input((values / 255 * (1 + error)).float())).round().double()

    assert torch.equal(rounded(steps + 1 / 2), steps + 1)
    assert torch.equal(rounded(steps + 1 / 2 - 1 / 1024), steps)


@pytest.mark.parametrize("padding", [0, 1])
def test_a_first_layer_that_is_quantized_no_longer_normalises_again(padding: int) -> None:
    torch.manual_seed(0)
    layer = ImageConv2d.from_conv(nn.Conv2d(3, 5, 4, padding=padding)).eval()
    images = torch.randint(256, (2, 3, 9, 9)) / 255
    with torch.no_grad():
        layer.quantize_weight_(8)
        quantized = layer(images)
        layer.dequantize_()
        assert (layer.bits, layer.input_quantizer.bits) == (0, 0)
        # The grey that pads is ImageNet's mean up to half a step of 8 bits.
        torch.testing.assert_close(layer(images), quantized, rtol=0, atol=0.05 if padding else 1e-5)
        before = layer.weight.clone()
        layer.dequantize_()  # which changes nothing any more
        assert torch.equal(layer.weight, before)
