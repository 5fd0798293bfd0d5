"""A start that makes few steps enough: some steps of the autoencoder alone, then the student's last layer solved.

The autoencoder needs the most steps and is a twentieth of the work of a step, so it takes some by itself. The student's
inner layers keep their random weights; their outputs ``phi`` on normal images are regressed onto the target ``y`` that
the last layer is to learn:

    W = argmin  sum || y - W [phi, 1] ||^2 + ridge * ||W||^2

so that the losses of Eq. 5 and 6 start where hundreds of gradient steps would end.
"""

import math
from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch.nn import functional as F  # noqa: N812
from tqdm import trange

from .losses import squared_difference
from .quantization.layers import QuantConv2d, quantizable_layers
from .torch_model import RaadModel, describe

AUTOENCODER_STEPS = 100
"""Steps of the autoencoder alone, chosen on cookies and ELPV mono, see docs/measurements.md."""

_RIDGE = 1e-3  # times the mean of the diagonal of the Gram matrix
_SAMPLES = 48_000  # positions in all; a last layer of PDN-S has 4,097 unknowns a channel
_AE_BATCH, _AE_LR, _AE_WARM_UP = 8, 1e-3, 50
_AE_CELLS = 64  # the autoencoder's output has no more cells a side, so neither need its target


@torch.no_grad()
def start_in_closed_form_(
    model: RaadModel,
    images: Sequence[torch.Tensor],
    seed: int,
    autoencoder_steps: int = AUTOENCODER_STEPS,
) -> None:
    """Train the autoencoder for a moment and solve the student's last layer, in place.

    The student's first half is regressed onto the teacher, its second half onto the autoencoder.

    Args:
        model: Model in evaluation mode whose teacher statistics are set.
        images: Normal images, each of shape ``(1, 3, H, W)`` in [0, 1].
        seed: Seed of everything drawn.
        autoencoder_steps: Steps of the autoencoder alone.
    """

    def teacher_and_autoencoder(image: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        return torch.cat([model.normalized_teacher(image), model.autoencode(image, output.shape[-2:])], dim=1)

    train_autoencoder_(model, images, seed, autoencoder_steps)
    *_, last = quantizable_layers(model.student).values()
    generator = torch.Generator().manual_seed(seed)
    solve_last_layer_(last, lambda image: describe(model.student, image), images, teacher_and_autoencoder, generator)


def train_autoencoder_(model: RaadModel, images: Sequence[torch.Tensor], seed: int, steps: int) -> None:
    """Minimise L_tae alone for some steps, without augmentation, so that the teacher sees each image only once.

    Args:
        model: Model in evaluation mode whose teacher statistics are set.
        images: Normal images of one size, each of shape ``(1, 3, H, W)`` in [0, 1].
        seed: Seed of batches and dropout.
        steps: Optimizer steps.
    """
    targets = torch.cat([_autoencoder_target(model, image) for image in images])
    optimizer = torch.optim.Adam(model.ae.parameters(), lr=_AE_LR)
    warm_up = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / _AE_WARM_UP, total_iters=_AE_WARM_UP)
    devices = [targets.device] if targets.is_cuda else []
    model.ae.train()
    with torch.random.fork_rng(devices), torch.enable_grad():
        torch.manual_seed(seed)
        for _ in trange(steps, desc="Autoencoder's first steps", leave=False):
            chosen = torch.randint(len(images), (_AE_BATCH,)).tolist()
            output = model.autoencode(torch.cat([images[i] for i in chosen]), targets.shape[-2:])
            loss = squared_difference(targets[chosen], output).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            warm_up.step()
    model.ae.eval()


@torch.no_grad()
def _autoencoder_target(model: RaadModel, image: torch.Tensor) -> torch.Tensor:
    features = model.normalized_teacher(image)
    size = [min(side, _AE_CELLS) for side in features.shape[-2:]]
    return F.interpolate(features, size=size, mode="bilinear", align_corners=False).to(torch.bfloat16)


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
            with torch.autocast(phi.device.type, enabled=False):  # sums of 16-bit products are not precise enough
                gram, moments = gram + (phi.T @ phi).double(), moments + (phi.T @ y).double()
    finally:
        hook.remove()
    gram.diagonal().add_(_RIDGE * gram.diagonal().mean())
    solution = torch.cholesky_solve(moments, torch.linalg.cholesky(gram)).T.to(layer.weight)
    layer.weight.copy_(solution[:, :-1].reshape_as(layer.weight))
    assert layer.bias is not None  # noqa: S101  # every layer of PDN and autoencoder has one
    layer.bias.copy_(solution[:, -1])
