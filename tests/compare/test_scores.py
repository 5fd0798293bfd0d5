import torch
from anomalib.data import ImageBatch
from anomalib.metrics import AUROC
from torchmetrics.functional import auroc

from anomalib_raad.compare.scores import SquashingPostProcessor
from anomalib_raad.post_processing import squash

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


def test_squash_tells_bfloat16_scores_apart() -> None:
    scores = torch.tensor([0.01, 0.0101, 3.0, 3.02], dtype=torch.bfloat16)
    assert len(scores.unique()) == len(squash(scores).unique()) == 4


def test_post_processor() -> None:
    batch = ImageBatch(
        image=torch.zeros(2, 3, 4, 4), pred_score=torch.tensor([2.0, 0.1]), anomaly_map=torch.full((2, 1, 4, 4), -3.0)
    )
    SquashingPostProcessor().post_process_batch(batch)
    torch.testing.assert_close(batch.pred_score, squash(torch.tensor([2.0, 0.1])))
    assert torch.all(batch.anomaly_map == 0.125)
    assert not batch.pred_label.any()  # not validated, no threshold


def test_labels_are_by_the_threshold_of_the_validation() -> None:
    post_processor = SquashingPostProcessor()
    post_processor._image_threshold.fill_(0.4)
    batch = ImageBatch(
        image=torch.zeros(2, 3, 4, 4), pred_score=torch.tensor([0.5, 0.3]), anomaly_map=torch.zeros(2, 1, 4, 4)
    )
    post_processor.post_process_batch(batch)
    assert batch.pred_label.tolist() == [True, False]
