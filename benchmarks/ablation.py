"""What each part of RAAD does to detection: the rows of the paper's Table 3 and Figure 6 on any datamodule.

    python -m benchmarks.ablation measure --data anomalib_raad.Elpv --data.category mono --steps 300
    python -m benchmarks.ablation table

All rows of a data set and seed go on from the same first stage, and none takes more steps than another. Most are tested
after quantization and at the end. HQS takes bits from one of the two inner layers: of the two rows that name one, one
is HQS and the other its random control. The test images are only measured: nothing is chosen by them.
"""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import pandas as pd
from anomalib.callbacks import ModelCheckpoint
from anomalib.data import AnomalibDataModule
from anomalib.engine import Engine
from anomalib.metrics import Evaluator
from jsonargparse import auto_cli
from lightning.pytorch import seed_everything

from anomalib_raad import Raad
from anomalib_raad.compare.scores import SquashingPostProcessor
from anomalib_raad.compare.tables import markdown, mean_and_range
from anomalib_raad.precision import fastest_precision

from .testing import ranking_metrics, set_up_

logger = logging.getLogger(__name__)

RESULTS = Path("results/ablation")
_FIRST = "uniform 8"  # its first stage is everybody's, and the baseline
_LONGER = "longer baseline"


class Row(NamedTuple):
    """Options of Raad, the row and stage whose checkpoint the fit goes on from, if any, and the stages tested."""

    options: dict[str, Any]
    start: tuple[str, str] | None = (_FIRST, "trained")
    tested: tuple[str, ...] = ("quantized", "model")


ROWS = {
    _FIRST: Row({"bits": 8}, start=None, tested=("trained", "quantized", "model")),
    # From the beginning: the first stage that the others share has ended, and its learning rate has decayed.
    _LONGER: Row({"bits": 8}, start=None, tested=("trained",)),
    "uniform 4": Row({"bits": 4, "activation_bits": None}),
    "uniform 3": Row({"bits": 3, "activation_bits": None}),
    "uniform 2": Row({"bits": 2, "activation_bits": None}),
    "HQS": Row({}),
    "HQS, nearest rounding": Row({"reconstruction_iterations": 0}),
    "HQS, activations too": Row({"activation_bits": None}),
    "conv2 4": Row({"bits": {"conv2": 4, "conv3": 8}}),
    "conv3 4": Row({"bits": {"conv2": 8, "conv3": 4}}),
}
"""The rows; the longer baseline spends the steps of fine-tuning on further training."""


def measure(
    data: AnomalibDataModule,
    steps: int,
    seeds: Sequence[int] = (0,),
    rows: Sequence[str] = tuple(ROWS),
    precision: str | None = None,
    calibration_images: int = 128,
    image_size: tuple[int, int] = (256, 256),
    every: int = 1,
    results: Path = RESULTS,
) -> None:
    """Measure every row and write a file for each cell; finished cells are not made again.

    Args:
        data: The data to train and test on.
        steps: Optimizer steps of each row.
        seeds: Seeds of weights and order.
        rows: Names of the rows, see :data:`ROWS`; ``uniform 8`` comes first in any case.
        precision: Lightning's precision; by default the fastest of this processor.
        calibration_images: Raad's option of that name.
        image_size: Height and width that images are resized to.
        every: Test on every n-th test image only.
        results: Folder for the cells and their checkpoints.
    """
    if unknown := set(rows) - set(ROWS):
        msg = f"unknown rows {sorted(unknown)}; the rows are {list(ROWS)}"
        raise ValueError(msg)
    results.mkdir(parents=True, exist_ok=True)
    name = set_up_(data, every)
    pre_processor = Raad.configure_pre_processor(image_size)
    for seed in seeds:
        for row in [_FIRST, *(row for row in rows if row != _FIRST)]:
            path = _cell(results, name, row, seed)
            if path.exists():
                continue
            checkpoint = None
            if start := ROWS[row].start:
                checkpoint = _folder(_cell(results, name, start[0], seed)) / f"{start[1]}.ckpt"
            options = ROWS[row].options | {"calibration_images": calibration_images}
            if row == _LONGER:
                options |= {"train_steps": steps - 1, "finetune_steps": 1}
            seed_everything(seed)
            model = Raad(
                pre_processor=pre_processor,
                post_processor=SquashingPostProcessor(),
                evaluator=Evaluator(test_metrics=ranking_metrics()),
                visualizer=False,
                **options,
            )
            engine = Engine(
                max_steps=steps,
                precision=precision or fastest_precision(),
                accelerator="cpu",
                logger=False,
                default_root_dir=_folder(path),
                callbacks=[ModelCheckpoint(_folder(path), "model", save_top_k=0, save_last=False)],
            )
            engine.fit(model, datamodule=data, ckpt_path=checkpoint)
            cell: dict[str, Any] = {"data": name, "row": row, "seed": seed}
            for stage in reversed(ROWS[row].tested):  # the finished model first: the others overwrite it
                tested = None if stage == "model" else _folder(path) / f"{stage}.ckpt"
                cell[stage] = dict(engine.test(model, datamodule=data, ckpt_path=tested, verbose=False)[0])
            path.write_text(json.dumps(cell))


def _cell(results: Path, data: str, row: str, seed: int) -> Path:
    return results / f"{data}-{row.replace(', ', '-').replace(' ', '_').replace('/', '_')}-{seed}.json"


def _folder(cell: Path) -> Path:
    """Where the checkpoints of a cell are."""
    return cell.parent / "runs" / cell.stem


def table(results: Path = RESULTS, metric: str = "image_AUROC") -> None:
    """Write all cells as CSV; as Markdown each row's mean and range over the seeds, and its lead; and a figure.

    The lead is over the longer baseline: the mean over the cells that both rows have, first over the seeds, then over
    the data sets.

    Args:
        results: Folder with the cells; receives ``ablation.csv``, ``ablation.md`` and ``ablation.png``.
        metric: The metric of the Markdown table and the figure.
    """
    records: list[dict[str, Any]] = []
    for cell in (json.loads(path.read_text()) for path in sorted(results.glob("*.json"))):
        row = cell["row"]
        names = {"trained": "baseline" if row == _FIRST else row, "quantized": row, "model": f"{row}, fine-tuned"}
        key = {"data": cell["data"], "seed": cell["seed"]}
        records += [key | {"row": names[stage]} | cell[stage] for stage in ROWS[row].tested]
    frame = pd.DataFrame(records)
    frame.to_csv(results / "ablation.csv", index=False)
    order = list(dict.fromkeys(["baseline", _LONGER, *frame["row"]]))
    values = frame.pivot_table(index=["data", "seed"], columns="row", values=metric)
    values = values.reindex(columns=order).dropna(axis=1, how="all")
    mean, text = values.groupby("data").mean().T, values.groupby("data").agg(mean_and_range).T
    text["mean"] = mean.mean(axis=1).map("{:.3f}".format)
    if _LONGER in values:
        leads = values.sub(values[_LONGER], axis=0).groupby("data").mean()
        text[f"over the {_LONGER}"] = leads.mean().map("{:+.3f}".format)
    (results / "ablation.md").write_text(markdown(text.reset_index()) + "\n")
    axis = mean.iloc[::-1].plot.barh(figsize=(7, 0.5 * len(mean) + 1))
    axis.set(xlabel=metric, ylabel="", xlim=(max(0.0, float(mean.min().min()) - 0.05), 1.0))
    axis.figure.savefig(results / "ablation.png", dpi=120, bbox_inches="tight")
    plt.close(axis.figure)


if __name__ == "__main__":
    auto_cli([measure, table], as_positional=False)
