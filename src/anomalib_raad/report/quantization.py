"""What a run did, as JSON and as a picture: every layer's score and bits, every stage's size and attention bias."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from anomalib_raad.quantization.recipe import Outcome, Quantizable, layers_of
from anomalib_raad.quantization.size import average_bits

TITLES = {"teacher": "teacher", "student": "student", "ae": "autoencoder"}
"""What the reports call the networks of a model."""


def write_report(folder: Path, model: Quantizable, outcome: Outcome, stages: Sequence[dict[str, Any]]) -> Path:
    """Write ``quantization.json`` and ``quantization.png``.

    Args:
        folder: Where they go.
        model: The finished model.
        outcome: What quantization found out.
        stages: The figures of each stage.

    Returns:
        Path of the picture.
    """
    convolutions = layers_of(model)
    layers: list[dict[str, Any]] = [
        {
            "layer": f"{TITLES[network]}.{name}",
            "bits": layer.bits,
            "input_bits": layer.input_quantizer.bits,
            "weights": layer.weight.numel(),
            "bytes": layer.weight.numel() * (layer.bits or 32) // 8,
            "mean_weight_scale": layer.weight_quantizer.scale.mean().item(),
            "input_scale": layer.input_quantizer.scale.item(),
            "score": outcome.scores.get(name) if network != "ae" else None,
        }
        for (network, name), layer in convolutions.items()
    ]
    report = {
        "average_bits": average_bits(convolutions.values()),
        "layers": layers,
        "reconstruction": [block._asdict() for block in outcome.blocks],
        "stages": list(stages),
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "quantization.json").write_text(json.dumps(report, indent=2))
    picture = folder / "quantization.png"
    _draw(report, picture)
    return picture


def _draw(report: dict[str, Any], path: Path) -> None:
    scored = [layer for layer in report["layers"] if layer["layer"].startswith("teacher.")]
    names = [layer["layer"].removeprefix("teacher.") for layer in scored]
    figure, (bits, scores, stages) = plt.subplots(1, 3, figsize=(11, 3), layout="constrained")
    bits.bar(names, [layer["bits"] for layer in scored])
    bits.set(title="bits of teacher and student", yticks=[2, 3, 4, 8])
    scores.bar(names, [layer["score"] for layer in scored])
    scores.set(title="HQS score (Eq. 4)")
    labels = [stage["stage"].replace("_", " ") for stage in report["stages"]]
    for number, name in enumerate(("st", "ae")):
        for when, style in (("", "-"), ("_recalibrated", "--")):
            bias = [stage.get(f"attention_bias_{name}{when}", float("nan")) for stage in report["stages"]]
            label = f"map {name}{when.replace('_', ', ')}"
            stages.plot(labels, bias, style, color=f"C{number}", marker="o", label=label)
    stages.axhline(1, color="grey", linewidth=0.8)
    stages.set(title="attention bias on normal images")
    stages.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
