"""Pictures and figures of a run of AGPNet: the masks that guide the noise."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.nn import functional as F  # noqa: N812

from .stages import draw_rows


class Masked(Protocol):
    """What the pictures need of a model."""

    def masks(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        """The parts of the mask and the mask, each ``(N, 1, h, w)``, by name."""


@torch.no_grad()
def draw_masks(path: Path, model: Masked, images: Sequence[torch.Tensor]) -> Path:
    """Draw some training images and their masks.

    Args:
        path: File of the picture.
        model: The model.
        images: Each ``(1, 3, H, W)``.
    """
    rows = []
    for number, image in enumerate(images, 1):
        masks = {name: F.interpolate(mask, image.shape[-2:])[0, 0] for name, mask in model.masks(image).items()}
        rows.append((f"image {number}", {"image": image[0]} | masks))
    return draw_rows(path, rows, [[name] for name in rows[0][1] if name != "image"])


def write_report(folder: Path, stages: Mapping[str, dict[str, Any]], encoder: Mapping[str, Any]) -> None:
    """Write ``agpnet.json``.

    Args:
        folder: Where it goes.
        stages: The figures of each stage.
        encoder: What was reconstructed, and what guided the noise.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "agpnet.json").write_text(json.dumps({**encoder, "stages": list(stages.values())}, indent=2))
