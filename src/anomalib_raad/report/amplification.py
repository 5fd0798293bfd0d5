"""Pictures and figures of a run of AAND: synthetic anomalies, and where the gate expects anomalies."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from .stages import draw_rows, spread

_SHOWN = 4


class Gated(Protocol):
    """What the pictures need of a model."""

    def gate(self, image: torch.Tensor) -> torch.Tensor:
        """Mean over the levels of w, ``(N, 1, H, W)``."""


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
