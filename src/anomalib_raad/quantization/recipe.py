"""Stage 2 as one recipe: score the layers, allot the bits, choose the grids, reconstruct the blocks."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import nn
from tqdm import tqdm

from .layers import quantizable_layers, quantizable_poolings
from .quantizers import BITS, check_bits
from .reconstruction import BlockReport, Reconstruction, reconstruct_
from .scoring import allot_bits, allot_by_budget, layer_scores

K = TypeVar("K")
DEFAULT_AVERAGE_BITS = 7.5
"""The most bits a weight of teacher and student has on average: PDN-S and autoencoder then take less than a quarter of
their bytes in float32. The paper gives no limits for phi, and no fixed ones serve: training and image size change the
scores threefold (docs/measurements.md). What remains is their order."""

_NEAREST = Reconstruction(iterations=0)
_WINDOW = 64  # side of the image windows for reconstruction: PDN-S turns one into 8x8 outputs
_WINDOW_GRID = 4  # windows start where the feature maps of the whole image have a cell
_WINDOWS_PER_IMAGE = 8
_GRID_BATCHES = 32  # of calibration images for the search of the grids: with 64 images they round no better
_SAMPLES_PER_IMAGE = 4096  # activations kept of each layer and image for the search of its grid
_POOLING_BITS = 8  # of what enters a pooling: its mean is rounded once more, to the bits of the next layer's input
_SENSITIVITY_BATCHES = 4  # batches of held-out images; each is run once for every layer and bit-width


class Quantizable(Protocol):
    """What the recipe needs to know of a model."""

    teacher: nn.Module
    student: nn.Module
    ae: nn.Module

    def __call__(self, image: torch.Tensor) -> object:
        """Run all three networks on images."""

    def blocks(self, network: nn.Module) -> Sequence[nn.Module]:
        """The blocks of teacher or student that are reconstructed one after another."""

    def aligned_features(self, image: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Pairs of teacher and student features, layer by layer."""


@dataclass(frozen=True)
class Allocation:
    """Where the bits come from.

    Attributes:
        bits: ``None`` for HQS, a number for the same bits in every inner layer of teacher and student, or bits by layer
            name (``{"conv2": 4}``; HQS decides the others).
        first_last_bits: Bits of the first and last layer of teacher and student, unless ``bits`` names them.
        autoencoder_bits: Bits of the autoencoder's layers: no teacher-student pair exists to score them.
        thresholds: HQS places the scores by these limits of phi, see :func:`~.scoring.phi`. ``None``: by their rank.
        average_bits: With the rank, the most bits a weight of teacher and student may have on average.
        activation_bits: Bits of what enters each layer; ``None``: as many as the layer's weights.
    """

    bits: int | Mapping[str, int] | None = None
    first_last_bits: int = 8
    autoencoder_bits: int = 8
    thresholds: tuple[float, float, float] | None = None
    average_bits: float = DEFAULT_AVERAGE_BITS
    activation_bits: int | None = None

    def __post_init__(self) -> None:
        """Check every number."""
        named = self.bits if isinstance(self.bits, Mapping) else {"bits": self.bits} if self.bits is not None else {}
        numbers = {**named, "first_last_bits": self.first_last_bits, "autoencoder_bits": self.autoencoder_bits}
        if self.activation_bits is not None:
            numbers["activation_bits"] = self.activation_bits
        for name, bits in numbers.items():
            check_bits(name, bits)
        limits = self.thresholds
        if limits is not None and (len(limits) != 3 or not 0 < limits[0] < limits[1] < limits[2] < 1):
            msg = f"hqs_thresholds is {limits!r}; three increasing numbers between 0 and 1 are needed"
            raise ValueError(msg)

    def allot(self, scores: Mapping[str, float], weights: Mapping[str, int]) -> dict[str, int]:
        """Bits of each aligned layer of teacher and student.

        Args:
            scores: Score of each layer by name, from first to last.
            weights: Number of weights of each layer.

        Raises:
            ValueError: If ``bits`` names a layer that does not exist or ``average_bits`` is out of reach.
        """
        names, values = list(scores), list(scores.values())
        if isinstance(self.bits, int):
            chosen = [self.first_last_bits, *[self.bits] * (len(names) - 2), self.first_last_bits]
        elif self.thresholds is not None:
            chosen = allot_bits(values, self.thresholds, self.first_last_bits)
        else:
            sizes = [weights[name] for name in names]
            chosen = allot_by_budget(values, sizes, self.average_bits, self.first_last_bits)
        bits = dict(zip(names, chosen, strict=True))
        if isinstance(self.bits, Mapping):
            if unknown := set(self.bits) - set(names):
                msg = f"bits names the unknown layers {sorted(unknown)}; the layers are {names}"
                raise ValueError(msg)
            bits.update(self.bits)
        return bits


class Outcome(NamedTuple):
    """What :func:`quantize_` found out."""

    scores: dict[str, float]
    """The HQS score of each aligned layer by name."""
    misalignment: dict[str, float]
    """1 - CKA of teacher and student in each aligned layer; decides nothing."""
    blocks: list[BlockReport]
    """What reconstruction did to the blocks of teacher and student."""
    sensitivity: dict[str, dict[int, float]]
    """By layer and bits the mean change of the student-teacher map, relative to its mean, on held-out normal images if
    this layer of both networks alone were quantized; decides nothing."""
    sqnr_db: dict[str, float]
    """Signal-to-quantization-noise ratio of each layer's weights in decibels, by network and layer."""

    def state(self) -> dict[str, Any]:
        """As plain values, for a checkpoint that is read without unpickling objects."""
        return self._asdict() | {"blocks": [block._asdict() for block in self.blocks]}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "Outcome":
        """Undo :meth:`state`; what the checkpoint of an earlier version does not have is empty."""
        blocks = [BlockReport(**block) for block in state["blocks"]]
        return cls(**{"sensitivity": {}, "sqnr_db": {}, **state, "blocks": blocks})


@torch.no_grad()
def quantize_(
    model: Quantizable,
    scoring_images: Iterable[torch.Tensor],
    calibration_images: Iterable[torch.Tensor],
    allocation: Allocation,
    reconstruction: Reconstruction = _NEAREST,
    seed: int = 0,
) -> Outcome:
    """Quantize teacher, student and autoencoder in place.

    Args:
        model: The trained float model in evaluation mode.
        scoring_images: Batches of normal images held out from training, for the scores.
        calibration_images: Batches of normal images: all for reconstruction, the first for the grids of activations.
        allocation: Where the bits come from.
        reconstruction: How the blocks of teacher and student are reconstructed.
        seed: Seed of everything drawn.

    Returns:
        Scores and errors.
    """
    generator = torch.Generator().manual_seed(seed)
    weights = aligned_weights(model)
    held_out = iter(scoring_images)
    some = list(islice(held_out, _SENSITIVITY_BATCHES))
    found = layer_scores(model.aligned_features(images) for images in chain(some, held_out))
    scores, misalignment = (dict(zip(weights, values, strict=True)) for values in found)
    bits = allocation.allot(scores, weights)
    encoder = dict.fromkeys(quantizable_layers(model.ae), allocation.autoencoder_bits)
    plan = {"teacher": bits, "student": bits, "ae": encoder}
    layers = {
        (network, name): layer
        for network in plan
        for name, layer in quantizable_layers(getattr(model, network)).items()
    }
    poolings = {
        (network, name): pooling
        for network in plan
        for name, pooling in quantizable_poolings(getattr(model, network)).items()
    }
    reconstructed = ("teacher", "student") if reconstruction.iterations else ()
    float_blocks = {name: deepcopy(model.blocks(getattr(model, name))) for name in reconstructed}

    windows = []
    with _recorded_inputs({**layers, **poolings}) as recorded:
        for number, images in enumerate(calibration_images):
            if number < _GRID_BATCHES:
                model(images)
            if reconstructed:
                windows.append(_random_windows(images, generator))
    inputs = {place: torch.cat(values) for place, values in recorded.items()}
    sensitivity = _sensitivity(model, list(weights), inputs, some, allocation.activation_bits)
    for (network, name), layer in layers.items():
        layer.quantize_(plan[network][name], inputs[network, name], allocation.activation_bits)
    unrounded = [layer.weight.clone() for layer in layers.values()]
    reports = []
    for name, reference in float_blocks.items():
        blocks = model.blocks(getattr(model, name))
        reports += reconstruct_(name, blocks, reference, torch.cat(windows), reconstruction, generator)
    for place, pooling in poolings.items():  # after reconstruction, which they would only slow down
        pooling.quantize_input_(inputs[place], _POOLING_BITS)
    sqnr_db = {
        ".".join(place): _sqnr_db(weight, layer.quantized_weight())
        for (place, layer), weight in zip(layers.items(), unrounded, strict=True)
    }
    return Outcome(scores, misalignment, reports, sensitivity, sqnr_db)


def _sensitivity(
    model: Quantizable,
    names: Sequence[str],
    inputs: Mapping[tuple[str, str], torch.Tensor],
    images: Sequence[torch.Tensor],
    activation_bits: int | None,
) -> dict[str, dict[int, float]]:
    """By layer and bits how much the student-teacher map moves if only this layer of both networks is quantized."""

    def maps(networks: Quantizable) -> torch.Tensor:
        last = [networks.aligned_features(batch)[-1] for batch in images]
        return torch.cat([(teacher - student).square().mean(1).flatten() for teacher, student in last])

    def move(name: str, bits: int) -> float:
        trial = deepcopy(model)
        for network in ("teacher", "student"):
            layer = quantizable_layers(getattr(trial, network))[name]
            layer.quantize_(bits, inputs[network, name], activation_bits)
        return float((maps(trial) - before).abs().mean() / before.mean())

    before = maps(model)
    bar = tqdm(names, "Sensitivity of the layers", leave=False)
    return {name: {bits: move(name, bits) for bits in BITS} for name in bar}


def _sqnr_db(signal: torch.Tensor, quantized: torch.Tensor) -> float:
    noise = (signal - quantized).square().sum().clamp(min=torch.finfo(signal.dtype).tiny)
    return float(10 * torch.log10(signal.square().sum() / noise))


def aligned_weights(model: Quantizable) -> dict[str, int]:
    """Number of weights of each layer that teacher and student share, in both together, by name."""
    student = quantizable_layers(model.student)
    return {
        name: layer.weight.numel() + student[name].weight.numel()
        for name, layer in quantizable_layers(model.teacher).items()
    }


def _random_windows(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Cut windows from images at random, aligned to the cells of the feature maps."""
    height, width = (min(side, _WINDOW) for side in images.shape[-2:])
    windows = []
    for _ in range(_WINDOWS_PER_IMAGE):
        top, left = (
            _WINDOW_GRID * int(torch.randint((side - window) // _WINDOW_GRID + 1, (), generator=generator))
            for side, window in zip(images.shape[-2:], (height, width), strict=True)
        )
        windows.append(images[..., top : top + height, left : left + width])
    return torch.cat(windows)


@contextmanager
def _recorded_inputs(layers: Mapping[K, nn.Module]) -> Iterator[dict[K, list[torch.Tensor]]]:
    """Collect evenly spaced values of what enters each layer while the context is open."""
    inputs: dict[K, list[torch.Tensor]] = {place: [] for place in layers}
    places = {layer: place for place, layer in layers.items()}

    def record(layer: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        values = arguments[0].detach().float().flatten()
        # An odd stride does not fall into step with rows and channels, whose lengths are mostly even.
        stride = values.numel() // (_SAMPLES_PER_IMAGE * len(arguments[0])) | 1
        inputs[places[layer]].append(values[::stride].clone())  # a view would keep all of the values

    hooks = [layer.register_forward_pre_hook(record) for layer in places]
    try:
        yield inputs
    finally:
        for hook in hooks:
            hook.remove()


def average_bits(model: nn.Module) -> float:
    """Bits of a weight of those layers that can be quantized, on average; 32 where there are none."""
    layers = quantizable_layers(model).values()
    weights = sum(layer.weight.numel() for layer in layers)
    return sum(layer.weight.numel() * (layer.bits or 32) for layer in layers) / weights if weights else 32.0


def model_bytes(model: nn.Module) -> int:
    """Bytes of a model's weights: each quantized weight in its bits, everything else in 32."""
    layers = quantizable_layers(model).values()
    weights = sum(layer.weight.numel() * (layer.bits or 32) for layer in layers)
    others = sum(p.numel() for p in model.parameters()) - sum(layer.weight.numel() for layer in layers)
    steps = sum(layer.weight_step.numel() + 2 for layer in layers if layer.bits)
    return (weights + 32 * (others + steps)) // 8
