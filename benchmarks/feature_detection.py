"""What features tell of anomalous images: by nearest neighbours, and as a teacher whose student is solved at once.

    python -m benchmarks.feature_detection --data anomalib_raad.Elpv --data.category mono --every 3

Nearest neighbours: an image's score is the largest distance of one of its patches to the nearest of a bank of normal
patches, as in PatchCore without its reweighting. Student: a PDN of random inner layers learns the features by ridge
regression of its last one, as Raad starts, and the score is the largest mean squared difference. Every channel is
normalised on normal images. So it compares, within minutes, the teacher with what it was distilled from, and each
feature map with the others: what would a better teacher be worth?
"""

import json
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple, cast

import pandas as pd
import torch
from anomalib.data import AnomalibDataModule
from jsonargparse import auto_cli
from rich.console import Console
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torchmetrics.functional.classification import binary_auroc
from torchvision.transforms.v2.functional import resize
from tqdm import tqdm

from anomalib_raad import RaadModel
from anomalib_raad.compare.tables import markdown
from anomalib_raad.quantization.layers import QuantConv2d
from anomalib_raad.raad.ridge import sample, solve_layer_
from anomalib_raad.teacher.backbones import OFFLINE_BACKBONE
from anomalib_raad.teacher.features import PatchFeatures
from anomalib_raad.teacher.pdn import LOST_CELLS, STRIDE
from anomalib_raad.teacher.statistics import channel_mean_std
from anomalib_raad.teacher.weights import load_teacher_

from .testing import set_up_

Features = Callable[[torch.Tensor], torch.Tensor]  # of images (1, 3, H, W) in [0, 1], with shape (1, C, h, w)
_SIZE = 256  # of the images that teacher and student see
_PATCHES = 200  # of each normal image in the bank
_POSITIONS = 800  # of each normal image, for the last layer of the student


class Candidate(NamedTuple):
    """Features to compare, and the channels that each feature map of the backbone owns."""

    name: str
    features: Features
    maps: dict[str, slice]


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
        train_images: At most so many normal images, evenly spaced, make the bank and train the student.
        every: Test on every n-th test image only.
        output: JSON file for the figures.
    """
    set_up_(data, every)
    number = min(train_images, len(data.train_data))
    normal = [_image(data.train_data[index * len(data.train_data) // number]) for index in range(number)]
    items = [data.test_data[index] for index in range(len(data.test_data))]
    labels = torch.tensor([int(cast("torch.Tensor", item.gt_label)) for item in items])
    test = [_image(item) for item in items]
    rows = []
    for candidate in candidates(layers, channels):
        found = {
            "neighbours": by_neighbours(candidate.features, candidate.maps, normal, test),
            "student": by_student(candidate.features, candidate.maps, normal, test),
        }
        for which in candidate.maps:
            figures = {kind: _auroc(scores[which], labels) for kind, scores in found.items()}
            rows.append({"features": candidate.name, "maps": which, **figures})
    Console().print(markdown(pd.DataFrame(rows).map(lambda x: x if isinstance(x, str) else f"{x:.3f}")), markup=False)
    if output:
        output.write_text(json.dumps(rows, indent=1))


def candidates(layers: Sequence[int], channels: int) -> list[Candidate]:
    """The features that are compared, all on the grid of the student's output."""
    model = RaadModel().eval()
    load_teacher_(model.teacher, "bundled", "small")
    model.teacher.margin = 0  # only patches that lie whole in the image
    targets = PatchFeatures(OFFLINE_BACKBONE, layers, channels)
    info: Any = targets.backbone.feature_info
    shares = _owned(layers, [channels // len(layers)] * len(layers))
    return [
        Candidate("bundled teacher", lambda image: model.teacher(_resized(image)), shares),
        Candidate("its targets", lambda image: _cropped(targets(_resized(image, 2 * _SIZE))), shares),
        Candidate(
            f"backbone at {_SIZE}x{_SIZE}",
            lambda image: _on_the_grid(targets.backbone((_resized(image) - targets.mean) / targets.std)),
            _owned(layers, info.channels()),
        ),
    ]


def _owned(layers: Sequence[int], widths: Sequence[int]) -> dict[str, slice]:
    """Channels of all maps together and of each, if they are concatenated."""
    ends = accumulate(widths)
    each = {f"{layer}": slice(end - width, end) for layer, width, end in zip(layers, widths, ends, strict=True)}
    return {", ".join(each): slice(None)} | each


def _image(item: Any) -> torch.Tensor:  # noqa: ANN401  # one of anomalib's items
    return item.image[None]


def _resized(image: torch.Tensor, size: int = _SIZE) -> torch.Tensor:
    return resize(image, [size, size], antialias=True)


def _cropped(features: torch.Tensor) -> torch.Tensor:
    return features[..., LOST_CELLS:-LOST_CELLS, LOST_CELLS:-LOST_CELLS]


def _on_the_grid(maps: Sequence[torch.Tensor]) -> torch.Tensor:
    """Feature maps averaged down to, or repeated up to, the grid of the student's output."""
    return _cropped(torch.cat([F.adaptive_avg_pool2d(features, _SIZE // STRIDE) for features in maps], dim=1))


def _normalized(features: Features, normal: Sequence[torch.Tensor]) -> Features:
    mean, std = channel_mean_std(features(image) for image in normal)
    return lambda image: (features(image) - mean) / std


def _auroc(scores: torch.Tensor, labels: torch.Tensor) -> float:
    return float(binary_auroc(scores / scores.max(), labels))


@torch.no_grad()
def by_neighbours(
    features: Features, maps: dict[str, slice], normal: Sequence[torch.Tensor], test: Sequence[torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Scores of the test images by nearest neighbours, for the channels of each map.

    Args:
        features: The features.
        maps: Channels by name.
        normal: Normal images, each ``(1, 3, H, W)`` in [0, 1].
        test: Test images.
    """
    described = _normalized(features, normal)
    generator = torch.Generator().manual_seed(0)

    def patches(image: torch.Tensor) -> torch.Tensor:
        return F.avg_pool2d(described(image), 2)[0].flatten(1).T

    bank = []
    for image in tqdm(normal, "Bank", leave=False):
        found = patches(image)
        bank.append(found[torch.randperm(len(found), generator=generator)[:_PATCHES]])
    every = torch.cat(bank)
    scores: dict[str, list[torch.Tensor]] = {name: [] for name in maps}
    for image in tqdm(test, "Nearest neighbours", leave=False):
        found = patches(image)
        for name, channels in maps.items():
            distances = torch.cdist(found[:, channels], every[:, channels])
            scores[name].append(distances.amin(dim=1).max())
    return {name: torch.stack(values) for name, values in scores.items()}


@torch.no_grad()
def by_student(
    features: Features, maps: dict[str, slice], normal: Sequence[torch.Tensor], test: Sequence[torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Scores of the test images by the error of a student solved in closed form; see :func:`by_neighbours`."""
    torch.manual_seed(0)
    described = _normalized(features, normal)
    student = RaadModel().student.eval()
    student.margin = 0
    inner, channels = student.head, described(normal[0]).shape[1]
    last = QuantConv2d.from_conv(nn.Conv2d(inner.in_channels, channels, cast("tuple[int, int]", inner.kernel_size)))
    student.set_submodule("conv4", last)

    def run(image: torch.Tensor) -> torch.Tensor:
        return student(_resized(image))

    generator = torch.Generator().manual_seed(0)
    pairs = ((student.head_input(_resized(image)), described(image)) for image in normal)
    solve_layer_(last, (sample(last, *pair, _POSITIONS, generator) for pair in pairs))
    errors = [(described(image) - run(image)).square()[0] for image in tqdm(test, "Errors", leave=False)]
    return {which: torch.stack([error[owned].mean(dim=0).max() for error in errors]) for which, owned in maps.items()}


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
