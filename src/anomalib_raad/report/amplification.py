"""Pictures and figures of a run of AAND: synthetic anomalies, and where the gate expects anomalies."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
from anomalib.data import AnomalibDataset, InferenceBatch
from anomalib.models.components import AnomalibModule

from .stages import draw_rows, spread

_SHOWN = 4


class Gated(Protocol):
    """What the pictures need of a model."""

    def gate(self, image: torch.Tensor) -> torch.Tensor:
        """Mean over the levels of w, ``(N, 1, H, W)``."""

    def __call__(self, image: torch.Tensor) -> InferenceBatch:
        """Predict."""


def draw_synthesis(
    path: Path, model: Gated, drawn: Sequence[tuple[torch.Tensor, torch.Tensor]], foregrounds: Sequence[torch.Tensor]
) -> Path:
    """Draw some held-out images with synthetic anomalies, their foreground and mask, and the gate.

    Args:
        path: File of the picture.
        model: The model.
        drawn: Images ``(1, 3, H, W)`` and masks ``(1, 1, H, W)``.
        foregrounds: Of each image, ``(1, 1, H, W)``.
    """
    rows = [
        (
            "synthetic" if mask.any() else "clean",
            {"image": image[0], "foreground": foreground[0, 0], "mask": mask[0, 0], "gate": model.gate(image)[0, 0]},
        )
        for (image, mask), foreground in spread(list(zip(drawn, foregrounds, strict=True)), _SHOWN)
    ]
    return draw_rows(path, rows, [["foreground", "mask", "gate"]])


@torch.no_grad()
def draw_test_images(results: Path, module: AnomalibModule, data: AnomalibDataset) -> list[Path]:
    """Draw some test images of a finished run, their masks, the gate where there is one, and the anomaly map.

    Args:
        results: Results folder of the run; the picture is its ``maps.png``.
        module: The finished model.
        data: Test images, which are only shown.
    """
    labels = np.asarray(data.samples.label_index)
    model, rows = cast("Gated", module.model), []
    for kind, label in (("anomalous", 1), ("normal", 0)):
        for index in spread(np.flatnonzero(labels == label).tolist(), _SHOWN - label):
            item = data[index]
            image = cast("torch.Tensor", item.image)[None].to(module.device)
            image = cast("torch.Tensor", module.pre_processor(image)) if module.pre_processor else image
            row = {"image": image[0]} | ({} if item.gt_mask is None else {"mask": item.gt_mask})
            if (gate := model.gate(image)[0, 0]).any():
                row["gate"] = gate
            rows.append((kind, row | {"anomaly map": cast("torch.Tensor", model(image).anomaly_map)[0, 0]}))
    scaled = [name for name in ("gate", "anomaly map") if name in rows[0][1]]
    return [draw_rows(results / "maps.png", rows, [[name] for name in scaled])]


def write_report(folder: Path, stages: Mapping[str, dict[str, Any]], textures: str | None) -> None:
    """Write ``aand.json``.

    Args:
        folder: Where it goes.
        stages: The figures of each stage.
        textures: Where the synthetic anomalies have theirs from, if there are some.
    """
    folder.mkdir(parents=True, exist_ok=True)
    report = {"textures": textures, "stages": list(stages.values())}
    (folder / "aand.json").write_text(json.dumps(report, indent=2))
