"""Closed-form starts: the last layer of a network as the solution of a ridge regression.

The inner layers keep their random weights. Their outputs ``phi`` on normal images are regressed onto the target ``y``
that the network is to learn:

    W = argmin  sum || y - W [phi, 1] ||^2 + ridge * ||W||^2

so that the losses of Eq. 5 and 6 start where hundreds of gradient steps would end.
"""

import math
from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch.nn import functional as F  # noqa: N812

from .quantization.layers import QuantConv2d, quantizable_layers
from .torch_model import RaadModel

_RIDGE = 1e-3  # times the mean of the diagonal of the Gram matrix
_SAMPLES = 48_000  # positions in all; a last layer of PDN-S has 4,097 unknowns a channel


@torch.no_grad()
def start_in_closed_form_(model: RaadModel, images: Sequence[torch.Tensor], seed: int) -> None:
    """Solve the last layers of the autoencoder and of the student, in place.

    The autoencoder and the student's first half are regressed onto the teacher, then the student's second half onto the
    autoencoder.

    Args:
        model: Model in evaluation mode whose teacher statistics are set.
        images: Normal images, each of shape ``(1, 3, H, W)`` in [0, 1].
        seed: Seed of the positions that are sampled.
    """

    def onto_teacher(image: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        target = model.normalized_teacher(image)
        return F.interpolate(target, size=output.shape[-2:], mode="bilinear", align_corners=False)

    def onto_both(image: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        return torch.cat([model.normalized_teacher(image), model.autoencode(image, output.shape[-2:])], dim=1)

    *_, last_of_autoencoder = quantizable_layers(model.ae).values()
    *_, last_of_student = quantizable_layers(model.student).values()
    for layer, target in ((last_of_autoencoder, onto_teacher), (last_of_student, onto_both)):
        solve_last_layer_(layer, model, images, target, torch.Generator().manual_seed(seed))


@torch.no_grad()
def solve_last_layer_(
    layer: QuantConv2d,
    run: Callable[[torch.Tensor], object],
    images: Sequence[torch.Tensor],
    target: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    generator: torch.Generator,
) -> None:
    """Set a convolution of stride 1 to the ridge regression of its input onto a target.

    Args:
        layer: The convolution.
        run: Runs the network that the layer belongs to on an image.
        images: Images of shape ``(1, 3, H, W)``.
        target: From an image and the layer's output ``(1, C, h, w)`` the target of the output's shape.
        generator: Draws the positions of each image that take part.
    """
    samples = math.ceil(_SAMPLES / len(images))
    seen: list[torch.Tensor] = []
    hook = layer.register_forward_hook(lambda _, inputs, output: seen.extend([inputs[0], output]))
    gram = moments = torch.zeros((), dtype=torch.float64, device=layer.weight.device)
    try:
        for image in images:
            seen.clear()
            run(image)
            inputs, output = seen
            patches = F.unfold(inputs.float(), layer.kernel_size, padding=cast("tuple[int, int]", layer.padding))[0].T
            chosen = torch.randperm(len(patches), generator=generator)[:samples].to(patches.device)
            phi = F.pad(patches[chosen], (0, 1), value=1.0)
            y = target(image, output)[0].flatten(1).T[chosen].float()
            gram, moments = gram + (phi.T @ phi).double(), moments + (phi.T @ y).double()
    finally:
        hook.remove()
    gram.diagonal().add_(_RIDGE * gram.diagonal().mean())
    solution = torch.cholesky_solve(moments, torch.linalg.cholesky(gram)).T.to(layer.weight)
    layer.weight.copy_(solution[:, :-1].reshape_as(layer.weight))
    assert layer.bias is not None  # noqa: S101  # every layer of PDN and autoencoder has one
    layer.bias.copy_(solution[:, -1])
