"""How fast a teacher is distilled, against the straightforward loop over whole images in fp32.

Both run in one process, step by step in turn, so that whatever else the machine does slows both. The unit is a patch:
one position of the teacher's output with its target.
"""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from anomalib.models.image.efficient_ad.torch_model import SmallPatchDescriptionNetwork
from jsonargparse import auto_cli
from torch.nn import functional as F  # noqa: N812

from anomalib_raad.compare.timing import median_seconds
from anomalib_raad.teacher.backbones import OFFLINE_BACKBONE
from anomalib_raad.teacher.distillation import TEACHER_SIZE, Distillation, PhotoFolder
from anomalib_raad.teacher.features import PatchFeatures
from anomalib_raad.teacher.pdn import LOST_CELLS

_LAYERS = (1, 2, 3)


def main(root: Path, steps: int = 5, output: Path | None = None) -> None:
    """Measure and print the patches a second of both loops.

    Args:
        root: Folder with at least 100 photos.
        steps: Steps of each loop after one that is not counted; the median counts.
        output: JSON file for the figures.
    """
    torch.manual_seed(0)
    loops = {"whole images, fp32": _straightforward(root), "crops, bf16": _ours(root)}
    patches = [next(loop) for loop in loops.values()]
    seconds = median_seconds([partial(next, loop) for loop in loops.values()], steps)
    rates = {name: number / time for name, number, time in zip(loops, patches, seconds, strict=True)}
    straightforward, ours = rates.values()
    result = json.dumps({"patches_per_second": rates, "ratio": ours / straightforward}, indent=1)
    print(result)  # noqa: T201
    if output:
        output.write_text(result)


def _photos(root: Path, batch_size: int, min_area: float) -> Iterator[torch.Tensor]:
    folder = PhotoFolder(root, held_out=1, batch_size=batch_size, min_area=min_area, num_workers=1)
    folder.setup()
    while True:
        yield from folder.train_dataloader()


def _straightforward(root: Path) -> Iterator[int]:
    """EfficientAD's Algorithm 3 as it stands; yields the number of patches of each step."""
    features, teacher = PatchFeatures(OFFLINE_BACKBONE, _LAYERS), SmallPatchDescriptionNetwork(384)
    optimizer = torch.optim.Adam(teacher.parameters(), lr=1e-4, weight_decay=1e-5)
    for photos in _photos(root, batch_size=16, min_area=1.0):
        target = features(photos)[:, :, LOST_CELLS:-LOST_CELLS, LOST_CELLS:-LOST_CELLS]
        predicted = teacher(F.interpolate(photos, size=(TEACHER_SIZE, TEACHER_SIZE), mode="bilinear", antialias=True))
        optimizer.zero_grad()
        F.mse_loss(predicted, target).backward()
        optimizer.step()
        yield target[:, 0].numel()


def _ours(root: Path) -> Iterator[int]:
    """The step of configs/distill_cpu.yaml."""
    model = Distillation(OFFLINE_BACKBONE, _LAYERS, crop_size=128, crops=16, pool_size=256)
    model.feature_std.fill_(1.0)
    without_trainer: Any = model
    without_trainer.log = lambda *_arguments, **_options: None
    optimizer = torch.optim.Adam(model.teacher.parameters(), lr=1e-4, weight_decay=1e-5)
    for photos in _photos(root, batch_size=2, min_area=0.3):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model.training_step(photos, 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield 16 * (128 // 4 - 2 * LOST_CELLS) ** 2


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
