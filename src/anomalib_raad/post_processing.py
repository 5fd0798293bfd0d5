"""Scores between 0 and 1 that keep their order."""

from typing import TypeGuard

import torch
from anomalib.post_processing import PostProcessor
from lightning.pytorch import LightningModule, Trainer
from torch import nn

_LEAST_RANGE = 1e-6


def squash(scores: torch.Tensor) -> torch.Tensor:
    """Map any scores to (0, 1) and keep their order; 0 becomes 0.5.

    In float32, since bfloat16 has only 128 numbers between 0.5 and 1.
    """
    scores = scores.float()
    return 0.5 + 0.5 * scores / (1 + scores.abs())


def gives_verdicts(post_processor: nn.Module | None) -> TypeGuard[PostProcessor]:
    """Whether a model says what is a defect; one without a post-processor, or without thresholding, does not."""
    return isinstance(post_processor, PostProcessor) and post_processor.enable_thresholding


def check_thresholds(post_processor: nn.Module | None) -> None:
    """Look whether a model that gives verdicts can give them.

    Raises:
        ValueError: If there is no threshold.
    """
    if gives_verdicts(post_processor) and not post_processor.image_threshold.isfinite():
        msg = "the model is not finished: it has no thresholds, so every image would be normal. A fit sets them at its "
        msg += "end: take its model.ckpt, resume it with ckpt_path, or run Engine.validate on normal images first"
        raise ValueError(msg)


class RaadPostProcessor(PostProcessor):
    """anomalib's post-processor with a normalisation that does not cut scores off.

    As in anomalib, the threshold ``t`` becomes 0.5. anomalib then gives 0 or 1 to every score that is further from the
    threshold than half of the validation set's range. Where that set holds normal images only, clear and slight defects
    become equal, and every metric that ranks loses. Here only infinity would be 1::

        1/2 + x / (1 + 2 |x|)   with x = (s - t) / (max - min)

    ``min`` and ``max`` are those of the maps' pixels, for scores as well: a score is its map's maximum. anomalib takes
    the range of the scores themselves, and that of a few normal images is so narrow that nearly every score would end
    at 0 or 1, and that a rounding error in the map would be magnified.
    """

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compute thresholds and the one range of maps and scores."""
        super().on_validation_epoch_end(trainer, pl_module)
        if not torch.isnan(self.pixel_min):
            self.image_min.copy_(self.pixel_min)
            self.image_max.copy_(self.pixel_max)

    @staticmethod
    def _normalize(
        preds: torch.Tensor | None,
        norm_min: torch.Tensor,
        norm_max: torch.Tensor,
        threshold: torch.Tensor,
    ) -> torch.Tensor | None:
        """The one place where anomalib normalises scores and maps, in its loops and in exported models."""
        if preds is None:
            return None
        threshold = torch.where(torch.isnan(threshold), (norm_max + norm_min) / 2, threshold)
        x = (preds.float() - threshold) / (norm_max - norm_min).clamp(min=_LEAST_RANGE)
        return torch.where(torch.isnan(norm_min), preds, squash(2 * x))  # NaN: not validated yet
