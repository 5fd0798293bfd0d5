"""Pictures of a finished run, after the paper's Figures 1, 2 and 7: where each stage looks.

Test images are only shown here; they decide nothing.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import matplotlib.pyplot as plt
import numpy as np
import torch
from anomalib.data import AnomalibDataset
from anomalib.loggers.base import ImageLoggerBase
from anomalib.models.components import AnomalibModule
from anomalib.visualization import ImageVisualizer
from lightning.fabric.loggers.logger import Logger
from lightning.pytorch import LightningModule, Trainer
from PIL import Image

from anomalib_raad.fit.trainer import datamodule_of
from anomalib_raad.progress import progress
from anomalib_raad.quantization.layers import quantizable_layers
from anomalib_raad.quantization.recipe import Quantizable

T = TypeVar("T")
_AVERAGED = 16  # at most so many normal and so many anomalous images enter the mean heatmaps
_SHOWN = 3  # anomalous images with a row of their own
_BRIGHTEST = 0.995  # quantile with the brightest colour, so that a single pixel does not darken the others


class FigureVisualizer(ImageVisualizer):
    """anomalib's visualizer, which after the first test of a finished run draws figures of the run as well.

    Args:
        draw: Draws them into a results folder, for a model and test images; the first argument is the folder.
        first: Name of one of the figures; where it is, all have been drawn.
    """

    def __init__(self, draw: Callable[[Path, AnomalibModule, AnomalibDataset], list[Path]], first: str) -> None:
        super().__init__()
        self.draw = draw
        self.first = first

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the figures, if a datamodule has the images."""
        results = Path(trainer.default_root_dir)
        datamodule = datamodule_of(trainer)
        if trainer.is_global_zero and datamodule is not None and not (results / self.first).exists():
            figures = self.draw(results, cast("AnomalibModule", pl_module), datamodule.test_data)
            log_figures(trainer.loggers, figures, pl_module.global_step)


def log_figures(loggers: Sequence[Logger], figures: Sequence[Path], step: int) -> None:
    """Give figures to the loggers that take images, which are anomalib's: TensorBoard, MLflow, W&B, Comet.

    Args:
        loggers: The trainer's loggers.
        figures: PNG files.
        step: Optimizer step.
    """
    for path in figures:
        picture = np.asarray(Image.open(path).convert("RGB"))
        for logger in loggers:
            if isinstance(logger, ImageLoggerBase):
                logger.add_image(picture, name=path.name, global_step=step)


def checkpoint_paths(results: Path, stages: Mapping[str, str]) -> dict[str, Path]:
    """Where the results folder of a run has the checkpoint of each stage, by what the pictures call it."""
    return {title: results / "weights" / "lightning" / f"{name}.ckpt" for name, title in stages.items()}


def draw_complete(stages: Mapping[str, str], results: Path, model: AnomalibModule, data: AnomalibDataset) -> list[Path]:
    """Draw the figures of a run, see :func:`draw_figures`, or none where a stage has no checkpoint."""
    paths = checkpoint_paths(results, stages)
    return draw_figures(results, paths, model, data) if all(path.exists() for path in paths.values()) else []


@torch.no_grad()
def draw_figures(
    results: Path, checkpoints: Mapping[str, Path], model: AnomalibModule, data: AnomalibDataset
) -> list[Path]:
    """Draw the figures of a finished run into its results folder.

    ``stages.png`` has some images, their masks and heatmaps, ``attention.png`` the mean heatmaps of at most 16 normal
    and 16 anomalous images, ``bias.png`` what recalibration divides the two maps by, ``layers.png`` the squared
    difference of teacher and student, averaged over the channels of each layer; all stage by stage. The heatmaps of a
    figure share one scale, on which 0.1 is the 0.995-quantile of held-out normal images. A layer has the same scale in
    all stages.

    Args:
        results: Results folder of the run.
        checkpoints: The checkpoint of each stage, by what the pictures call it.
        model: A model of the run's class, on the device that computes.
        data: Test images.

    Returns:
        Paths of the four figures.
    """
    modules = [type(model).load_from_checkpoint(p, map_location=model.device).eval() for p in checkpoints.values()]
    stages: dict[str, Any] = dict(zip(checkpoints, (module.model for module in modules), strict=True))
    labels = np.asarray(data.samples.label_index)
    examples, means = [], []
    for kind, label, shown in (("anomalous", 1, _SHOWN), ("normal", 0, 1)):
        indices = spread(np.flatnonzero(labels == label).tolist(), _AVERAGED)
        rows = []
        for index in progress(indices, f"Heatmaps of {kind} images"):
            item = data[index]
            image = cast("torch.Tensor", item.image)[None].to(model.device)
            image = modules[0].pre_processor(image) if modules[0].pre_processor else image
            maps = {stage: networks(image).anomaly_map[0, 0] for stage, networks in stages.items()}
            rows.append({"image": image[0]} | ({} if item.gt_mask is None else {"mask": item.gt_mask}) | maps)
        examples += [(kind, row) for row in spread(rows, shown)]
        if rows:
            columns = ["image", *stages]
            mean = {column: torch.stack([row[column] for row in rows]).mean(0) for column in columns}
            means.append((f"mean of {len(rows)} {kind}", mean))
    example = examples[0][1]["image"]
    layers = [(stage, {"image": example} | _layer_differences(net, example[None])) for stage, net in stages.items()]
    biases = [
        (f"{name} map", {stage: net.recalibration.bias[0, number] for stage, net in stages.items()})
        for number, name in enumerate(("student-teacher", "student-autoencoder"))
    ]
    return [
        draw_rows(results / "stages.png", examples, [list(stages)]),
        draw_rows(results / "attention.png", means, [list(stages)]),
        draw_rows(results / "bias.png", biases, [list(stages)]),
        draw_rows(results / "layers.png", layers, [[column] for column in layers[0][1]]),
    ]


def spread(sequence: Sequence[T], number: int) -> list[T]:
    """At most so many elements of a sequence, evenly spread."""
    places = np.linspace(0, len(sequence) - 1, min(number, len(sequence)))
    return [sequence[round(place)] for place in places]


def _layer_differences(model: Quantizable, image: torch.Tensor) -> dict[str, torch.Tensor]:
    names = quantizable_layers(model.teacher)
    pairs = model.aligned_features(image)
    return {name: (t - s).square().mean(1)[0] for name, (t, s) in zip(names, pairs, strict=True)}


def draw_rows(path: Path, rows: Sequence[tuple[str, dict[str, torch.Tensor]]], scales: Sequence[Sequence[str]]) -> Path:
    """Draw rows of pictures; the maps of columns that are named together share a scale."""
    columns = max((list(row) for _, row in rows), key=len)
    limits: dict[str, tuple[float, float]] = {}
    for together in scales:
        values = torch.cat([row[column].flatten() for _, row in rows for column in together]).float().cpu().numpy()
        limits |= dict.fromkeys(together, (values.min(), np.quantile(values, _BRIGHTEST)))
    size = (2.2 * len(columns), 2.2 * len(rows))
    figure, axes = plt.subplots(len(rows), len(columns), figsize=size, layout="constrained", squeeze=False)
    for line, (name, row) in zip(axes, rows, strict=True):
        line[0].set_ylabel(name)
        for axis, column in zip(line, columns, strict=True):
            axis.set(xticks=[], yticks=[])
            if column in row:
                picture = row[column].float().cpu().numpy()
                low, high = limits.get(column, (0, 1))
                picture = picture.transpose(1, 2, 0) if picture.ndim == 3 else picture
                axis.imshow(picture, vmin=low, vmax=high, cmap="inferno")
    for axis, column in zip(axes[0], columns, strict=True):
        axis.set_title(column)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path
