import re

import pytest
import torch

from anomalib_raad.data.drift import differences, ranges


@pytest.fixture
def images() -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [0.25 + 0.5 * torch.rand(3, 60, 80), 0.3 + 0.5 * torch.rand(3, 90, 80)]


def test_training_images_do_not_differ(images) -> None:
    assert [differences(image, ranges(images)) for image in images] == ["", ""]


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (lambda image: image[:1].expand(3, -1, -1), ["channels"]),
        (lambda image: image[:, :29], ["height"]),
        (lambda image: image.repeat(1, 1, 3), ["width"]),
        (lambda image: image - 0.3, ["brightness"]),
        (lambda image: 0.5 + 0.1 * (image - 0.5), ["contrast"]),
        (lambda image: image / 255, ["brightness", "contrast"]),
        (lambda image: 0.5 + 1.5 * (image[:, :40, :50] - 0.5), []),
    ],
)
def test_what_differs_is_named(images, change, names: list[str]) -> None:
    assert re.findall(r"(\w+) \S+ \(training", differences(change(images[0]), ranges(images))) == names


def test_ranges_are_told(images) -> None:
    assert differences(images[0][:1].expand(3, -1, -1), ranges(images)) == "channels 1 (training: 3 to 3)"


def test_counts_are_told_as_counts() -> None:
    large, small = torch.rand(3, 1234, 40), torch.rand(3, 40, 40)
    assert "height 1234 (training: 40 to 40)" in differences(large, ranges([small]))
