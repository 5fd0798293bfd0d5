import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from anomalib_raad.compare.bootstrap import interval, resampled_auroc


def cell(labels: np.ndarray, scores: np.ndarray) -> dict:
    return {"images": [{"label": int(y), "score": float(s)} for y, s in zip(labels, scores, strict=True)]}


@pytest.fixture
def labels() -> np.ndarray:
    return np.repeat([0, 1], [40, 60])


def test_an_auroc_is_scikit_learns_also_with_ties(labels) -> None:
    scores = np.random.default_rng(1).integers(0, 5, 100) + labels
    (values,) = resampled_auroc({"a": [cell(labels, scores)]}, resamples=3).values()
    generator = np.random.default_rng(0)
    for (value,) in values:
        chosen = np.concatenate([generator.choice(np.flatnonzero(labels == y), (labels == y).sum()) for y in (0, 1)])
        assert value == pytest.approx(roc_auc_score(labels[chosen], scores[chosen]))


def test_models_are_compared_on_the_same_images(labels) -> None:
    """A model that is always a bit better differs from another by less than either varies with the images."""
    noise = np.random.default_rng(2).normal(size=100)
    cells = {"better": [cell(labels, noise + 1.1 * labels)], "worse": [cell(labels, noise + labels)]}
    found = resampled_auroc(cells)
    low, high = interval((found["better"] - found["worse"])[:, 0])
    assert 0 < low < high
    assert high - low < 0.5 * np.subtract(*interval(found["better"][:, 0])[::-1])


def test_every_cell_has_a_column(labels) -> None:
    good, bad = cell(labels, labels), cell(labels, 1 - labels)
    found = resampled_auroc({"a": [good, bad, good], "b": [bad]}, resamples=2)
    assert found["a"].tolist() == [[1, 0, 1]] * 2
    assert found["b"].tolist() == [[0]] * 2


def test_few_images_leave_more_open() -> None:
    widths = []
    for each in (10, 1000):
        labels = np.repeat([0, 1], each)
        scores = np.random.default_rng(3).normal(size=2 * each) + labels
        low, high = interval(resampled_auroc({"a": [cell(labels, scores)]}, resamples=200)["a"][:, 0])
        widths.append(high - low)
    assert widths[0] > 5 * widths[1]
