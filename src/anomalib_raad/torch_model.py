"""The networks of RAAD and what is computed from them: loss terms, anomaly maps, scores. No Lightning."""

from collections import OrderedDict
from collections.abc import Iterable
from typing import NamedTuple, cast

import torch
from anomalib.data import InferenceBatch
from anomalib.models.image.efficient_ad.torch_model import (
    AutoEncoder,
    EfficientAdModelSize,
    MediumPatchDescriptionNetwork,
    SmallPatchDescriptionNetwork,
    imagenet_norm_batch,
)
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torchvision.transforms.v2 import functional as TF  # noqa: N812

from .losses import hard_feature_loss, squared_difference
from .quantization.layers import QuantConv2d, make_quantizable_, quantizable_layers, quantizable_poolings
from .statistics import channel_mean_std

PDN_CLASSES = {
    EfficientAdModelSize.S: SmallPatchDescriptionNetwork,
    EfficientAdModelSize.M: MediumPatchDescriptionNetwork,
}
MIN_IMAGE_SIZE, MAX_IMAGE_SIZE = 64, 1024
_AE_SIZE = (256, 256)  # the image size for which the autoencoder's bottleneck is one vector of 64 values
_GREY = torch.tensor([124, 116, 104]).view(1, 3, 1, 1) / 255  # ImageNet's mean, rounded to 8 bits
# Images reduced by a half have ties at every 64th value: sums of 8-bit values times (1, 3, 3, 1) / 8. What lies exactly
# between two steps would be rounded up in one runtime and down in another. This share of a step puts it above, far
# enough for the errors of float32, and half as far as a reduction by four comes to the middle otherwise.
_TIES_GO_UP = 2**-11 / 255
LOST_CELLS = 4  # cells a PDN without padding loses on each side of its output
STRIDE = 4  # of a PDN: pixels of the image for each cell of its output
_ALL = slice(None)


class Losses(NamedTuple):
    """The three terms of Eq. 6 and EfficientAD's penalty, each a scalar, not yet weighted."""

    st: torch.Tensor
    """L_ts: student against teacher, hard features only."""
    stae: torch.Tensor
    """L_aes: student against autoencoder."""
    ae: torch.Tensor
    """L_tae: autoencoder against teacher."""
    penalty: torch.Tensor | None = None
    """Mean squared student output on an image that has nothing to do with the part."""


class RaadModel(nn.Module):
    """Teacher, student and autoencoder of EfficientAD with convolutions that can be quantized in place.

    In training mode :meth:`forward` returns :class:`Losses`, in evaluation mode an ``InferenceBatch``.

    Images may have any size from 64 to 1024 pixels a side. The PDNs are fully convolutional. The autoencoder always
    sees the whole image at 256x256, so that its bottleneck stays one vector of 64 values; its output is resized to the
    PDNs' output. At 256x256 this is EfficientAD.

    Args:
        model_size: ``small`` (PDN-S) or ``medium`` (PDN-M).
        padding: Zero-pad the PDNs' convolutions. Without it the maps' borders are filled with zeros.
        out_channels: Channels of teacher and autoencoder; the student has twice as many.
        p_hard: Quantile of the hard-feature selection, see :func:`~.losses.hard_feature_loss`.
    """

    teacher_mean: torch.Tensor
    teacher_std: torch.Tensor
    map_quantiles: torch.Tensor
    teacher_loaded: torch.Tensor
    teacher_normalized: torch.Tensor

    def __init__(
        self,
        model_size: str = "small",
        padding: bool = False,
        out_channels: int = 384,
        p_hard: float = 0.999,
    ) -> None:
        super().__init__()
        sizes = [size.value for size in EfficientAdModelSize]
        if model_size not in sizes:
            msg = f"model_size is {model_size!r}; the sizes are {', '.join(sorted(sizes))}"
            raise ValueError(msg)
        if not 0 <= p_hard < 1:
            msg = f"p_hard is {p_hard}; a quantile in [0, 1) is needed"
            raise ValueError(msg)
        pdn = PDN_CLASSES[EfficientAdModelSize(model_size)]
        self.teacher = make_quantizable_(pdn(out_channels, padding)).requires_grad_(requires_grad=False)
        self.student = make_quantizable_(pdn(2 * out_channels, padding))
        self.ae = make_quantizable_(AutoEncoder(out_channels, padding))
        for network in (self.teacher, self.student, self.ae):
            name, first = next(iter(quantizable_layers(network).items()))
            network.set_submodule(name, ImageConv2d.from_conv(first))
        self.out_channels = out_channels
        self.padding = padding
        self.p_hard = p_hard
        # Channel statistics of the teacher on normal images, mu and sigma.
        self.register_buffer("teacher_mean", torch.zeros(1, out_channels, 1, 1))
        self.register_buffer("teacher_std", torch.ones(1, out_channels, 1, 1))
        # Rows: student-teacher map, student-autoencoder map; columns: q_a and q_b. (0, 0.1) leaves a map as it is.
        self.register_buffer("map_quantiles", torch.tensor([[0.0, 0.1], [0.0, 0.1]]))
        self.register_buffer("teacher_loaded", torch.tensor(False))  # noqa: FBT003
        self.register_buffer("teacher_normalized", torch.tensor(False))  # noqa: FBT003
        self.train()

    @property
    def blind_edge(self) -> int:
        """Pixels along the edges of an image where the maps are zero: networks without padding do not see them."""
        return 0 if self.padding else STRIDE * LOST_CELLS

    @property
    def quantized(self) -> bool:
        """Whether stage 2 is over."""
        return any(layer.bits for layer in quantizable_layers(self).values())

    def train(self, mode: bool = True) -> "RaadModel":
        """Set the mode of student and autoencoder; the teacher stays in evaluation mode but for its poolings."""
        super().train(mode)
        self.teacher.eval()
        for pooling in quantizable_poolings(self.teacher).values():
            pooling.train(mode)
        return self

    def forward(
        self,
        image: torch.Tensor,
        penalty_image: torch.Tensor | None = None,
        teacher_features: torch.Tensor | None = None,
    ) -> Losses | InferenceBatch:
        """Compute the loss terms (training mode) or predictions (evaluation mode).

        Args:
            image: Images of shape ``(N, 3, H, W)`` in [0, 1], not normalised.
            penalty_image: In training mode, images for the penalty, of the same shape. ``None``: no penalty.
            teacher_features: In training mode, :meth:`teacher_features` of ``image``, if they are known.
        """
        if self.training:
            return self.losses(image, penalty_image, teacher_features)
        map_st, map_ae = self._cell_maps(image)
        (a_st, b_st), (a_ae, b_ae) = self.map_quantiles
        # Mean of EfficientAD's normalised maps: the q_a-quantile of normal images becomes 0, the q_b-quantile 0.1.
        # Taken before the resize, which is linear: one instead of two.
        cell_map = 0.05 * ((map_st - a_st) / (b_st - a_st) + (map_ae - a_ae) / (b_ae - a_ae))
        anomaly_map = _resize(cell_map, image.shape[-2:])
        return InferenceBatch(pred_score=anomaly_map.amax(dim=(-2, -1)), anomaly_map=anomaly_map)

    def losses(
        self,
        image: torch.Tensor,
        penalty_image: torch.Tensor | None = None,
        teacher_features: torch.Tensor | None = None,
    ) -> Losses:
        """The terms of Eq. 6 for a batch of images in [0, 1], shape ``(N, 3, H, W)``; see :meth:`forward`."""
        to_teacher, to_autoencoder = slice(None, self.out_channels), slice(self.out_channels, None)
        image = _channels_last(image)
        augmented = _channels_last(augment(image))
        with torch.no_grad():
            target = self.normalized_teacher(image, teacher_features)
            augmented_target = self.normalized_teacher(augmented)

        student = describe(self.student, augmented, to_autoencoder)
        autoencoder = self.autoencode(augmented, student.shape[-2:])
        penalty = None
        if penalty_image is not None:
            penalty = describe(self.student, penalty_image, to_teacher).float().square().mean()
        return Losses(
            st=hard_feature_loss(target, describe(self.student, image, to_teacher), self.p_hard),
            stae=squared_difference(autoencoder, student).mean(),
            ae=squared_difference(augmented_target, autoencoder).mean(),
            penalty=penalty,
        )

    def maps(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Student-teacher and student-autoencoder map of images, unnormalised, each ``(N, 1, H, W)``.

        ``M = mean_c D``, resized bilinearly to the image.
        """
        map_st, map_ae = (_resize(cell_map, image.shape[-2:]) for cell_map in self._cell_maps(image))
        return map_st, map_ae

    def _cell_maps(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The maps before they are resized; where networks without padding do not see the image they are 0."""
        image = _channels_last(image)
        student = describe(self.student, image)
        to_teacher, to_autoencoder = student[:, : self.out_channels], student[:, self.out_channels :]
        map_st = squared_difference(self.normalized_teacher(image), to_teacher).mean(dim=1, keepdim=True)
        autoencoder = self.autoencode(image, student.shape[-2:])
        map_ae = squared_difference(autoencoder, to_autoencoder).mean(dim=1, keepdim=True)
        if self.padding:
            return map_st, map_ae
        return F.pad(map_st, [LOST_CELLS] * 4), F.pad(map_ae, [LOST_CELLS] * 4)

    def teacher_features(self, image: torch.Tensor) -> torch.Tensor:
        """Teacher features of images in [0, 1], ``(N, C, h, w)``."""
        return describe(self.teacher, image)

    def normalized_teacher(self, image: torch.Tensor, teacher_features: torch.Tensor | None = None) -> torch.Tensor:
        """Teacher features with mean 0 and deviation 1 in each channel on normal images, ``(N, C, h, w)``."""
        return self._normalize(self.teacher_features(image) if teacher_features is None else teacher_features)

    def student_features(self, image: torch.Tensor) -> torch.Tensor:
        """Both halves of the student's features of images in [0, 1], ``(N, 2 C, h, w)``."""
        return describe(self.student, image)

    def student_target(self, image: torch.Tensor, teacher_features: torch.Tensor | None = None) -> torch.Tensor:
        """What both halves of the student are to predict: normalised teacher and autoencoder, ``(N, 2 C, h, w)``."""
        teacher = self.normalized_teacher(image, teacher_features)
        return torch.cat([teacher, self.autoencode(image, teacher.shape[-2:])], dim=1)

    def autoencode(self, image: torch.Tensor, size: torch.Size) -> torch.Tensor:
        """The autoencoder's prediction of the normalised teacher, resized to the PDNs' output ``size``."""
        # Without antialiasing: anomalib's ONNX export, at an opset below 18, cannot express it.
        seen = F.interpolate(image, size=_AE_SIZE, mode="bilinear", align_corners=False)
        encoder, decoder = self.ae.get_submodule("encoder"), self.ae.get_submodule("decoder")
        output = decoder(encoder(_channels_last(seen)), _AE_SIZE)
        return F.interpolate(output, size=size, mode="bilinear", align_corners=False)

    def aligned_features(self, image: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Features of teacher and student layer by layer, for Eq. 4; each of shape ``(N, c_l, h_l, w_l)``.

        After the ReLU for the inner layers; for the last one the normalised teacher. Where the student is twice as
        wide, its first half counts, the one that learns the teacher.
        """
        teacher: list[torch.Tensor] = []
        student: list[torch.Tensor] = []
        teacher.append(self._normalize(describe(self.teacher, image, taps=teacher)))
        student.append(describe(self.student, image, taps=student))
        return [(t, s[:, : t.shape[1]]) for t, s in zip(teacher, student, strict=True)]

    def blocks(self, network: nn.Module) -> list[nn.Sequential]:
        """The blocks of teacher or student that are reconstructed together, see :func:`pdn_blocks`."""
        return pdn_blocks(network)

    @torch.no_grad()
    def set_teacher_statistics_(self, teacher_features: Iterable[torch.Tensor]) -> None:
        """Compute the channels' mean and standard deviation of :meth:`teacher_features` of normal images."""
        mean, std = channel_mean_std(teacher_features)
        self.teacher_mean.copy_(mean)
        self.teacher_std.copy_(std)
        self.teacher_normalized.fill_(value=True)

    def _normalize(self, features: torch.Tensor) -> torch.Tensor:
        return (features - self.teacher_mean) / self.teacher_std


def describe(
    pdn: nn.Module,
    image: torch.Tensor,
    channels: slice = _ALL,
    taps: list[torch.Tensor] | None = None,
) -> torch.Tensor:
    """Run a patch description network.

    Args:
        pdn: anomalib's small or medium network, made quantizable.
        image: Images of shape ``(N, 3, H, W)`` in [0, 1].
        channels: Output channels to compute; each loss term uses only one half of the student's.
        taps: Receives the output of every inner convolution after its ReLU.

    Returns:
        Features of shape ``(N, C, h, w)``.
    """
    *inner, last = quantizable_layers(pdn).values()
    pools = [
        pdn.get_submodule(name) for name in ("avgpool1", "avgpool2")
    ]  # after the first two convolutions of either size
    x = _channels_last(image)
    for depth, layer in enumerate(inner):
        x = F.relu(layer(x), inplace=True)
        if taps is not None:
            taps.append(x)
        if depth < len(pools):
            x = pools[depth](x)
    return last(x, channels)


def pdn_blocks(pdn: nn.Module) -> list[nn.Sequential]:
    """The blocks of a patch description network for reconstruction: first layer, inner layers, last layer.

    One after another they are :func:`describe`; the layers in them are the network's own.
    """
    (first, conv1), (second, conv2), *others, (last, conv4) = quantizable_layers(pdn).items()
    pool1, pool2 = pdn.get_submodule("avgpool1"), pdn.get_submodule("avgpool2")
    inner = {key: module for name, layer in others for key, module in ((name, layer), (f"relu_{name}", nn.ReLU()))}
    return [
        nn.Sequential(OrderedDict({first: conv1, "relu": nn.ReLU(), "pool": pool1})),
        nn.Sequential(OrderedDict({second: conv2, "relu": nn.ReLU(), "pool": pool2, **inner})),
        nn.Sequential(OrderedDict({last: conv4})),
    ]


class ImageConv2d(QuantConv2d):
    """A network's first convolution, which takes images in [0, 1] and normalises them as ImageNet's.

    Quantization folds the normalisation into weights and bias, so that the input's grid is the image's own 8 bits. An
    image that is padded is padded with the grey that normalisation would turn into 0, rounded to 8 bits.
    """

    bias: nn.Parameter  # every first layer of PDN and autoencoder has one

    def quantize_(self, bits: int, inputs: torch.Tensor | None = None, input_bits: int | None = None) -> None:
        """Fold the normalisation, choose the weights' grid; the input's is ``k / 255``, whatever the rest says."""
        del inputs, input_bits
        if self.bits:
            msg = "the layer is quantized already; a second time would fold the normalisation twice"
            raise ValueError(msg)
        black, slope = self._normalisation()
        self.bias.add_((self.weight * black).sum((1, 2, 3)))
        self.weight.mul_(slope)
        super().quantize_(bits, None)
        self.input_step.fill_(1 / 255)
        self.input_bits = 8

    @torch.no_grad()
    def dequantize_(self) -> None:
        """As in other layers; the image is normalised before the convolution again."""
        super().dequantize_()
        black, slope = self._normalisation()
        self.weight.div_(slope)
        self.bias.sub_((self.weight * black).sum((1, 2, 3)))

    def _normalisation(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What black becomes, -mean / std, and the slope, 1 / std, each of shape ``(1, 3, 1, 1)``."""
        black = imagenet_norm_batch(torch.zeros(1, self.in_channels, 1, 1).to(self.weight))
        return black, imagenet_norm_batch(torch.ones_like(black)) - black

    def quantized_input(self, x: torch.Tensor, scale: torch.Tensor | float = 1.0) -> torch.Tensor:
        """As in other layers, but the image's step is not up for learning."""
        del scale
        return super().quantized_input(x)

    def learned_steps(self) -> list[torch.Tensor]:
        """Only the weights' steps: the image's are given."""
        return [self.weight_step]

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


def _resize(cell_map: torch.Tensor, size: torch.Size) -> torch.Tensor:
    return F.interpolate(cell_map, size=size, mode="bilinear", align_corners=False)


def _channels_last(image: torch.Tensor) -> torch.Tensor:
    return image.contiguous(memory_format=torch.channels_last)


def augment(images: torch.Tensor) -> torch.Tensor:
    """Change brightness, contrast or saturation of each image by a factor from U(0.8, 1.2), EfficientAD Algorithm 1."""
    adjustments = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation)
    choices = torch.randint(len(adjustments), (len(images),)).tolist()
    factors = torch.empty(len(images)).uniform_(0.8, 1.2).tolist()
    return torch.stack([adjustments[c](i, f) for c, i, f in zip(choices, images, factors, strict=True)])
