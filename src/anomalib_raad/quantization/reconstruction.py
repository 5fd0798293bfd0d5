"""Block reconstruction (BRECQ; paper, Eq. 2 and 3): round each weight so that its block's output changes least.

    min over the rounding of weights and the steps of inputs of   E[ dz^T diag(g_1^2, ..., g_a^2) dz ]

``dz`` is what quantization does to the output ``z`` of a block, ``g`` the gradient of the network's log-likelihood by
``z``. The label of a regression is normally distributed about the network's output, ``y ~ N(z_n, I)``, so
``g = J^T eps`` with ``J = d z_n / d z`` and ``eps ~ N(0, I)``. Convolutions see every position alike, so one weight for
each channel, the mean over positions, stands for the diagonal.

The rounding is AdaRound's: ``w = step * clip(floor(w / step) + h(v))`` with ``h`` a sigmoid stretched beyond [0, 1]
and cut off there, and a regulariser that pushes every ``h`` to 0 or 1.
"""

import math
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from tqdm import trange

from .layers import QuantConv2d, computing_by, quantizable_layers

_STRETCH_LOW, _STRETCH_HIGH = -0.1, 1.1
_WARM_UP = 0.2  # share of the iterations before the regulariser sets in
_BETA_START, _BETA_END = 20.0, 2.0
_MEASURED = 256  # windows, at most, of which a block's error is the mean


@dataclass(frozen=True)
class Reconstruction:
    """How blocks are reconstructed.

    Attributes:
        iterations: Optimizer steps a block; 0 keeps nearest rounding.
        batch_size: Windows a step.
        fisher: Weigh the channels of a block's output by Eq. 3; otherwise all alike (what BRECQ's public code runs).
        rounding_lr: Adam's learning rate for the rounding variables.
        step_lr: Adam's learning rate for the input steps, relative to the step.
        regularization: Weight of the regulariser, a mean over weights, against the block's error as a share of that of
            nearest rounding.
    """

    iterations: int = 300
    batch_size: int = 4
    fisher: bool = True
    rounding_lr: float = 6e-2
    step_lr: float = 1e-3
    regularization: float = 300.0


class BlockReport(NamedTuple):
    """What reconstruction did to one block: its weighted output error with nearest rounding and after learning."""

    layers: list[str]
    nearest: float
    learned: float


class _Learner:
    """The learned rounding and input step of one layer; stands in for the layer's forward."""

    def __init__(self, layer: QuantConv2d) -> None:
        self.layer = layer
        position = layer.weight.detach() / layer.weight_step
        self.floor = position.floor()
        share = (position - self.floor - _STRETCH_LOW) / (_STRETCH_HIGH - _STRETCH_LOW)
        self.rounding = torch.logit(share).requires_grad_()  # so that h is the share that floor has cut off
        self.log_step = torch.zeros((), device=share.device, requires_grad=True)

    def h(self) -> torch.Tensor:
        stretched = torch.sigmoid(self.rounding) * (_STRETCH_HIGH - _STRETCH_LOW) + _STRETCH_LOW
        return stretched.clamp(0, 1)

    def regularizer(self, beta: float) -> torch.Tensor:
        """For each weight; zero where ``h`` is 0 or 1."""
        return 1 - (2 * self.h() - 1).abs().pow(beta)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        layer = self.layer
        weight = (self.floor + self.h()).clamp(*layer.weight_range) * layer.weight_step
        return layer.convolve(layer.quantized_input(x, self.log_step.exp()), weight, layer.bias)

    @torch.no_grad()
    def harden_(self) -> None:
        """Write the decision into the layer: its weights are points of its grid from now on."""
        layer = self.layer
        up = (self.h() >= 0.5).to(self.floor)  # rounding up or down
        layer.weight.copy_((self.floor + up).clamp(*layer.weight_range) * layer.weight_step)
        layer.input_step.mul_(self.log_step.exp())


def reconstruct_(
    name: str,
    blocks: Sequence[nn.Module],
    reference: Sequence[nn.Module],
    inputs: torch.Tensor,
    settings: Reconstruction,
    generator: torch.Generator,
) -> list[BlockReport]:
    """Reconstruct the quantized blocks of a network one after another, in place.

    Each block is fed what the quantized blocks before it give and learns what the float network gives at that place.

    Args:
        name: Name of the network, for reports.
        blocks: Quantized blocks; one after another they are the network.
        reference: The same blocks before quantization.
        inputs: Inputs of the network, ``(N, c, h, w)``: random windows of images where the network is local.
        settings: See :class:`Reconstruction`.
        generator: Draws batches and Fisher probes.

    Returns:
        A report for each block that was reconstructed. Blocks of 8 bits keep nearest rounding.
    """
    pairs = list(zip(blocks, reference, strict=True))
    while pairs and not _learns(pairs[-1][0]):  # what comes behind the last block that learns need not be computed
        pairs.pop()
    reports, given, wanted = [], inputs, inputs
    for number, (block, float_block) in enumerate(pairs):
        target = _apply(float_block, wanted)
        if _learns(block):
            layers = {f"{name}.{layer_name}": layer for layer_name, layer in quantizable_layers(block).items()}
            weights = torch.ones(1, target.shape[1], 1, 1, device=target.device)
            if settings.fisher:
                weights = fisher_weights(reference[number + 1 :], target, generator)
            reports.append(_reconstruct_block_(block, layers, given, target, weights, settings, generator))
        if number + 1 < len(pairs):
            given, wanted = _apply(block, given), target
    return reports


def _learns(block: nn.Module) -> bool:
    return any(layer.bits < 8 for layer in quantizable_layers(block).values())


def _reconstruct_block_(
    block: nn.Module,
    layers: dict[str, QuantConv2d],
    given: torch.Tensor,
    target: torch.Tensor,
    weights: torch.Tensor,
    settings: Reconstruction,
    generator: torch.Generator,
) -> BlockReport:
    nearest, before = _error(block, given, target, weights), deepcopy(block.state_dict())
    unit = max(nearest, torch.finfo(target.dtype).tiny)  # a student's errors are a hundredth of its teacher's
    learners = [_Learner(layer) for layer in layers.values()]
    with computing_by(dict(zip(layers.values(), learners, strict=True))), torch.enable_grad():
        optimizer = torch.optim.Adam(
            [
                {"params": [learner.rounding for learner in learners], "lr": settings.rounding_lr},
                {"params": [learner.log_step for learner in learners], "lr": settings.step_lr},
            ]
        )
        bar = trange(settings.iterations, desc=f"Reconstruction of {', '.join(layers)}", leave=False)
        for iteration in bar:
            chosen = torch.randint(len(given), (settings.batch_size,), generator=generator)
            loss = _weighted_error(block(given[chosen]), target[chosen], weights) / unit
            progress = (iteration / settings.iterations - _WARM_UP) / (1 - _WARM_UP)
            if progress >= 0:
                beta = _BETA_START + (_BETA_END - _BETA_START) * progress
                regularizers = torch.cat([learner.regularizer(beta).flatten() for learner in learners])
                loss = loss + settings.regularization * regularizers.mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        for learner in learners:
            learner.harden_()
    learned = _error(block, given, target, weights)
    if not learned < nearest:  # nor if it is not a number
        block.load_state_dict(before)
        learned = nearest
    return BlockReport(list(layers), nearest, learned)


def fisher_weights(
    rest: Sequence[nn.Module],
    outputs: torch.Tensor,
    generator: torch.Generator,
    probes: int = 8,
    windows: int = 64,
) -> torch.Tensor:
    """The diagonal of Eq. 3 for a block's output, a weight for each channel with mean 1, ``(1, C, 1, 1)``.

    Args:
        rest: The float blocks that follow; none for the last block.
        outputs: Outputs of the block, ``(N, C, h, w)``.
        generator: Draws the probes.
        probes: Gradients of random outputs that are averaged.
        windows: At most so many of the outputs serve.
    """
    z = outputs[:windows].detach().clone().requires_grad_()
    with torch.enable_grad():
        y = z
        for block in rest:
            y = block(y)
        squares = torch.zeros(z.shape[1], device=z.device)
        for _ in range(probes):
            eps = torch.randn(y.shape, generator=generator).to(y)
            (gradient,) = torch.autograd.grad(y, z, eps, retain_graph=True)
            squares += gradient.float().square().mean((0, 2, 3))
    return (squares / squares.mean()).view(1, -1, 1, 1)


def _weighted_error(output: torch.Tensor, target: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Eq. 3 summed over channels, averaged over windows and positions."""
    return ((output.float() - target.float()).square() * weights).sum(1).mean()


@torch.no_grad()
def _error(block: nn.Module, given: torch.Tensor, target: torch.Tensor, weights: torch.Tensor) -> float:
    some = slice(None, None, math.ceil(len(given) / _MEASURED))
    return float(_weighted_error(_apply(block, given[some]), target[some], weights))


@torch.no_grad()
def _apply(block: nn.Module, inputs: torch.Tensor, batch_size: int = 8) -> torch.Tensor:
    # Of so few windows the maps fit memory that is reused; of 64 the first block takes more than twice as long.
    return torch.cat([block(batch) for batch in inputs.split(batch_size)])
