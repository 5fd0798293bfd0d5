"""The networks of EfficientAD with layers that can be quantized in place; they take images in [0, 1]."""

from collections import OrderedDict, deque
from collections.abc import Iterator
from typing import cast

import torch
from anomalib.models.image.efficient_ad.torch_model import AutoEncoder, imagenet_norm_batch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from anomalib_raad.quantization.layers import QuantConv2d, make_quantizable_, quantizable_layers
from anomalib_raad.quantization.reconstruction import BlockNetwork
from anomalib_raad.teacher.pdn import MARGIN, UNSEEN_CELLS, create_pdn

_ALL = slice(None)
_AE_SIZE = (256, 256)  # the image size for which the autoencoder's bottleneck is one vector of 64 values
_GREY = torch.tensor([124, 116, 104]).view(1, 3, 1, 1) / 255  # ImageNet's mean, rounded to 8 bits
# Images reduced by a half have ties at every 64th value: sums of 8-bit values times (1, 3, 3, 1) / 8. What lies exactly
# between two values would be rounded up in one runtime and down in another. This share of a value puts it above, far
# enough for the errors of float32, and half as far as a reduction by four comes to the middle otherwise.
_TIES_GO_UP = 2**-11 / 255


class ImageConv2d(QuantConv2d):
    """A network's first convolution, which takes images in [0, 1] and normalises them as ImageNet's.

    Quantization folds the normalisation into weights and bias, so that the input's grid is the image's own 8 bits. An
    image that is padded is padded with the grey that normalisation would turn into 0, rounded to 8 bits.
    """

    learns_input_scale = False  # the image's is given

    @torch.no_grad()
    def quantize_weight_(self, bits: int) -> None:
        """Fold the normalisation, choose the weights' scales; the input's grid is ``k / 255`` from now on.

        Raises:
            ValueError: If the layer is quantized already.
        """
        if self.bits:
            msg = "the layer is quantized already; a second time would fold the normalisation twice"
            raise ValueError(msg)
        black, slope = self._normalisation()
        self.bias.add_((self.weight * black).sum((1, 2, 3)))
        self.weight.mul_(slope)
        super().quantize_weight_(bits)
        self.input_quantizer.scale.fill_(1 / 255)
        self.input_quantizer.bits = 8

    @torch.no_grad()
    def dequantize_(self) -> None:
        """As in other layers; the image is normalised before the convolution again."""
        if self.bits:
            super().dequantize_()
            black, slope = self._normalisation()
            self.weight.div_(slope)
            self.bias.sub_((self.weight * black).sum((1, 2, 3)))

    def quantize_input_(self, values: torch.Tensor, bits: int) -> None:
        """Nothing is to choose: the image has its own grid."""

    def _normalisation(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What black becomes, -mean / std, and the slope, 1 / std, each of shape ``(1, 3, 1, 1)``."""
        black = imagenet_norm_batch(torch.zeros(1, self.in_channels, 1, 1).to(self.weight))
        return black, imagenet_norm_batch(torch.ones_like(black)) - black

    def prepare(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise the image; in a quantized layer pad it, since weights and bias normalise it."""
        if not self.bits:
            return imagenet_norm_batch(x)
        x = x + _TIES_GO_UP
        if not any(self.padding):
            return x
        height, width = cast("tuple[int, int]", self.padding)
        grey = _GREY.to(x)
        return F.pad(x - grey, (width, width, height, height)) + grey

    def convolve(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """The convolution, without its padding once :meth:`prepare` has done it."""
        return F.conv2d(x, weight, bias, self.stride) if self.bits else super().convolve(x, weight, bias)


class PatchDescriptionNetwork(BlockNetwork):
    """PDN-S or PDN-M: anomalib's layers under anomalib's names.

    Without padding the image is extended by its reflection, as far as that helps: patches that are half reflection are
    unlike any that a part has, and make the edges of normal parts anomalous.

    Args:
        model_size: ``small`` or ``medium``.
        out_channels: Channels of the features.
        padding: Zero-pad the convolutions instead, as EfficientAD can.
    """

    def __init__(self, model_size: str, out_channels: int, padding: bool) -> None:
        super().__init__()
        self.margin = 0 if padding else MARGIN
        self.unseen = 0 if padding else UNSEEN_CELLS
        for name, layer in make_quantizable_(create_pdn(model_size, out_channels, padding)).named_children():
            self.add_module(name, layer)
        self._names = list(quantizable_layers(self))
        first = self._names[0]
        self.set_submodule(first, ImageConv2d.from_conv(self._convolution(first)))

    def _convolution(self, name: str) -> QuantConv2d:
        return cast("QuantConv2d", self.get_submodule(name))

    @property
    def head(self) -> QuantConv2d:
        """The last convolution."""
        return self._convolution(self._names[-1])

    def forward(self, image: torch.Tensor, channels: slice = _ALL) -> torch.Tensor:
        """Describe images.

        Args:
            image: Images of shape ``(N, 3, H, W)`` in [0, 1].
            channels: Output channels to compute.

        Returns:
            Features of shape ``(N, C, h, w)``, a cell for every four pixels but for ``unseen`` cells along each edge.
        """
        return self.head(self.head_input(image), channels)

    def head_input(self, image: torch.Tensor) -> torch.Tensor:
        """What enters the last convolution."""
        return deque(self.features(image), maxlen=1).pop()  # a list would keep the largest maps

    def features(self, image: torch.Tensor) -> Iterator[torch.Tensor]:
        """What the convolutions before the last give after their ReLU, one after another."""
        x = channels_last(F.pad(image, [self.margin] * 4, mode="reflect") if self.margin else image)
        for depth, name in enumerate(self._names[:-1]):
            x = F.relu(self._convolution(name)(x), inplace=True)
            yield x
            if depth < 2:  # in either size behind the first two convolutions
                x = self.get_submodule(f"avgpool{depth + 1}")(x)

    def blocks(self) -> list[nn.Sequential]:
        """The blocks for reconstruction: first layer, inner layers, last layer; the layers are the network's own."""
        first, second, *others, last = self._names
        inner = {
            key: part for name in others for key, part in ((name, self._convolution(name)), (f"relu_{name}", nn.ReLU()))
        }
        pool1, pool2 = self.get_submodule("avgpool1"), self.get_submodule("avgpool2")
        second_block = {second: self._convolution(second), "relu": nn.ReLU(), "pool": pool2, **inner}
        return [
            nn.Sequential(OrderedDict({first: self._convolution(first), "relu": nn.ReLU(), "pool": pool1})),
            nn.Sequential(OrderedDict(second_block)),
            nn.Sequential(OrderedDict({last: self._convolution(last)})),
        ]


class Autoencoder(nn.Module):
    """EfficientAD's autoencoder: anomalib's encoder and decoder.

    It always sees the whole image at 256x256, so that its bottleneck stays one vector of 64 values.

    Args:
        out_channels: Channels of the features that it predicts.
        padding: Zero-pad the convolutions of the decoder as anomalib does.
    """

    def __init__(self, out_channels: int, padding: bool) -> None:
        super().__init__()
        self.unseen = 0 if padding else UNSEEN_CELLS
        network = make_quantizable_(AutoEncoder(out_channels, padding))
        self.encoder, self.decoder = network.encoder, network.decoder
        self.encoder.enconv1 = ImageConv2d.from_conv(self.encoder.enconv1)

    @property
    def head(self) -> QuantConv2d:
        """The last convolution."""
        return cast("QuantConv2d", self.decoder.deconv8)

    def forward(self, image: torch.Tensor, size: torch.Size) -> torch.Tensor:
        """Predict features of images ``(N, 3, H, W)`` in [0, 1] at the PDNs' cells, of which there are ``size``."""
        # Without antialiasing: anomalib's ONNX export, at an opset below 18, cannot express it.
        seen = F.interpolate(image, size=_AE_SIZE, mode="bilinear", align_corners=False)
        output = self.decoder(self.encoder(channels_last(seen)), _AE_SIZE)
        height, width = (side + 2 * self.unseen for side in size)
        whole = F.interpolate(output, size=(height, width), mode="bilinear", align_corners=False)
        return whole[..., self.unseen : height - self.unseen, self.unseen : width - self.unseen]


def channels_last(image: torch.Tensor) -> torch.Tensor:
    """The same values in the memory format in which convolutions are fastest."""
    return image.contiguous(memory_format=torch.channels_last)
