import torch
from anomalib.data import ImageBatch
from anomalib.metrics import AUROC
from torchmetrics.functional import auroc

from anomalib_raad.benchmarks.scores import SquashingPostProcessor, squash

SCORES = torch.tensor([0.3, 0.9, 1.2, 0.1, 14.0, -0.5, 0.95, 0.2])
LABELS = torch.tensor([0, 1, 1, 0, 1, 0, 1, 0])


def metric_over_batches(scores: torch.Tensor) -> float:
    metric = AUROC(fields=["pred_score", "gt_label"])
    for score, label in zip(scores.split(4), LABELS.split(4), strict=True):
        metric.update(ImageBatch(image=torch.zeros(4, 3, 8, 8), pred_score=score, gt_label=label))
    return float(metric.compute())


def test_scores_are_ranked_over_batches_as_in_one() -> None:
    assert auroc(SCORES, LABELS, "binary") == 1
    raw = torch.tensor([0.3, 0.9, 0.5, 0.1, 14.0, -0.5, 0.95, 0.2])  # one batch within [0, 1], the other not
    assert metric_over_batches(raw) < 1  # what squashing is for
    assert metric_over_batches(squash(raw)) == metric_over_batches(squash(SCORES)) == 1


def test_squash_keeps_the_order() -> None:
    assert torch.equal(squash(SCORES).argsort(), SCORES.argsort())
    assert 0 < squash(SCORES).min() < squash(SCORES).max() < 1


def test_post_processor() -> None:
    batch = ImageBatch(
        image=torch.zeros(2, 3, 4, 4), pred_score=torch.tensor([2.0, 0.1]), anomaly_map=torch.full((2, 1, 4, 4), -3.0)
    )
    SquashingPostProcessor().post_process_batch(batch)
    torch.testing.assert_close(batch.pred_score, squash(torch.tensor([2.0, 0.1])))
    assert torch.all(batch.anomaly_map == 0.125)
