"""Stage 2 as one recipe: score the layers, allot the bits, choose the grids, reconstruct the blocks."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import nn

from .allocation import Allocation
from .layers import QuantAvgPool2d, QuantConv2d, quantizable_layers, quantizable_poolings
from .reconstruction import BlockNetwork, BlockReport, Reconstruction, reconstruct_
from .scoring import layer_scores

K = TypeVar("K")
Place = tuple[str, str]  # a network of the model and a layer of the network, by name

_NEAREST = Reconstruction(iterations=0)
_WINDOW = 64  # side of the image windows for reconstruction: PDN-S turns one into 8x8 outputs
_WINDOW_GRID = 4  # windows start where the feature maps of the whole image have a cell
_WINDOWS_PER_IMAGE = 8
_SAMPLES_PER_IMAGE = 4096  # activations kept of each layer and image for the search of its grid
_POOLING_BITS = 8  # of what enters a pooling: its mean is rounded once more, to the bits of the next layer's input


class Quantizable(Protocol):
    """What the recipe needs to know of a model."""

    @property
    def teacher(self) -> BlockNetwork:
        """The frozen network."""

    @property
    def student(self) -> BlockNetwork:
        """The network that learns from the teacher; it has the same layers."""

    @property
    def ae(self) -> nn.Module:
        """The autoencoder."""

    def __call__(self, image: torch.Tensor) -> object:
        """Run all three networks on images."""

    def aligned_features(self, image: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Pairs of teacher and student features, layer by layer."""


class Outcome(NamedTuple):
    """What :func:`quantize_` found out."""

    scores: dict[str, float]
    """The HQS score of each aligned layer by name."""
    blocks: list[BlockReport]
    """What reconstruction did to the blocks of teacher and student."""

    def state(self) -> dict[str, Any]:
        """As plain values, for a checkpoint that is read without unpickling objects."""
        return {"scores": self.scores, "blocks": [block._asdict() for block in self.blocks]}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "Outcome":
        """Undo :meth:`state`."""
        return cls(state["scores"], [BlockReport(**block) for block in state["blocks"]])


@torch.no_grad()
def quantize_(
    model: Quantizable,
    scoring_images: Iterable[torch.Tensor],
    calibration_images: Iterable[torch.Tensor],
    allocation: Allocation,
    reconstruction: Reconstruction = _NEAREST,
    seed: int = 0,
    grid_batches: int = 32,
) -> Outcome:
    """Quantize teacher, student and autoencoder in place.

    Args:
        model: The trained float model in evaluation mode.
        scoring_images: Batches of normal images held out from training, for the scores.
        calibration_images: Batches of normal images for reconstruction and for the grids of activations.
        allocation: Where the bits come from.
        reconstruction: How the blocks of teacher and student are reconstructed.
        seed: Seed of everything drawn.
        grid_batches: At most so many of the calibration batches choose the grids of activations.

    Returns:
        Scores and errors.
    """
    generator = torch.Generator().manual_seed(seed)
    weights = aligned_weights(model)
    scores = dict(zip(weights, layer_scores(map(model.aligned_features, scoring_images)), strict=True))
    bits = allocation.allot(scores, weights)
    autoencoder = dict.fromkeys(quantizable_layers(model.ae), allocation.autoencoder_bits)
    plan = {"teacher": bits, "student": bits, "ae": autoencoder}
    layers, poolings = layers_of(model), _poolings_of(model)
    networks = {"teacher": model.teacher, "student": model.student} if reconstruction.iterations else {}
    references = {name: deepcopy(network).blocks() for name, network in networks.items()}

    windows = []
    with recorded_inputs({**layers, **poolings}) as inputs:
        for number, images in enumerate(calibration_images):
            if number < grid_batches:
                model(images)
            if networks:
                windows.append(_random_windows(images, generator))
    values = {place: torch.cat(samples) for place, samples in inputs.items()}
    for (network, name), layer in layers.items():
        layer.quantize_weight_(plan[network][name])
        layer.quantize_input_(values[network, name], allocation.activation_bits or plan[network][name])
    reports = []
    for name, reference in references.items():
        reports += reconstruct_(name, networks[name].blocks(), reference, torch.cat(windows), reconstruction, generator)
    for place, pooling in poolings.items():  # after reconstruction, which they would only slow down
        pooling.quantize_input_(values[place], _POOLING_BITS)
    return Outcome(scores, reports)


def aligned_weights(model: Quantizable) -> dict[str, int]:
    """Number of weights of each layer that teacher and student share, in both together, by name."""
    student = quantizable_layers(model.student)
    return {
        name: layer.weight.numel() + student[name].weight.numel()
        for name, layer in quantizable_layers(model.teacher).items()
    }


def _networks_of(model: Quantizable) -> dict[str, nn.Module]:
    return {"teacher": model.teacher, "student": model.student, "ae": model.ae}


def layers_of(model: Quantizable) -> dict[Place, QuantConv2d]:
    """All convolutions of a model that can be quantized."""
    return {
        (name, layer): conv
        for name, net in _networks_of(model).items()
        for layer, conv in quantizable_layers(net).items()
    }


def _poolings_of(model: Quantizable) -> dict[Place, QuantAvgPool2d]:
    return {
        (name, layer): pool
        for name, net in _networks_of(model).items()
        for layer, pool in quantizable_poolings(net).items()
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
def recorded_inputs(layers: Mapping[K, nn.Module]) -> Iterator[dict[K, list[torch.Tensor]]]:
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
