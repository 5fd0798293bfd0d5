"""What one may want to know of the layers beside their scores; none of it decides anything.

Hidden layers of student and teacher were never trained to agree channel by channel, so Eq. 4 compares arbitrary orders
there. The misalignment does not depend on the order. The sensitivity is what a layer's quantization does to the map,
the signal-to-noise ratio what it does to the weights.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import torch

from anomalib_raad.progress import progress
from anomalib_raad.quantization.layers import quantizable_layers
from anomalib_raad.quantization.recipe import Place, Quantizable, layers_of, recorded_inputs
from anomalib_raad.quantization.uniform import BITS, fake_quantize, search_weight_scale, weight_range

from .quantization import TITLES


class Diagnostics(NamedTuple):
    """One number for each layer."""

    misalignment: dict[str, float]
    """1 - linear CKA of teacher and student (arXiv 1905.00414, Eq. 5): 0 if they differ by a rotation."""
    sensitivity: dict[str, dict[int, float]]
    """By layer and bits the mean change of the student-teacher map, relative to its mean, if this layer of both
    networks alone were quantized."""
    sqnr_db: dict[str, dict[int, float]]
    """By network and layer, and bits, the signal-to-quantization-noise ratio of the weights, rounded to the nearest, in
    decibels."""


@torch.no_grad()
def diagnose(
    model: Quantizable,
    held_out: Sequence[torch.Tensor],
    calibration_images: Iterable[torch.Tensor],
    activation_bits: int | None,
) -> Diagnostics:
    """Look at the layers of a model as stage 1 has left them.

    Args:
        model: The float model in evaluation mode.
        held_out: Batches of normal images held out from training.
        calibration_images: Batches of normal images that choose the grids of activations.
        activation_bits: Bits of what enters a layer; ``None``: as many as its weights.
    """
    layers = layers_of(model)
    with recorded_inputs(layers) as inputs:
        for images in calibration_images:
            model(images)
    values = {place: torch.cat(samples) for place, samples in inputs.items()}
    sqnr_db = {
        f"{TITLES[network]}.{name}": {bits: _sqnr_db(layer.weight, bits) for bits in BITS}
        for (network, name), layer in layers.items()
    }
    return Diagnostics(_misalignment(model, held_out), _sensitivity(model, held_out, values, activation_bits), sqnr_db)


def write_diagnostics(folder: Path, diagnostics: Diagnostics) -> Path:
    """Write ``diagnostics.json`` and ``diagnostics.png`` and return the path of the picture."""
    (folder / "diagnostics.json").write_text(json.dumps(diagnostics._asdict(), indent=2))
    figure, (alignment, moves, noise) = plt.subplots(1, 3, figsize=(11, 3), layout="constrained")
    alignment.bar(list(diagnostics.misalignment), list(diagnostics.misalignment.values()))
    alignment.set(title="1 - CKA of teacher and student")
    for axis, curves in ((moves, diagnostics.sensitivity), (noise, diagnostics.sqnr_db)):
        for name, curve in curves.items():
            if not name.startswith(TITLES["ae"]):
                axis.plot([str(bits) for bits in curve], list(curve.values()), marker="o", label=name)
        axis.set(xlabel="bits")
        axis.legend(fontsize="x-small")
    moves.set(title="change of the map by one layer alone", yscale="log")
    noise.set(title="signal to noise of the weights, dB")
    path = folder / "diagnostics.png"
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def _misalignment(model: Quantizable, held_out: Sequence[torch.Tensor]) -> dict[str, float]:
    names = quantizable_layers(model.teacher)
    alignments = [_Alignment() for _ in names]
    for images in held_out:
        for alignment, pair in zip(alignments, model.aligned_features(images), strict=True):
            alignment.update(*pair)
    return {name: 1 - alignment.cka() for name, alignment in zip(names, alignments, strict=True)}


class _Alignment:
    """Linear CKA of two layers from sums over positions."""

    def __init__(self) -> None:
        self.count, self.sums, self.products = 0, torch.zeros(()), torch.zeros(())

    def update(self, teacher: torch.Tensor, student: torch.Tensor) -> None:
        """Add the positions of a batch of features, each ``(N, c, h, w)``."""
        both = torch.cat([teacher, student], dim=1).movedim(1, -1).flatten(0, -2).float()
        self.count += len(both)
        self.sums = self.sums.to(both.device) + both.sum(0).double()
        with torch.autocast(both.device.type, enabled=False):  # sums of 16-bit products are not precise enough
            self.products = self.products.to(both.device) + (both.T @ both).double()

    def cka(self) -> float:
        """``|| X^T Y ||^2 / (|| X^T X || || Y^T Y ||)`` of the centred features."""
        covariance = self.products - self.sums.outer(self.sums) / self.count
        half = len(covariance) // 2
        xx, xy, yy = covariance[:half, :half], covariance[:half, half:], covariance[half:, half:]
        return float(xy.square().sum() / (xx.norm() * yy.norm()).clamp(min=torch.finfo(torch.float64).tiny))


def _sensitivity(
    model: Quantizable,
    held_out: Sequence[torch.Tensor],
    values: Mapping[Place, torch.Tensor],
    activation_bits: int | None,
) -> dict[str, dict[int, float]]:
    def maps(networks: Quantizable) -> torch.Tensor:
        last = [networks.aligned_features(images)[-1] for images in held_out]
        return torch.cat([(teacher - student).square().mean(1).flatten() for teacher, student in last])

    def move(name: str, bits: int) -> float:
        trial = deepcopy(model)
        for network, net in (("teacher", trial.teacher), ("student", trial.student)):
            layer = quantizable_layers(net)[name]
            layer.quantize_weight_(bits)
            layer.quantize_input_(values[network, name], activation_bits or bits)
        return float((maps(trial) - before).abs().mean() / before.mean())

    before = maps(model)
    bar = progress(quantizable_layers(model.teacher), "Sensitivity of the layers")
    return {name: {bits: move(name, bits) for bits in BITS} for name in bar}


def _sqnr_db(weight: torch.Tensor, bits: int) -> float:
    noise = weight - fake_quantize(weight, search_weight_scale(weight, bits), 0, *weight_range(bits))
    energy = noise.square().sum().clamp(min=torch.finfo(weight.dtype).tiny)
    return float(10 * torch.log10(weight.square().sum() / energy))
