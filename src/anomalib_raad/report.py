"""What a run did, as JSON and as a picture: every layer's score and bits, every stage's size and attention bias."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from .quantization.layers import quantizable_layers
from .quantization.recipe import Outcome, average_bits
from .torch_model import RaadModel


def write_report(folder: Path, model: RaadModel, outcome: Outcome, stages: Sequence[dict[str, Any]]) -> Path:
    """Write ``quantization.json`` and ``quantization.png``.

    Args:
        folder: Where they go.
        model: The finished model.
        outcome: What quantization found out.
        stages: The figures of each stage.

    Returns:
        Path of the picture.
    """
    networks = {"teacher": "teacher", "student": "student", "ae": "autoencoder"}
    layers: list[dict[str, Any]] = [
        {
            "layer": f"{title}.{name}",
            "bits": layer.bits,
            "input_bits": layer.input_bits,
            "weights": layer.weight.numel(),
            "bytes": layer.weight.numel() * (layer.bits or 32) // 8,
            "mean_weight_step": layer.weight_step.mean().item(),
            "input_step": layer.input_step.item(),
            "weight_sqnr_db": outcome.sqnr_db.get(f"{network}.{name}"),
            "score": outcome.scores.get(name) if network != "ae" else None,
            "misalignment": outcome.misalignment.get(name) if network != "ae" else None,
            "sensitivity": outcome.sensitivity.get(name, {}) if network != "ae" else None,
        }
        for network, title in networks.items()
        for name, layer in quantizable_layers(getattr(model, network)).items()
    ]
    report = {
        "average_bits": average_bits(model),
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
    figure, (bits, scores, moves, stages) = plt.subplots(1, 4, figsize=(14.5, 3), layout="constrained")
    bits.bar(names, [layer["bits"] for layer in scored])
    bits.set(title="bits of teacher and student", yticks=[2, 3, 4, 8])
    for offset, name in ((-0.2, "score"), (0.2, "misalignment")):
        places = [place + offset for place in range(len(names))]
        scores.bar(places, [layer[name] for layer in scored], width=0.4, label=name)
    scores.set(title="HQS score (Eq. 4) and 1 - CKA", xticks=range(len(names)), xticklabels=names)
    scores.legend()
    for layer, name in zip(scored, names, strict=True):
        moves.plot([str(b) for b in layer["sensitivity"]], list(layer["sensitivity"].values()), marker="o", label=name)
    moves.set(title="change of the map by one layer alone", xlabel="bits", yscale="log")
    moves.legend()
    labels = [stage["stage"].replace("_", " ") for stage in report["stages"]]
    for name in ("st", "ae"):
        bias = [stage.get(f"attention_bias_{name}", float("nan")) for stage in report["stages"]]
        stages.plot(labels, bias, marker="o", label=f"map {name}")
    stages.axhline(1, color="grey", linewidth=0.8)
    stages.set(title="attention bias on normal images")
    stages.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
