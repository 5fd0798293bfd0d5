"""Block reconstruction (BRECQ; paper, Eq. 2 and 3): round each weight so that its block's output changes least.

    min over the rounding of weights and the scales of inputs of   E[ dz^T diag(g_1^2, ..., g_a^2) dz ]

``dz`` is what quantization does to the output ``z`` of a block, ``g`` the gradient of the network's log-likelihood by
``z``. The label of a regression is normally distributed about the network's output, ``y ~ N(z_n, I)``, so
``g = J^T eps`` with ``J = d z_n / d z`` and ``eps ~ N(0, I)``. Convolutions see every position alike, so one weight for
each channel, the mean over positions, stands for the diagonal.

The rounding is AdaRound's: ``w = scale * clip(floor(w / scale) + h(v))`` with ``h`` a sigmoid stretched beyond [0, 1]
and cut off there, and a regulariser that pushes every ``h`` to 0 or 1.
"""

import math
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from anomalib_raad.progress import progress

from .layers import QuantConv2d, other_quantizers, quantizable_layers
from .quantizers import InputQuantizer
from .uniform import fake_quantize, input_range, weight_range

_STRETCH_LOW, _STRETCH_HIGH = -0.1, 1.1
_WARM_UP = 0.2  # share of the iterations before the regulariser sets in
_BETA_START, _BETA_END = 20.0, 2.0
_ALL = slice(None)
_MEASURED = 256  # windows, at most, of which a block's error is the mean


@dataclass(frozen=True)
class Reconstruction:
    """How blocks are reconstructed.

    Attributes:
        iterations: Optimizer steps a block; 0 keeps nearest rounding.
        batch_size: Windows a step.
        rounding_lr: Adam's learning rate for the rounding variables.
        scale_lr: Adam's learning rate for the logarithm of the input scales.
        regularization: Weight of the regulariser, a mean over weights, against the block's error as a share of that of
            nearest rounding.
    """

    iterations: int = 300
    batch_size: int = 4
    rounding_lr: float = 6e-2
    scale_lr: float = 1e-3
    regularization: float = 300.0


class BlockReport(NamedTuple):
    """What reconstruction did to one block: its weighted output error with nearest rounding and after learning."""

    layers: list[str]
    nearest: float
    learned: float


class BlockNetwork(nn.Module):
    """A network that is reconstructed block by block."""

    def blocks(self) -> Sequence[nn.Module]:
        """The blocks, which one after another are the network."""
        raise NotImplementedError


class _LearnedRounding(nn.Module):
    """AdaRound: stands in for a layer's weight quantizer while each weight learns to be rounded up or down."""

    computes_integers = False

    def __init__(self, layer: QuantConv2d) -> None:
        super().__init__()
        self.bits, self.scale = layer.bits, layer.weight_quantizer.scale
        position = layer.weight.detach() / self.scale
        self.floor = position.floor()
        share = (position - self.floor - _STRETCH_LOW) / (_STRETCH_HIGH - _STRETCH_LOW)
        self.logit = nn.Parameter(torch.logit(share))  # so that h is the share that floor has cut off

    def h(self) -> torch.Tensor:
        stretched = torch.sigmoid(self.logit) * (_STRETCH_HIGH - _STRETCH_LOW) + _STRETCH_LOW
        return stretched.clamp(0, 1)

    def regularizer(self, beta: float) -> torch.Tensor:
        """For each weight; zero where ``h`` is 0 or 1."""
        return 1 - (2 * self.h() - 1).abs().pow(beta)

    def forward(self, weight: torch.Tensor, channels: slice = _ALL) -> torch.Tensor:
        """The weights with soft rounding, whatever the layer's own are."""
        del weight
        return self._on_the_grid(self.h())[channels]

    def hard(self) -> torch.Tensor:
        """The weights as they are decided: points of their grid."""
        return self._on_the_grid((self.h() >= 0.5).to(self.floor))

    def _on_the_grid(self, up: torch.Tensor) -> torch.Tensor:
        return (self.floor + up).clamp(*weight_range(self.bits)) * self.scale


class _LearnedScale(nn.Module):
    """Stands in for a layer's input quantizer while its scale is learned as ``scale * exp(log_factor)``."""

    computes_integers = False

    def __init__(self, quantizer: InputQuantizer) -> None:
        super().__init__()
        self.bits, self.start, self.zero_point = quantizer.bits, quantizer.scale, quantizer.zero_point
        self.log_factor = nn.Parameter(torch.zeros_like(quantizer.scale))

    def scale(self) -> torch.Tensor:
        return self.start * self.log_factor.exp()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The values that are seen of an input."""
        return fake_quantize(x, self.scale(), self.zero_point, *input_range(self.bits))


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
    roundings = {layer: _LearnedRounding(layer) for layer in layers.values()}
    scales = {layer: _LearnedScale(layer.input_quantizer) for layer in layers.values() if _learns_scale(layer)}
    stand_ins: dict[nn.Module, dict[str, nn.Module]] = {
        layer: {"weight_quantizer": r} for layer, r in roundings.items()
    }
    for layer, scale in scales.items():
        stand_ins[layer]["input_quantizer"] = scale
    unit = max(nearest, torch.finfo(target.dtype).tiny)  # a student's errors are a hundredth of its teacher's

    def error() -> torch.Tensor:
        chosen = torch.randint(len(given), (settings.batch_size,), generator=generator)
        return _weighted_error(block(given[chosen]), target[chosen], weights) / unit

    with other_quantizers(stand_ins), torch.enable_grad():
        _learn_(list(roundings.values()), list(scales.values()), error, settings, ", ".join(layers))
    with torch.no_grad():
        for layer, rounding in roundings.items():
            layer.weight.copy_(rounding.hard())
        for layer, scale in scales.items():
            layer.input_quantizer.scale.copy_(scale.scale())
    learned = _error(block, given, target, weights)
    if not learned < nearest:  # nor if it is not a number
        block.load_state_dict(before)
        learned = nearest
    return BlockReport(list(layers), nearest, learned)


def _learns_scale(layer: QuantConv2d) -> bool:
    return layer.learns_input_scale and layer.input_quantizer.bits > 0


def _learn_(
    roundings: Sequence[_LearnedRounding],
    scales: Sequence[_LearnedScale],
    error: Callable[[], torch.Tensor],
    settings: Reconstruction,
    names: str,
) -> None:
    """Minimise the block's error, and after a warm-up the regulariser beside it."""
    optimizer = torch.optim.Adam(
        [
            {"params": [rounding.logit for rounding in roundings], "lr": settings.rounding_lr},
            {"params": [scale.log_factor for scale in scales], "lr": settings.scale_lr},
        ]
    )
    for iteration in progress(range(settings.iterations), f"Reconstruction of {names}"):
        loss = error()
        done = (iteration / settings.iterations - _WARM_UP) / (1 - _WARM_UP)
        if done >= 0:
            beta = _BETA_START + (_BETA_END - _BETA_START) * done
            regularizers = torch.cat([rounding.regularizer(beta).flatten() for rounding in roundings])
            loss = loss + settings.regularization * regularizers.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


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
