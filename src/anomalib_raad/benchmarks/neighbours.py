"""How well features tell anomalous images by nearest neighbours alone, without any student.

    python -m anomalib_raad.benchmarks.neighbours --data anomalib_raad.Elpv --data.category mono --every 6

An image's score is the largest distance of one of its patches to the nearest of a bank of normal patches, as in
PatchCore without its reweighting. Every channel is normalised on normal images. So it compares what a teacher offers
with what it was distilled from, and each feature map of the backbone with the others, within minutes.
"""

import json
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, cast

import torch
from anomalib.data import AnomalibDataModule
from jsonargparse import auto_cli
from rich.console import Console
from torch.nn import functional as F  # noqa: N812
from torchmetrics.functional.classification import binary_auroc
from torchvision.transforms.v2.functional import resize
from tqdm import tqdm

from anomalib_raad import RaadModel
from anomalib_raad.statistics import channel_mean_std
from anomalib_raad.teacher.features import OFFLINE_BACKBONE, PatchFeatures
from anomalib_raad.teacher.weights import load_teacher_

from .testing import set_up_

Features = Callable[[torch.Tensor], torch.Tensor]  # of images (1, 3, H, W) in [0, 1], with shape (1, C, h, w)
_PATCHES = 200  # of each normal image in the bank
_GRID = 32  # all features are averaged down to, or repeated up to, so many positions a side


def main(
    data: AnomalibDataModule,
    layers: tuple[int, ...] = (1, 2, 3),
    channels: int = 384,
    train_images: int = 60,
    every: int = 1,
    output: Path | None = None,
) -> None:
    """Print the image AUROC of the bundled teacher, of what it learned to predict, and of the backbone itself.

    Args:
        data: The data to take normal and test images from.
        layers: Feature maps of the backbone, equal shares of the teacher's channels.
        channels: Channels of the teacher.
        train_images: At most so many normal images make the bank.
        every: Test on every so-manieth test image only.
        output: JSON file for the figures.
    """
    set_up_(data, every)
    normal = [data.train_data[index].image for index in range(min(train_images, len(data.train_data)))]
    items = (data.test_data[index] for index in range(len(data.test_data)))
    test = [(item.image, int(cast("torch.Tensor", item.gt_label))) for item in items]
    figures = {
        f"{name}, {size}x{size}": auroc(
            features, [_resized(image, size) for image in normal], [(_resized(image, size), y) for image, y in test]
        )
        for name, size, features in tqdm(candidates(layers, channels), "Features")
    }
    for name, value in figures.items():
        Console().print(f"{value:.3f}  {name}")
    if output:
        output.write_text(json.dumps(figures, indent=1))


def candidates(layers: Sequence[int], channels: int) -> list[tuple[str, int, Features]]:
    """Names, image sizes and functions of the features that are compared."""
    model = RaadModel().eval()
    load_teacher_(model.teacher, "bundled", "small")
    targets = PatchFeatures(OFFLINE_BACKBONE, layers, channels)
    info: Any = targets.backbone.feature_info
    shares = [channels // len(layers)] * len(layers)
    every_map = "backbone, map " + ", ".join(map(str, layers))
    found: list[tuple[str, int, Features]] = []
    for name, whole, size, network, widths in (
        ("teacher", "teacher", 256, model.teacher, shares),
        ("targets", "targets", 512, targets, shares),
        ("backbone", every_map, 256, partial(_backbone_maps, targets), info.channels()),
    ):
        found.append((whole, size, partial(_channels, network, slice(None))))
        for layer, width, end in zip(layers, widths, accumulate(widths), strict=True):
            found.append((f"{name}, map {layer}", size, partial(_channels, network, slice(end - width, end))))
    return found


def _channels(network: Features, which: slice, image: torch.Tensor) -> torch.Tensor:
    return _on_the_grid(network(image)[:, which])


def _backbone_maps(targets: PatchFeatures, image: torch.Tensor) -> torch.Tensor:
    maps = targets.backbone((image - targets.mean) / targets.std)
    return torch.cat([_on_the_grid(features) for features in maps], dim=1)


def _on_the_grid(features: torch.Tensor) -> torch.Tensor:
    return F.adaptive_avg_pool2d(features, _GRID)


def _resized(image: torch.Tensor | None, size: int) -> torch.Tensor:
    return resize(cast("torch.Tensor", image), [size, size], antialias=True)[None]


@torch.no_grad()
def auroc(features: Features, normal: Sequence[torch.Tensor], test: Sequence[tuple[torch.Tensor, int]]) -> float:
    """Image AUROC of nearest neighbours.

    Args:
        features: The features.
        normal: Normal images, each ``(1, 3, H, W)``.
        test: Images and their labels, 1 for anomalous.
    """
    mean, std = channel_mean_std(features(image) for image in normal)

    def patches(image: torch.Tensor) -> torch.Tensor:
        return ((features(image) - mean) / std)[0].flatten(1).T

    generator = torch.Generator().manual_seed(0)
    bank = []
    for image in normal:
        found = patches(image)
        bank.append(found[torch.randperm(len(found), generator=generator)[:_PATCHES]])
    every = torch.cat(bank)
    scores = torch.stack([torch.cdist(patches(image), every).min(dim=1).values.max() for image, _ in test])
    return float(binary_auroc(scores / scores.max(), torch.tensor([label for _, label in test])))


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
