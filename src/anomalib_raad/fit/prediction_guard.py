"""What stands between images and a verdict: files that cannot be read, unfinished models, broken scores."""

import logging
from typing import Any, Protocol, cast

import torch
from anomalib.data import ImageBatch, PredictDataset
from anomalib.data.transforms.utils import extract_transforms_by_type
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import Resize, Transform

from anomalib_raad.data.drift import Ranges, differences
from anomalib_raad.data.readable import list_faults, unreadable
from anomalib_raad.post_processing import check_thresholds

logger = logging.getLogger(__name__)


class Guarded(Protocol):
    """What the guard knows of a model."""

    @property
    def record(self) -> Any:  # noqa: ANN401  # whose ``seen`` are the ranges of the training images
        """What a run has found out."""

    @property
    def transform(self) -> Transform | None:
        """What the pre-processor does to images."""

    post_processor: torch.nn.Module | None


class PredictionGuard(Callback):
    """Leaves out files that cannot be read, and speaks up where a verdict would mean nothing.

    A model without thresholds does not predict. A score that is not finite is an error. An image that is unlike all
    training images, or is resized twice, is named in a warning, once.
    """

    seen: Ranges
    warned: bool

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the sizes of the images."""
        _warn_of_two_sizes(trainer.val_dataloaders, pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the sizes of the images."""
        _warn_of_two_sizes(trainer.test_dataloaders, pl_module)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave out the files of a folder that cannot be read, so that the others are predicted.

        Raises:
            ValueError: If no file is left, or the model has no thresholds.
        """
        model = cast("Guarded", pl_module)
        self.seen = model.record.seen
        self.warned = not self.seen
        for loader in _loaders(trainer.predict_dataloaders):
            if isinstance(loader.dataset, PredictDataset):
                paths = loader.dataset.image_filenames
                faults = unreadable(paths)
                message = f"{len(faults)} of {len(paths)} file(s) to predict cannot be used:\n{list_faults(faults)}"
                if len(faults) == len(paths):
                    raise ValueError(message)
                if faults:
                    logger.warning(message)
                loader.dataset.image_filenames = [path for path in paths if str(path) not in faults]
        check_thresholds(model.post_processor)
        _warn_of_two_sizes(trainer.predict_dataloaders, pl_module)

    def on_predict_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: ImageBatch, *_: Any) -> None:
        """Compare images with the training's, before the pre-processor has resized them."""
        del trainer, pl_module
        for index, image in enumerate(cast("torch.Tensor", batch.image)):
            if not self.warned and (found := differences(image, self.seen)):
                logger.warning(
                    "%s is unlike the training images: %s. Scores may mean nothing.", _name(batch, index), found
                )
                self.warned = True

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:  # noqa: ANN401
        """Look at the scores, before any callback computes with them."""
        del trainer, pl_module
        check_scores(outputs)

    def on_test_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:  # noqa: ANN401
        """Look at the scores, before any callback computes with them."""
        del trainer, pl_module
        check_scores(outputs)

    def on_predict_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:  # noqa: ANN401
        """Look at the scores, before any callback computes with them."""
        del trainer, pl_module
        check_scores(outputs)


def check_scores(predictions: ImageBatch) -> None:
    """Look at the scores of a batch.

    Raises:
        FloatingPointError: If a score is not finite; the message names its image.
    """
    finite = cast("torch.Tensor", predictions.pred_score).flatten().isfinite()
    if broken := [_name(predictions, index) for index, good in enumerate(finite.tolist()) if not good]:
        msg = f"the score of {', '.join(broken)} is not finite, so there is no verdict: look at the image's values, "
        msg += "the model's weights and its precision (bfloat16 and float32 are right, float16 is not)"
        raise FloatingPointError(msg)


def _name(batch: ImageBatch, index: int) -> str:
    return str(batch.image_path[index]) if batch.image_path else f"image {index} of the batch"


def _loaders(loaders: Any) -> list[DataLoader]:  # noqa: ANN401  # one of the many forms Lightning takes
    return CombinedLoader(loaders, "sequential").flattened if loaders else []


def _warn_of_two_sizes(loaders: Any, pl_module: LightningModule) -> None:  # noqa: ANN401
    """A datamodule resizes as the model did that was passed to the engine, whatever a checkpoint says."""
    goals = _sizes(cast("Guarded", pl_module).transform)
    augmentations = [getattr(loader.dataset, "augmentations", None) for loader in _loaders(loaders)]
    others = [size for transform in augmentations for size in _sizes(transform) if size not in goals]
    if goals and others:
        logger.warning(
            "the datamodule resizes images to %s, and the checkpoint's model then to %s: it has not been trained on "
            "such images. Pass the engine a model made by load_from_checkpoint.",
            *(others[0], goals[0]),
        )


def _sizes(transform: Transform | None) -> list[tuple[int, ...]]:
    """What a transform resizes to."""
    return [tuple(resize.size) for resize in extract_transforms_by_type(transform, Resize)]
