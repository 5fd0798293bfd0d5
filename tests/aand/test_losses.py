import math

import pytest
import torch
from anomalib.models.image.reverse_distillation.loss import ReverseDistillationLoss

from anomalib_raad.aand.losses import (
    amplification_loss,
    distances,
    distillation_loss,
    focal_loss,
    hard_distillation_loss,
)

SHAPE = (2, 4, 3, 5)
ALL = torch.ones(2, 1, 3, 5, dtype=torch.bool)


def levels(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 4, 6, 6, generator=generator), torch.randn(2, 8, 3, 3, generator=generator)]


def cells(features: torch.Tensor) -> torch.Tensor:
    return features.permute(0, 2, 3, 1).flatten(0, 2)


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(a @ b / (a.norm() * b.norm()))


@pytest.fixture
def pair() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Features, amplified features and labels."""
    torch.manual_seed(0)
    return torch.randn(SHAPE), torch.randn(SHAPE), (torch.rand(2, 1, 3, 5) < 0.3).float()


def test_focal_loss_equals_a_slow_reference() -> None:
    logits, labels = torch.tensor([-3.0, 0.5, 2.0]), torch.tensor([0.0, 1.0, 0.0])
    expected = 0.0
    for logit, label in zip(logits.tolist(), labels.tolist(), strict=True):
        w = 1 / (1 + math.exp(-logit))
        expected -= 0.8 * (1 - w) ** 2 * label * math.log(w) + 0.2 * w**2 * (1 - label) * math.log(1 - w)
    assert float(focal_loss(logits, labels)) == pytest.approx(expected / 3, rel=1e-5)


def test_focal_loss_of_a_gate_that_is_sure_is_finite() -> None:
    logits = torch.tensor([-200.0, 200.0], requires_grad=True)
    focal_loss(logits, torch.tensor([1.0, 0.0])).backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_amplification_loss_equals_a_slow_reference(pair) -> None:
    features, amplified, labels = pair
    foreground = torch.rand(labels.shape) < 0.7
    anomalous = (labels > 0).flatten().nonzero().flatten().tolist()
    normal = ((labels == 0) & foreground).flatten().nonzero().flatten().tolist()
    before, after = cells(features), cells(amplified)
    terms = [
        max(cosine(after[i], before[j]) - (cosine(before[i], before[j]) - 0.3), 0.0) for i in anomalous for j in normal
    ]
    found = amplification_loss(features, amplified, labels, foreground)
    assert float(found) == pytest.approx(sum(terms) / len(terms), rel=1e-5)


def test_the_hinge_has_the_gradient_of_the_papers_maximum(pair) -> None:
    features, amplified, labels = pair
    amplified.requires_grad_()
    amplification_loss(features, amplified, labels, ALL).backward()
    before = torch.nn.functional.normalize(cells(features), dim=1)
    after = torch.nn.functional.normalize(cells(amplified), dim=1)
    anomalous = (labels > 0).flatten()
    similar = after[anomalous] @ before[~anomalous].T
    reference = before[anomalous] @ before[~anomalous].T - 0.3
    (expected,) = torch.autograd.grad(torch.maximum(similar, reference).mean(), amplified)
    torch.testing.assert_close(amplified.grad, expected)


def test_pairs_that_are_apart_already_have_no_gradient() -> None:
    features = torch.tensor([[1.0, 1.0], [0.0, 0.2]]).view(1, 2, 1, 2)  # a normal and a similar anomalous cell
    amplified = torch.tensor([[1.0, -1.0], [0.0, 0.0]]).view(1, 2, 1, 2).requires_grad_()
    labels = torch.tensor([0.0, 1.0]).view(1, 1, 1, 2)
    loss = amplification_loss(features, amplified, labels, torch.ones(1, 1, 1, 2, dtype=torch.bool))
    loss.backward()
    assert float(loss) == 0
    assert not amplified.grad.any()


@pytest.mark.parametrize("label", [0.0, 1.0])
def test_without_pairs_the_loss_is_an_exact_zero(pair, label: float) -> None:
    features, amplified, labels = pair
    amplified.requires_grad_()
    loss = amplification_loss(features, amplified, torch.full_like(labels, label), ALL)
    loss.backward()
    assert float(loss) == 0
    assert torch.equal(amplified.grad, torch.zeros(SHAPE))


def test_at_most_so_many_pairs(monkeypatch, pair) -> None:
    monkeypatch.setattr("anomalib_raad.aand.losses._MOST_ANOMALOUS", 2)
    monkeypatch.setattr("anomalib_raad.aand.losses._MOST_NORMAL", 3)
    features, amplified, labels = pair
    drawn = set()
    for _ in range(20):
        amplified = amplified.detach().requires_grad_()
        amplification_loss(features, amplified, labels, ALL).backward()
        touched = tuple(cells(amplified.grad).any(1).nonzero().flatten().tolist())
        assert len(touched) <= 2
        drawn.add(touched)
    assert len(drawn) > 1


def test_distances_are_those_of_each_cell() -> None:
    (target, _), (found, _) = levels(0), levels(1)
    expected = 1 - torch.tensor([cosine(t, f) for t, f in zip(cells(target), cells(found), strict=True)])
    torch.testing.assert_close(distances(target, found).flatten(), expected)


def test_distillation_loss_is_anomalibs() -> None:
    targets, found = levels(0), levels(1)
    torch.testing.assert_close(distillation_loss(targets, found), ReverseDistillationLoss()(targets, found))


def test_all_cells_as_hard_ones_are_their_mean() -> None:
    targets, found = levels(0), levels(1)
    expected = sum(distances(t, f).mean() for t, f in zip(targets, found, strict=True))
    torch.testing.assert_close(hard_distillation_loss(targets, found, 1000), expected)


def test_only_the_hardest_cells_of_each_image_count() -> None:
    targets, found = levels(0), levels(1)
    hard = hard_distillation_loss(targets, found, 3)
    expected = sum(
        torch.stack([distances(t, f)[i].flatten().sort().values[-3:] for i in range(2)]).mean()
        for t, f in zip(targets, found, strict=True)
    )
    torch.testing.assert_close(hard, expected)
    easiest = int(distances(targets[0], found[0])[0].flatten().argmin())
    found[0][0, :, easiest // 6, easiest % 6] = targets[0][0, :, easiest // 6, easiest % 6]
    assert torch.equal(hard_distillation_loss(targets, found, 3), hard)
    assert not torch.equal(distillation_loss(targets, found), distillation_loss(targets, levels(1)))
