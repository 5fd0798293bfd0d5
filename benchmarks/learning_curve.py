"""Test results of a model while it trains, against its processor time: Raad's first stage and anomalib's EfficientAd.

    python -m benchmarks.learning_curve measure --model Raad --data anomalib_raad.Elpv --steps [0,100,400]
    python -m benchmarks.learning_curve plot

The test images are only measured: nothing is chosen by them. The clock runs from the start of the fit, with everything
a model does before its first step and would do if its training ended here, and stands still while the model is tested.
It counts the seconds that processors spend on the training process: with one thread those of an idle core, whatever
else the machine does. Leave the data loader without workers, whose seconds it would not see.

Where solving the student's last layer would end the training, ``trained_`` are the results without.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeGuard

import matplotlib.pyplot as plt
import pandas as pd
import torch
from anomalib.callbacks import ModelCheckpoint
from anomalib.data import AnomalibDataModule
from anomalib.engine import Engine
from anomalib.models import EfficientAd
from anomalib.models.components import AnomalibModule
from jsonargparse import auto_cli
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import Callback

from anomalib_raad import Raad
from anomalib_raad.compare.scores import SquashingPostProcessor
from anomalib_raad.precision import fastest_precision
from anomalib_raad.raad.autoencoder_start import AUTOENCODER_STEPS
from anomalib_raad.raad.schedule import Schedule

from .testing import ranking_metrics, set_up_

RESULTS = Path("results/learning_curve")


class LearningCurve(Callback):
    """Tests the model when it has taken certain numbers of steps and ends the fit after the last of them.

    Args:
        steps: Numbers of optimizer steps, rising; 0 is the model before its first step.
    """

    def __init__(self, steps: Sequence[int]) -> None:
        self.steps = list(steps)
        self.points: list[dict[str, float]] = []
        self._seconds, self._resumed = 0.0, 0.0

    def setup(self, trainer: Trainer, *_arguments: Any, **_options: Any) -> None:
        """Start the clock."""
        del trainer
        self._resumed = time.process_time()

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, *_arguments: Any) -> None:  # noqa: ANN401
        """Test before the first step."""
        if trainer.global_step == 0 and 0 in self.steps:
            self._test(trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_arguments: Any) -> None:  # noqa: ANN401
        """Test after a step that is asked for."""
        if trainer.global_step in self.steps:
            self._test(trainer, pl_module)
        if trainer.global_step >= self.steps[-1]:
            trainer.should_stop = True

    @torch.no_grad()
    def _test(self, trainer: Any, module: Any) -> None:  # noqa: ANN401
        stopped = time.process_time()
        self._seconds += stopped - self._resumed
        with _evaluating(module), trainer.precision_plugin.forward_context():
            with _ending(module):
                seconds = self._seconds + time.process_time() - stopped
                scores = _test(module, trainer.datamodule)
            if _solves(module):
                as_trained = _test(module, trainer.datamodule)
                scores |= {f"trained_{name}": value for name, value in as_trained.items()}
        self.points.append({"step": trainer.global_step, "seconds": seconds, **scores})
        self._resumed = time.process_time()


@contextmanager
def _evaluating(module: AnomalibModule) -> Iterator[None]:
    module.eval()
    with torch.random.fork_rng():
        yield
    module.train()


@contextmanager
def _ending(module: AnomalibModule) -> Iterator[None]:
    """Raad as it would be if its first stage ended here."""
    if not _solves(module):
        yield
        return
    module.solve_student()
    yield
    module.model.student_head.restore_(module.model.student)


def _solves(module: AnomalibModule) -> TypeGuard[Raad]:
    return isinstance(module, Raad) and module.closed_form


def _test(module: Any, datamodule: Any) -> dict[str, float]:  # noqa: ANN401
    """Normalise the maps on normal images that do not train, as each model does, and test.

    Returns:
        The test's metrics and, for Raad, what :meth:`~.Raad.look_at_held_out` found on the held-out normal images.
    """
    figures: dict[str, float] = {}
    if isinstance(module, Raad):
        figures = module.look_at_held_out()
    else:
        module.model.quantiles.update(module.map_norm_quantiles(datamodule.val_dataloader()))
    metrics, squashing = ranking_metrics(), SquashingPostProcessor()
    for batch in datamodule.test_dataloader():
        batch.image = module.pre_processor.transform(batch.image)
        if batch.gt_mask is not None:
            batch.gt_mask = module.pre_processor.transform(batch.gt_mask)
        predicted = module.validation_step(batch)
        squashing.post_process_batch(predicted)
        for metric in metrics:
            metric.update(predicted)
    return figures | {str(metric.name): float(metric.compute()) for metric in metrics if metric.update_called}


def measure(
    model: Callable[[], AnomalibModule],
    data: AnomalibDataModule,
    steps: Sequence[int],
    name: str,
    seeds: Sequence[int] = (0,),
    precision: str | None = None,
    every: int = 1,
    results: Path = RESULTS,
) -> None:
    """Train a model and write its learning curve, a file for each seed; finished files are not made again.

    Args:
        model: Raad or EfficientAd. Raad trains its first stage only.
        data: The data to train and test on.
        steps: Numbers of optimizer steps after which the model is tested.
        name: Name of the curve.
        seeds: Seeds of weights and order.
        precision: Lightning's precision; by default the fastest of this processor.
        every: Test on every n-th test image only.
        results: Folder for the curves.
    """
    results.mkdir(parents=True, exist_ok=True)
    dataset = set_up_(data, every)
    last = max(AUTOENCODER_STEPS, steps[-1])  # a shorter stage would shorten the autoencoder's start, too
    for seed in seeds:
        path = results / f"{dataset}-{name}-{seed}.json"
        if path.exists():
            continue
        seed_everything(seed)
        curve, module = LearningCurve(steps), model()
        if isinstance(module, Raad):  # the fit ends before stage 3
            module.full_schedule = Schedule(last, 1)
        elif not isinstance(module, EfficientAd):
            msg = f"the model is {type(module).__name__}; learning curves are for Raad and EfficientAd"
            raise TypeError(msg)
        engine = Engine(
            max_steps=last + 1,
            precision=precision or fastest_precision(),
            callbacks=[curve, ModelCheckpoint(save_top_k=0)],  # without one, anomalib adds one that saves
            limit_val_batches=0,
            logger=False,
            accelerator="cpu",
            default_root_dir=results / "runs",
        )
        engine.fit(module, datamodule=data)
        path.write_text(json.dumps({"data": dataset, "name": name, "seed": seed, "points": curve.points}))


def plot(results: Path = RESULTS) -> None:
    """Draw image AUROC against processor seconds, mean and range over seeds, and write the mean points as a table.

    Args:
        results: Folder with the curves; receives ``curves.png`` and ``curves.csv``.
    """
    runs = [json.loads(path.read_text()) for path in sorted(results.glob("*.json"))]
    points = pd.DataFrame(
        [{**{k: run[k] for k in ("data", "name", "seed")}, **p} for run in runs for p in run["points"]]
    )
    sets = sorted(points["data"].unique())
    figure, axes = plt.subplots(1, len(sets), figsize=(4 * len(sets), 3.2), squeeze=False, layout="constrained")
    for axis, data in zip(axes[0], sets, strict=True):
        for name, curve in points[points["data"] == data].groupby("name"):
            by_step = curve.groupby("step")
            seconds, auroc = by_step["seconds"].mean(), by_step["image_AUROC"]
            axis.plot(seconds, auroc.mean(), marker="o", markersize=3, label=name)
            axis.fill_between(seconds, auroc.min(), auroc.max(), alpha=0.2)
        axis.set(title=data, xlabel="processor seconds of training", ylabel="image AUROC", xlim=(0, None))
    axes[0][-1].legend()
    figure.savefig(results / "curves.png", dpi=120)
    plt.close(figure)
    mean = points.groupby(["data", "name", "step"]).mean(numeric_only=True).drop(columns="seed").round(3)
    mean["seeds"] = points.groupby(["data", "name", "step"]).size()
    mean.to_csv(results / "curves.csv")


if __name__ == "__main__":
    auto_cli([measure, plot], as_positional=False)
