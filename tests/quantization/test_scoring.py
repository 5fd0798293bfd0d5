import pytest
import torch

from anomalib_raad.quantization.scoring import allot_bits, allot_by_budget, layer_scores, phi


def slow_score(batches: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """Eq. 4 image by image, channel by channel, averaged over the images and placed into (0, 1)."""
    values = []
    for teacher, student in batches:
        for t, s in zip(teacher, student, strict=True):
            c, h, w = t.shape
            values.append(sum(float(((t[k] - s[k]) ** 2).sum()) for k in range(c)) / (c * h * w))
    mean = sum(values) / len(values)
    return mean / (1 + mean)


def test_layer_scores_equal_the_slow_reference_and_ignore_the_order_of_images() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 5, 5), (4, 2, 2)]
    batches = [[tuple(torch.randn(2, n, *s, generator=generator)) for s in shapes] for n in (1, 3)]
    scores = layer_scores(batches).literal
    assert scores == pytest.approx([slow_score([batch[layer] for batch in batches]) for layer in range(2)])
    assert scores == pytest.approx(layer_scores(reversed(batches)).literal)
    assert all(0 < score < 1 for score in scores)


def test_layer_scores__error() -> None:
    with pytest.raises(ValueError, match="at least one normal image"):
        layer_scores([])


@pytest.mark.parametrize(("score", "bits"), [(0.0, 2), (0.249, 2), (0.25, 3), (0.5, 4), (0.749, 4), (0.75, 8), (1, 8)])
def test_phi(score: float, bits: int) -> None:
    assert phi(score, (0.25, 0.5, 0.75)) == bits


def test_first_and_last_layer_are_fixed() -> None:
    assert allot_bits([0.1, 0.1, 0.6, 0.1], (0.25, 0.5, 0.75), 8) == [8, 2, 4, 8]


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


def test_misalignment_ignores_rotations_and_equals_the_definition() -> None:
    torch.manual_seed(0)
    teacher, student = torch.randn(2, 3, 5, 4, 4)
    teacher, student = teacher + 0.5 * student, student + 3
    rows = [x.movedim(1, -1).flatten(0, -2).double() for x in (teacher, student)]
    x, y = (row - row.mean(0) for row in rows)
    expected = 1 - (x.T @ y).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm())
    (literal,) = layer_scores([[(teacher, student)]]).misalignment
    assert literal == pytest.approx(float(expected), rel=1e-4)
    rotation = torch.linalg.qr(torch.randn(5, 5))[0]
    rotated = torch.einsum("dc,nchw->ndhw", rotation, student)
    batches = [[(t, s)] for t, s in zip(teacher.split(1), rotated.split(1), strict=True)]
    assert layer_scores(batches).misalignment == pytest.approx([literal], rel=1e-4)
    assert layer_scores([[(student, rotated)]]).misalignment == pytest.approx([0], abs=1e-5)
