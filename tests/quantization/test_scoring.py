import pytest
import torch

from anomalib_raad.quantization.scoring import layer_scores


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
    scores = layer_scores(batches)
    assert scores == pytest.approx([slow_score([batch[layer] for batch in batches]) for layer in range(2)])
    assert scores == pytest.approx(layer_scores(reversed(batches)))
    assert all(0 < score < 1 for score in scores)


def test_layer_scores__error() -> None:
    with pytest.raises(ValueError, match="at least one normal image"):
        layer_scores([])
