"""A picture of some test images of a finished run, which are only shown."""

from collections.abc import Callable
from pathlib import Path
from typing import cast

import numpy as np
import torch
from anomalib.data import AnomalibDataset
from anomalib.models.components import AnomalibModule

from .stages import draw_rows, spread

_SHOWN = 4

Columns = Callable[[AnomalibModule, torch.Tensor], dict[str, torch.Tensor]]
"""Further maps ``(H, W)`` of a model for an image ``(1, 3, H, W)``, by name."""


@torch.no_grad()
def draw_test_images(
    results: Path, module: AnomalibModule, data: AnomalibDataset, columns: Columns | None = None
) -> list[Path]:
    """Draw some test images of a finished run, their masks, and the anomaly map.

    Args:
        results: Results folder of the run; the picture is its ``maps.png``.
        module: The finished model.
        data: Test images.
        columns: What else is drawn of each, if anything.
    """
    labels, rows, further = np.asarray(data.samples.label_index), [], {}
    for kind, label in (("anomalous", 1), ("normal", 0)):
        for index in spread(np.flatnonzero(labels == label).tolist(), _SHOWN - label):
            item = data[index]
            image = cast("torch.Tensor", item.image)[None].to(module.device)
            image = cast("torch.Tensor", module.pre_processor(image)) if module.pre_processor else image
            row = {"image": image[0]} | ({} if item.gt_mask is None else {"mask": item.gt_mask})
            further = columns(module, image) if columns else {}
            rows.append((kind, row | further | {"anomaly map": module.model(image).anomaly_map[0, 0]}))
    return [draw_rows(results / "maps.png", rows, [[name] for name in (*further, "anomaly map")])]
