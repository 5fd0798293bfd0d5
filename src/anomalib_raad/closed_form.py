"""A last layer in closed form: ridge regression of what enters it onto what it is to say.

    W = argmin  sum || y - W [phi, 1] ||^2 + ridge * ||W||^2

``phi`` are the patches that the convolution sees at sampled positions of normal images, ``y`` are the targets there.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import cast

import torch
from torch.nn import functional as F  # noqa: N812
from tqdm import tqdm

from .quantization.layers import QuantConv2d, last_layer, quantizable_layers
from .torch_model import RaadModel, describe

_RIDGE = 1e-4  # times the mean of the diagonal of the Gram matrix; chosen on two sets, see docs/training.md
_SAMPLES = 48_000  # positions in all; a last layer of PDN-S has 4,097 unknowns a channel
_ROWS = 512  # of the Gram matrix at a time
_LIVE = 1e-3  # a channel's largest value, as a share of the largest of all; those below stay as they are
_GRID_STRIDE = 31  # every so-manieth position of what enters the last layer serves the search of its grid


def solve_student_(
    model: RaadModel,
    images: Sequence[torch.Tensor],
    teacher_features: Iterable[torch.Tensor],
    seed: int,
) -> None:
    """Solve the student's last layer for teacher (first half) and autoencoder (second half), in place.

    The errors of a quantized model's inner layers are part of ``phi``, so the solution avoids the directions in which
    they are large.

    Args:
        model: Model in evaluation mode whose teacher statistics are set.
        images: Normal images, each of shape ``(1, 3, H, W)`` in [0, 1].
        teacher_features: :meth:`~.RaadModel.teacher_features` of each.
        seed: Seed of the positions that are sampled.
    """
    layer, generator = last_layer(model.student), torch.Generator().manual_seed(seed)
    samples = math.ceil(_SAMPLES / len(images))

    def examples() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        pairs = zip(images, teacher_features, strict=True)
        for image, known in tqdm(pairs, "Solving the student's last layer", total=len(images), leave=False):
            inputs, target = last_input(model.student, image), model.student_target(image, known)
            yield sample(layer, inputs, target, samples, generator)

    solve_layer_(layer, examples())


def last_input(pdn: torch.nn.Module, image: torch.Tensor) -> torch.Tensor:
    """What enters the last layer of a patch description network, see :func:`~.torch_model.describe`."""
    taps: list[torch.Tensor] = []
    describe(pdn, image, slice(1), taps)
    return taps[-1]


@torch.no_grad()
def equalize_last_input_(pdn: torch.nn.Module, images: Iterable[torch.Tensor]) -> torch.Tensor:
    """Bring the channels that enter a quantized last layer to more equal ranges, in place, before it is solved.

    :func:`scale_last_input_` by ``s_c = (max x_c / mean_k max x_k)^0.5``. All channels share one input step, chosen for
    the strong ones; its rounding is the noise that limits how well the solution predicts, and is less for weak ones
    that are larger. An exponent of 1, which gives all channels one range, detects less (docs/measurements.md).

    Args:
        pdn: A patch description network in evaluation mode.
        images: Normal images, each of shape ``(1, 3, H, W)`` in [0, 1].

    Returns:
        ``s``, of shape ``(c,)``.
    """
    largest, some = [], []
    for image in images:
        values = last_input(pdn, image).float().flatten(2)
        largest.append(values.amax(2))
        some.append(values[..., ::_GRID_STRIDE])
    top = torch.cat(largest).amax(0)
    live = top > _LIVE * top.amax()
    scale = torch.where(live, top / top[live].mean(), torch.ones_like(top)).sqrt()
    scale_last_input_(pdn, scale)
    last = last_layer(pdn)
    last.quantize_input_(torch.cat(some) / scale[:, None], last.input_bits)
    return scale


@torch.no_grad()
def scale_last_input_(pdn: torch.nn.Module, scale: torch.Tensor) -> None:
    """Divide the channels that enter a last layer by ``scale``, of shape ``(c,)``, and multiply its weights by it.

    The network computes the same (equalization, arXiv 1906.04721), and of the layer before, which has a weight step for
    each output channel, no weight is rounded anew. The last layer's weight steps are left for what comes next, its
    solution or its trained weights: either chooses its own.
    """
    *_, before, last = quantizable_layers(pdn).values()
    assert before.bias is not None  # noqa: S101  # every layer of a PDN has one
    before.bias.div_(scale)
    for parameter in (before.weight, before.weight_step):
        parameter.div_(scale.view(-1, 1, 1, 1))
    last.weight.mul_(scale.view(1, -1, 1, 1))


@torch.no_grad()
def solve_layer_(layer: QuantConv2d, examples: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Set a convolution to the ridge regression of what it sees onto a target.

    Args:
        layer: The convolution.
        examples: Of each image what :func:`sample` gives: patches ``(n, c)`` and targets ``(n, C)``.
    """
    unknowns = layer.weight[0].numel() + 1
    gram = torch.zeros(unknowns, unknowns, dtype=torch.float64, device=layer.weight.device)
    moments = gram.new_zeros(unknowns, layer.out_channels)
    for seen, target in examples:
        phi = F.pad(seen, (0, 1), value=1.0).double()  # errors of float32, seen below 1e-5, are not far from the ridge
        for start in range(0, unknowns, _ROWS):  # on and below the diagonal, all that the decomposition reads
            rows = slice(start, start + _ROWS)
            gram[rows, : rows.stop] += phi[:, rows].T @ phi[:, : rows.stop]
        moments += phi.T @ target.double()
    mean = gram[-1, :-1] / gram[-1, -1]
    gram.diagonal().add_(_RIDGE * gram.diagonal().mean())
    solution = torch.cholesky_solve(moments, torch.linalg.cholesky(gram)).T
    weight, bias = solution[:, :-1], solution[:, -1]
    layer.set_weight_(weight.reshape_as(layer.weight))
    assert layer.bias is not None  # noqa: S101  # every layer of PDN and autoencoder has one
    # The bias makes up for what the weights' rounding changes on the mean.
    layer.bias.copy_(bias + (weight - layer.quantized_weight().flatten(1)) @ mean)


def sample(
    layer: QuantConv2d,
    inputs: torch.Tensor,
    target: torch.Tensor,
    samples: int,
    generator: torch.Generator,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What a convolution of stride 1 sees of an image at random positions, and the target there.

    Args:
        layer: The convolution.
        inputs: What enters it, ``(1, c, H, W)``.
        target: The target of the output's shape, ``(1, C, h, w)``.
        samples: Positions, at most.
        generator: Draws them.

    Returns:
        Patches, in the order of the weights, and targets: a row for each position.
    """
    rows = target[0].flatten(1).T
    chosen = torch.randperm(len(rows), generator=generator)[:samples].to(target.device)
    return _patches(layer, layer.quantized_input(inputs), chosen), rows[chosen].float()


def _patches(layer: QuantConv2d, inputs: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """What the convolution sees at positions of its output, a row each; ``F.unfold`` would copy all of it."""
    height, width = cast("tuple[int, int]", layer.padding)
    padded = F.pad(inputs[0], (width, width, height, height))
    windows = padded.unfold(1, layer.kernel_size[0], 1).unfold(2, layer.kernel_size[1], 1)
    rows, columns = positions // windows.shape[2], positions % windows.shape[2]
    return windows[:, rows, columns].movedim(1, 0).flatten(1).float()
