"""What each part of RAAD does to detection: the rows of the paper's Table 3 and Figure 6 on any datamodule.

    python -m anomalib_raad.benchmarks.ablation measure --data anomalib_raad.Elpv --data.category mono --steps 300
    python -m anomalib_raad.benchmarks.ablation table

All rows of a data set and seed go on from the same first stage, and none takes more steps than another. Each is tested
after quantization and at the end. The test images are only measured: nothing is chosen by them.
"""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from anomalib.callbacks import ModelCheckpoint
from anomalib.data import AnomalibDataModule
from anomalib.engine import Engine
from anomalib.metrics import Evaluator
from jsonargparse import auto_cli
from lightning.pytorch import seed_everything

from anomalib_raad import Raad

from .scores import SquashingPostProcessor
from .testing import ranking_metrics, set_up_

logger = logging.getLogger(__name__)

RESULTS = Path("results/ablation")
_LONGER = "longer baseline"
ROWS: dict[str, dict[str, Any]] = {
    "uniform 8": {"bits": 8},  # the first: its first stage is everybody's, and the baseline
    _LONGER: {},
    "uniform 4": {"bits": 4},
    "uniform 3": {"bits": 3},
    "uniform 2": {"bits": 2},
    "HQS": {},
    "HQS, nearest rounding": {"reconstruction_iterations": 0},
    "HQS, plain error": {"fisher": False},
    "HQS, student not restored": {"restore_student": False},
}
"""Options of Raad for each row; the longer baseline spends the steps of fine-tuning on further training."""


def measure(
    data: AnomalibDataModule,
    steps: int,
    seeds: Sequence[int] = (0,),
    rows: Sequence[str] = tuple(ROWS),
    precision: str = "bf16-mixed",
    calibration_images: int = 128,
    every: int = 1,
    results: Path = RESULTS,
) -> None:
    """Measure every row and write a file for each cell; finished cells are not made again.

    Args:
        data: The data to train and test on.
        steps: Optimizer steps of each row.
        seeds: Seeds of weights and order.
        rows: Names of the rows, see :data:`ROWS`; ``uniform 8`` comes first in any case.
        precision: Lightning's precision.
        calibration_images: Raad's option of that name.
        every: Test on every so-manieth test image only.
        results: Folder for the cells and their checkpoints.
    """
    if unknown := set(rows) - set(ROWS):
        msg = f"unknown rows {sorted(unknown)}; the rows are {list(ROWS)}"
        raise ValueError(msg)
    results.mkdir(parents=True, exist_ok=True)
    name = set_up_(data, every)
    first = next(iter(ROWS))
    for seed in seeds:
        trained = None
        for row in [first, *(row for row in rows if row != first)]:
            path = results / f"{name}-{row.replace(', ', '-').replace(' ', '_')}-{seed}.json"
            folder = results / "runs" / path.stem
            if not path.exists():
                options = ROWS[row] | {"calibration_images": calibration_images}
                if row == _LONGER:
                    options |= {"train_steps": steps - 1, "finetune_steps": 1}
                seed_everything(seed)
                evaluator, post_processor = Evaluator(test_metrics=ranking_metrics()), SquashingPostProcessor()
                model = Raad(visualizer=False, evaluator=evaluator, post_processor=post_processor, **options)
                scores = _run(model, data, steps, precision, folder, trained)
                path.write_text(json.dumps({"data": name, "row": row, "seed": seed} | scores))
                logger.info("%s: %s", path.stem, scores)
            if row == first:
                trained = folder / "trained.ckpt"


def _run(
    model: Raad,
    data: AnomalibDataModule,
    steps: int,
    precision: str,
    folder: Path,
    trained: Path | None,
) -> dict[str, dict[str, float]]:
    """Fit, from the end of the first stage if that is known, and test the model of each stage."""
    engine = Engine(
        max_steps=steps,
        precision=precision,
        accelerator="cpu",
        logger=False,
        default_root_dir=folder,
        callbacks=[ModelCheckpoint(folder, "model", save_top_k=0, save_last=False)],
    )
    engine.fit(model, datamodule=data, ckpt_path=trained)
    scores = {"model": engine.test(model, datamodule=data, verbose=False)[0]}
    for stage in ("trained", "quantized"):
        scores[stage] = engine.test(model, datamodule=data, ckpt_path=folder / f"{stage}.ckpt", verbose=False)[0]
    return {stage: dict(values) for stage, values in scores.items()}


def table(results: Path = RESULTS, metric: str = "image_AUROC") -> None:
    """Write all cells as CSV, their mean over seeds as Markdown and a figure.

    Args:
        results: Folder with the cells; receives ``ablation.csv``, ``ablation.md`` and ``ablation.png``.
        metric: The metric of the Markdown table and the figure.
    """
    cells = [json.loads(path.read_text()) for path in sorted(results.glob("*.json"))]
    records: list[dict[str, Any]] = []
    for cell in cells:
        key = {"data": cell["data"], "seed": cell["seed"]}
        if cell["row"] == _LONGER:
            records.append(key | {"row": _LONGER} | cell["trained"])
            continue
        if cell["row"] == next(iter(ROWS)):
            records.append(key | {"row": "baseline"} | cell["trained"])
        records.append(key | {"row": cell["row"]} | cell["quantized"])
        records.append(key | {"row": f"{cell['row']}, fine-tuned"} | cell["model"])
    frame = pd.DataFrame(records)
    frame.to_csv(results / "ablation.csv", index=False)
    order = list(dict.fromkeys(["baseline", _LONGER, *frame["row"]]))
    mean = frame.pivot_table(index="row", columns="data", values=metric).reindex(order)
    mean["mean"] = mean.mean(axis=1)
    lines = ["| row | " + " | ".join(map(str, mean.columns)) + " |", "|---" * (len(mean.columns) + 1) + "|"]
    lines += [
        f"| {row} | " + " | ".join(f"{value:.3f}" for value in values) + " |" for row, *values in mean.itertuples()
    ]
    (results / "ablation.md").write_text("\n".join(lines) + "\n")
    axis = mean.drop(columns="mean").iloc[::-1].plot.barh(figsize=(7, 0.5 * len(mean) + 1))
    axis.set(xlabel=metric, ylabel="", xlim=(max(0.0, float(mean.min().min()) - 0.05), 1.0))
    axis.figure.savefig(results / "ablation.png", dpi=120, bbox_inches="tight")
    plt.close(axis.figure)


if __name__ == "__main__":
    auto_cli([measure, table], as_positional=False)
