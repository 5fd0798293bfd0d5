"""A last layer in closed form: ridge regression of what enters it onto what it is to say.

    W = argmin  sum || y - W [phi, 1] ||^2 + ridge * ||W||^2

``phi`` are the patches that the convolution sees at sampled positions of normal images, ``y`` are the targets there.
"""

from collections.abc import Iterable
from typing import cast

import torch
from torch.nn import functional as F  # noqa: N812

from anomalib_raad.quantization.layers import QuantConv2d

RIDGE = 1e-4
"""Times the mean of the diagonal of the Gram matrix; chosen on two sets."""


@torch.no_grad()
def solve_layer_(
    layer: QuantConv2d,
    examples: Iterable[tuple[torch.Tensor, torch.Tensor]],
    rows_at_a_time: int = 512,
) -> None:
    """Set a convolution to the ridge regression of what it sees onto a target.

    Args:
        layer: The convolution.
        examples: Of each image what :func:`sample` gives: patches ``(n, c)`` and targets ``(n, C)``.
        rows_at_a_time: Rows of the Gram matrix that are updated together.
    """
    unknowns = layer.weight[0].numel() + 1
    gram = torch.zeros(unknowns, unknowns, dtype=torch.float64, device=layer.weight.device)
    moments = gram.new_zeros(unknowns, layer.out_channels)
    for seen, target in examples:
        phi = F.pad(seen, (0, 1), value=1.0).double()  # errors of float32, seen below 1e-5, are not far from the ridge
        for start in range(0, unknowns, rows_at_a_time):  # on and below the diagonal, all that the decomposition reads
            rows = slice(start, start + rows_at_a_time)
            gram[rows, : rows.stop] += phi[:, rows].T @ phi[:, : rows.stop]
        moments += phi.T @ target.double()
    mean = gram[-1, :-1] / gram[-1, -1]
    gram.diagonal().add_(RIDGE * gram.diagonal().mean())
    solution = torch.cholesky_solve(moments, torch.linalg.cholesky(gram)).T
    weight, bias = solution[:, :-1], solution[:, -1]
    layer.set_weight_(weight.reshape_as(layer.weight))
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
