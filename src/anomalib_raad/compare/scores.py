"""Scores as torchmetrics can rank them.

torchmetrics takes scores outside [0, 1] for logits and passes them through a sigmoid, *batch by batch*: a batch with
one score above 1 would be ranked against others that were left alone.
"""

from typing import cast

import torch
from anomalib.data import Batch
from anomalib.post_processing import PostProcessor

from anomalib_raad.post_processing import squash


class SquashingPostProcessor(PostProcessor):
    """For measurements: keeps the order of all scores, where anomalib's cuts off what lies beyond the validation set's.

    It needs no thresholds, so it serves models as well that have not been validated; their labels are all normal.
    """

    def post_process_batch(self, batch: Batch) -> None:
        """Squash scores and maps in place, and label the images by the threshold of the validation."""
        scores = cast("torch.Tensor", batch.pred_score)
        batch.pred_label = scores > self.image_threshold
        batch.pred_score = squash(scores)
        batch.anomaly_map = squash(cast("torch.Tensor", batch.anomaly_map))
