import itertools

import numpy as np
import pytest
import torch

from anomalib_raad.raad.losses import Losses, augment, hard_feature_loss, squared_difference


def slow_hard_feature_loss(teacher: np.ndarray, student: np.ndarray, p_hard: float) -> float:
    """Algorithm 1, lines 18 to 20, one element after another; the mean over the batch's images."""
    losses = []
    for t, s in zip(teacher, student, strict=True):
        d = [(t[i] - s[i]) ** 2 for i in itertools.product(*map(range, t.shape))]
        d_hard = np.quantile(d, p_hard)
        losses.append(np.mean([x for x in d if x >= d_hard]))
    return float(np.mean(losses))


@pytest.mark.parametrize("p_hard", [0.0, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("shape", [(1, 3, 4, 5), (3, 8, 7, 7)])
def test_hard_feature_loss_equals_the_slow_reference(p_hard: float, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    teacher, student = (torch.randn(shape, generator=generator) for _ in range(2))
    expected = slow_hard_feature_loss(teacher.double().numpy(), student.double().numpy(), p_hard)
    assert hard_feature_loss(teacher, student, p_hard).item() == pytest.approx(expected, rel=1e-5)


def test_hard_feature_loss_takes_1573_elements_of_an_image() -> None:
    """The count that the paper's 0.999 gives on 384 x 64 x 64 elements."""
    teacher = torch.zeros(1, 384, 64, 64)
    student = torch.zeros(1, 384, 64, 64)
    student.view(-1)[:1573] = 1.0
    assert hard_feature_loss(teacher, student).item() == 1.0
    student.view(-1)[1572] = 0.0
    assert hard_feature_loss(teacher, student).item() == pytest.approx(1572 / 1573)


def test_hard_feature_loss_works_beyond_the_limit_of_torch_quantile() -> None:
    size = 2**24 + 1000
    loss = hard_feature_loss(torch.zeros(1, 1, 1, size), torch.ones(1, 1, 1, size))
    assert loss.item() == 1.0


def test_squared_difference_is_float32() -> None:
    a, b = torch.tensor([1.0], dtype=torch.bfloat16), torch.tensor([3.0])
    assert torch.equal(squared_difference(a, b), torch.tensor([4.0]))


def test_augment_changes_one_property_of_each_image_within_its_range() -> None:
    """Brightness scales, contrast and saturation blend with a grey: the mean moves by at most a fifth."""
    torch.manual_seed(0)
    images = 0.25 + 0.5 * torch.rand(16, 3, 8, 8)
    augmented = augment(images)
    assert augmented.shape == images.shape
    assert len({round(float(a.std() / i.std()), 4) for a, i in zip(augmented, images, strict=True)}) > 8
    ratio = augmented.mean((1, 2, 3)) / images.mean((1, 2, 3))
    assert ((ratio > 0.79) & (ratio < 1.21)).all()


def test_weighted_sum_of_the_terms() -> None:
    terms = [torch.tensor(value) for value in (1.0, 2.0, 4.0, 8.0)]
    assert Losses(*terms).weighted((0.5, 0.25, 3.0)) == 0.5 + 0.5 + 12 + 8
    assert Losses(*terms[:3]).weighted((1.0, 1.0, 0.0)) == 3
