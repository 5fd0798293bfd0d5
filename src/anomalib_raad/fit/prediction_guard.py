"""What stands between the files of a prediction and the model."""

import logging
from typing import Any, Protocol, cast

import torch
from anomalib.data import ImageBatch, PredictDataset
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.combined_loader import CombinedLoader

from anomalib_raad.data.drift import Ranges, differences
from anomalib_raad.data.readable import list_faults, unreadable

logger = logging.getLogger(__name__)


class HasSeen(Protocol):
    """What a model's record knows of its training images."""

    seen: Ranges


class PredictionGuard(Callback):
    """Leaves out files that cannot be read, and warns once of an image that is unlike all training images.

    Their ranges are in the model's record; a model that has seen none warns of none.
    """

    seen: Ranges
    warned: bool

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave out the files of a folder that cannot be read, so that the others are predicted.

        Raises:
            ValueError: If no file is left.
        """
        self.seen = cast("HasSeen", pl_module.record).seen
        self.warned = not self.seen
        for loader in CombinedLoader(trainer.predict_dataloaders, "sequential").flattened:
            if isinstance(loader.dataset, PredictDataset):
                paths = loader.dataset.image_filenames
                faults = unreadable(paths)
                message = f"{len(faults)} of {len(paths)} file(s) to predict cannot be used:\n{list_faults(faults)}"
                if len(faults) == len(paths):
                    raise ValueError(message)
                if faults:
                    logger.warning(message)
                loader.dataset.image_filenames = [path for path in paths if str(path) not in faults]

    def on_predict_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: ImageBatch, *_: Any) -> None:
        """Compare images with the training's, before the pre-processor has resized them."""
        del trainer, pl_module
        for path, image in zip(batch.image_path or [], cast("torch.Tensor", batch.image), strict=False):
            if not self.warned and (found := differences(image, self.seen)):
                logger.warning("%s is unlike the training images: %s. Scores may mean nothing.", path, found)
                self.warned = True
