import pytest

from anomalib_raad.quantization.allocation import Allocation, allot_by_budget, allot_by_thresholds, phi


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 5}, "bits is 5"),
        ({"bits": {"conv2": 6}}, "conv2 is 6"),
        ({"first_last_bits": 16}, "first_last_bits is 16"),
        ({"activation_bits": 5}, "activation_bits is 5"),
        ({"autoencoder_bits": 1}, "autoencoder_bits is 1"),
        ({"thresholds": (0.5, 0.4, 0.9)}, "three increasing numbers"),
        ({"thresholds": (0.5, 0.6)}, "three increasing numbers"),
    ],
)
def test_allocation__error(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Allocation(**options)


def test_allot__error() -> None:
    with pytest.raises(ValueError, match=r"unknown layers \['conv9'\]"):
        Allocation(bits={"conv9": 4}, average_bits=8).allot({"conv1": 0.5, "conv2": 0.5}, {"conv1": 1, "conv2": 1})


@pytest.mark.parametrize(("score", "bits"), [(0.0, 2), (0.249, 2), (0.25, 3), (0.5, 4), (0.749, 4), (0.75, 8), (1, 8)])
def test_phi(score: float, bits: int) -> None:
    assert phi(score, (0.25, 0.5, 0.75)) == bits


def test_first_and_last_layer_are_fixed() -> None:
    assert allot_by_thresholds([0.1, 0.1, 0.6, 0.1], (0.25, 0.5, 0.75), 8) == [8, 2, 4, 8]


@pytest.mark.parametrize(
    ("average_bits", "bits"),
    [
        (8, [8, 8, 8, 8, 8]),
        (7.9, [8, 8, 4, 8, 8]),  # the lowest score of an inner layer goes first
        (6.0, [8, 8, 4, 4, 8]),  # (2 * 8 + 8 + 2 * 4 + 4 * 4 + 8) / 10 = 5.6
        (5.1, [8, 4, 3, 4, 8]),
        (3.8, [8, 2, 2, 2, 8]),
    ],
)
def test_allot_by_budget(average_bits: float, bits: list[int]) -> None:
    weights, scores = [2, 1, 2, 4, 1], [0.0, 0.9, 0.1, 0.5, 0.0]
    assert allot_by_budget(scores, weights, average_bits, 8) == bits
    assert sum(b * w for b, w in zip(bits, weights, strict=True)) / 10 <= average_bits


def test_allot_by_budget__error() -> None:
    with pytest.raises(ValueError, match=r"first_last_bits 8 at least 5\.00 are needed"):
        allot_by_budget([0.1, 0.1, 0.1], [1, 2, 1], 4.9, 8)
