import pytest
import torch
from anomalib.data import ImageBatch, InferenceBatch
from anomalib.post_processing import PostProcessor

from anomalib_raad.post_processing import RaadPostProcessor


def validated(kind: type[PostProcessor], low: float, high: float, threshold: float) -> PostProcessor:
    post_processor = kind()
    for name in ("image", "pixel"):
        getattr(post_processor, f"{name}_min").fill_(low)
        getattr(post_processor, f"{name}_max").fill_(high)
        getattr(post_processor, f"_{name}_threshold").fill_(threshold)
    return post_processor


def processed(post_processor: PostProcessor, scores: list[float]) -> InferenceBatch:
    pred_score = torch.tensor(scores)
    return post_processor(InferenceBatch(pred_score=pred_score, anomaly_map=pred_score.view(-1, 1, 1, 1)))


@pytest.mark.parametrize("threshold", [1.0, 3.0])
def test_normalized_scores(threshold: float) -> None:
    """Threshold 0.5, one range below and above it 1/6 and 5/6."""
    scores = [-1e9, threshold - 4.0, threshold, threshold + 4.0, 1e9]
    done = processed(validated(RaadPostProcessor, -1.0, 3.0, threshold), scores)
    expected = torch.tensor([0, 1 / 6, 0.5, 5 / 6, 1])
    torch.testing.assert_close(done.pred_score, expected)
    torch.testing.assert_close(done.anomaly_map.flatten(), expected)
    assert done.pred_label.tolist() == [False, False, False, True, True]
    assert torch.equal(done.pred_mask.flatten(), done.pred_label)


def test_scores_stay_apart() -> None:
    """Validated on normal images only, anomalib's scores do not."""
    scores = torch.linspace(-8, 8, 200).tolist()
    ours, anomalibs = (
        processed(validated(kind, 0.0, 1.0, 1.0), scores).pred_score for kind in (RaadPostProcessor, PostProcessor)
    )
    assert (ours.diff() > 0).all()
    assert ours.max() < 1
    assert ours.min() > 0
    assert ((anomalibs == 1) | (anomalibs == 0)).sum() > 180


def test_scores_have_the_range_of_the_maps() -> None:
    """The scores of two like images differ by a hundredth of what their maps span."""
    maps = torch.tensor([[0.0, 1.0], [0.2, 1.01]]).view(2, 1, 1, 2)
    batch = ImageBatch(
        image=torch.zeros(2, 3, 1, 2), gt_label=torch.tensor([0, 0]), anomaly_map=maps, pred_score=maps.amax((1, 2, 3))
    )
    post_processor = RaadPostProcessor()
    post_processor.on_validation_batch_end(None, None, batch)
    post_processor.on_validation_epoch_end(None, None)
    # The threshold is the highest normal score. x = -0.01 / 1.01 for the other one.
    x = 0.01 / 1.01
    done = processed(post_processor, [1.0, 1.01])
    torch.testing.assert_close(done.pred_score, torch.tensor([0.5 - x / (1 + 2 * x), 0.5]))


def test_equal_validation_scores_and_none() -> None:
    done = processed(validated(RaadPostProcessor, 0.5, 0.5, 0.5), [0.4, 0.5, 0.6])
    assert done.pred_label.tolist() == [False, False, True]
    assert done.pred_score.isfinite().all()
    torch.testing.assert_close(processed(RaadPostProcessor(), [0.4, 7.0]).pred_score, torch.tensor([0.4, 7.0]))


def test_scores_of_16_bits_stay_apart() -> None:
    scores = torch.linspace(0.1, 8, 100).bfloat16().unique()
    done = validated(RaadPostProcessor, 0.0, 1.0, 1.0)(InferenceBatch(pred_score=scores, anomaly_map=scores))
    assert len(done.pred_score.unique()) == len(scores)
