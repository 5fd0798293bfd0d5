"""The student's last layer: trained within the stages, solved in closed form at their ends."""

import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import nn

from anomalib_raad.progress import progress
from anomalib_raad.quantization.layers import QuantConv2d, quantizable_layers

from .networks import PatchDescriptionNetwork
from .ridge import sample, solve_layer_

SAMPLES = 48_000
"""Positions that solve the layer; of PDN-S it has 4,097 unknowns a channel."""
_EQUALIZED_IMAGES = 32  # whose largest values equalize the channels that enter the layer
_LIVE = 1e-3  # a channel's largest value, as a share of the largest of all; those below stay as they are
_GRID_STRIDE = 31  # every n-th position of what enters the layer serves the search of its grid


class StudentHead(nn.Module):
    """What the student's last layer is in training, kept while its solution stands in its place.

    Training goes on from the layer as it was trained and from the channels as they were: the solution's large weights
    would ask for a learning rate at which nothing is learned. All of it is buffers of final shape.

    Args:
        layer: The student's last layer.
    """

    solved: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor
    input_scale: torch.Tensor
    input_zero_point: torch.Tensor
    equalization: torch.Tensor

    def __init__(self, layer: QuantConv2d) -> None:
        super().__init__()
        self.register_buffer("solved", torch.zeros((), dtype=torch.bool))
        self.register_buffer("weight", torch.zeros_like(layer.weight))
        self.register_buffer("bias", torch.zeros(layer.out_channels))
        self.register_buffer("input_scale", torch.ones(()))
        self.register_buffer("input_zero_point", torch.zeros(()))
        self.register_buffer("equalization", torch.ones(layer.in_channels))

    @torch.no_grad()
    def solve_(
        self,
        student: PatchDescriptionNetwork,
        images: Sequence[torch.Tensor],
        targets: Iterable[torch.Tensor],
        seed: int,
        samples: int = SAMPLES,
    ) -> None:
        """Solve the student's last layer by ridge regression of its features onto what it is to say.

        The errors of a quantized student's inner layers are part of what enters it, so the solution avoids the
        directions in which they are large; before it is solved, the channels that enter it are equalized.

        Args:
            student: The student in evaluation mode.
            images: Normal images, each of shape ``(1, 3, H, W)`` in [0, 1].
            targets: What the student is to say of each, ``(1, 2 C, h, w)``.
            seed: Seed of the positions that are sampled.
            samples: Positions of all images together.
        """
        layer = student.head
        if not self.solved:
            self.weight.copy_(layer.weight)
            self.bias.copy_(layer.bias)
            self.equalization.fill_(1.0)
            self.solved.fill_(value=True)
        if layer.input_quantizer.bits and bool((self.equalization == 1).all()):
            self.input_scale.copy_(layer.input_quantizer.scale)
            self.input_zero_point.copy_(layer.input_quantizer.zero_point)
            self.equalization.copy_(equalize_head_input_(student, images[:_EQUALIZED_IMAGES]))
        generator, each = torch.Generator().manual_seed(seed), math.ceil(samples / len(images))

        def examples() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
            bar = progress(images, "Solving the student's last layer")
            for image, target in zip(bar, targets, strict=True):
                yield sample(layer, student.head_input(image), target, each, generator)

        solve_layer_(layer, examples())

    @torch.no_grad()
    def restore_(self, student: PatchDescriptionNetwork) -> None:
        """Put the layer and the channels back as they were trained; nothing if they are."""
        if not self.solved:
            return
        layer = student.head
        scale_head_input_(student, 1 / self.equalization)
        layer.bias.copy_(self.bias)
        layer.set_weight_(self.weight)
        if layer.input_quantizer.bits:
            layer.input_quantizer.scale.copy_(self.input_scale)
            layer.input_quantizer.zero_point.copy_(self.input_zero_point)
        self.solved.fill_(value=False)


@torch.no_grad()
def equalize_head_input_(student: PatchDescriptionNetwork, images: Iterable[torch.Tensor]) -> torch.Tensor:
    """Bring the channels that enter a quantized last layer to more equal ranges, in place, before it is solved.

    :func:`scale_head_input_` by ``s_c = (max x_c / mean_k max x_k)^0.5``. All channels share one input scale, chosen
    for the strong ones; its rounding is the noise that limits how well the solution predicts, and is less for weak ones
    that are larger. An exponent of 1, which gives all channels one range, detects less.

    Args:
        student: A quantized network in evaluation mode.
        images: Normal images, each of shape ``(1, 3, H, W)`` in [0, 1].

    Returns:
        ``s``, of shape ``(c,)``.
    """
    largest, some = [], []
    for image in images:
        values = student.head_input(image).float().flatten(2)
        largest.append(values.amax(2))
        some.append(values[..., ::_GRID_STRIDE])
    top = torch.cat(largest).amax(0)
    live = top > _LIVE * top.amax()
    scale = torch.where(live, top / top[live].mean(), torch.ones_like(top)).sqrt()
    scale_head_input_(student, scale)
    student.head.quantize_input_(torch.cat(some) / scale[:, None], student.head.input_quantizer.bits)
    return scale


@torch.no_grad()
def scale_head_input_(student: PatchDescriptionNetwork, scale: torch.Tensor) -> None:
    """Divide the channels that enter the last layer by ``scale``, of shape ``(c,)``, and multiply its weights by it.

    The network computes the same (equalization, arXiv 1906.04721), and of the layer before, which has a weight scale
    for each output channel, no weight is rounded anew. The last layer's weight scales are left for what comes next, its
    solution or its trained weights: either chooses its own.
    """
    *_, before, last = quantizable_layers(student).values()
    before.bias.div_(scale)
    for tensor in (before.weight, before.weight_quantizer.scale):
        tensor.div_(scale.view(-1, 1, 1, 1))
    last.weight.mul_(scale.view(1, -1, 1, 1))
