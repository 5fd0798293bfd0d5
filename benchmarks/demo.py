"""Fit the model of an anomalib configuration and show what each stage did to its test results.

    python -m benchmarks.demo --configuration configs/raad_demo.yaml

It is ``anomalib train`` with two more tests: Raad keeps the model as it was before and after quantization beside its
last checkpoint. The test images decide nothing here; they are only measured.
"""

import json
from pathlib import Path
from typing import Any

import yaml
from anomalib.engine import Engine
from jsonargparse import auto_cli
from lightning.pytorch import seed_everything
from rich.console import Console
from rich.table import Table

from anomalib_raad.precision import fastest_precision
from anomalib_raad.raad.schedule import STAGE_CHECKPOINTS
from anomalib_raad.report.stages import checkpoint_paths


def run(configuration: str = "configs/raad_demo.yaml", max_steps: int | None = None) -> Path:
    """Fit, test every stage, print a table and write it as JSON.

    Where the configuration names no precision, it is the fastest of this processor.

    Args:
        configuration: File with ``model``, ``data`` and ``trainer``, as ``anomalib train -c`` takes it.
        max_steps: Optimizer steps, instead of the configuration's.

    Returns:
        The folder with the results.
    """
    overrides: dict[str, Any] = {} if max_steps is None else {"trainer.max_steps": max_steps}
    if "precision" not in yaml.safe_load(Path(configuration).read_text())["trainer"]:
        overrides["trainer.precision"] = fastest_precision()
    seed_everything(0)
    engine, model, datamodule = Engine.from_config(configuration, **overrides)
    engine.fit(model, datamodule=datamodule)
    results = Path(engine.trainer.default_root_dir)
    metrics: dict[str, dict[str, float]] = {}
    for meaning, path in checkpoint_paths(results, STAGE_CHECKPOINTS).items():
        Console().print(f"Test images, {meaning}")
        # Thresholds and score range first: only the finished model's checkpoint has them, and torchmetrics misreads
        # scores that are not normalised to [0, 1].
        engine.validate(model, datamodule=datamodule, ckpt_path=path, verbose=False)
        metrics[meaning] = dict(engine.test(model, datamodule=datamodule, verbose=False)[0])
    report = json.loads((results / "quantization.json").read_text())
    (results / "stages.json").write_text(json.dumps(metrics, indent=2))
    _print(metrics, report, results)
    return results


def _print(metrics: dict[str, dict[str, float]], report: dict[str, Any], results: Path) -> None:
    console = Console()
    sizes = [stage["bytes"] for stage in report["stages"]]
    table = Table("Stage", "Image AUROC", "Size of the weights", title="Raad, stage by stage")
    for (meaning, found), size in zip(metrics.items(), sizes, strict=True):
        table.add_row(meaning, f"{found['image_AUROC']:.4f}", f"{size / 1e6:.1f} MB")
    console.print(table)
    bits = Table("Layer", "HQS score", "Bits", title="Bits of teacher and student (autoencoder: see quantization.json)")
    for layer in report["layers"]:
        network, _, name = layer["layer"].partition(".")
        if network == "student":
            bits.add_row(name, f"{layer['score']:.3f}", str(layer["bits"]))
    console.print(bits)
    console.print(
        f"Heatmaps: {results / 'images'}\nStages: {results / 'stages.png'}\nReport: {results / 'quantization.json'}",
        soft_wrap=True,
    )


if __name__ == "__main__":
    auto_cli(run)
