"""Eq. 1: a patch description network learns to predict a backbone's features.

    L_pre = mean((E(I) - T(I))^2)

``E`` are the channel-normalised :class:`PatchFeatures` of the image at 512x512, ``T`` is the teacher on the same image
at 256x256. A patch network sees 33x33 pixels, so a crop teaches it as well as a whole image: every photo's features
are computed once, kept in a pool, and serve several steps with other crops (``pool_size``, ``crop_size``).
"""

import logging
import math
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from anomalib.data.utils import get_image_filenames
from lightning.pytorch import LightningDataModule, LightningModule
from PIL import Image
from torch.nn import functional as F  # noqa: N812
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from anomalib_raad.fit.trainer import datamodule_of
from anomalib_raad.precision import check_precision

from .features import PatchFeatures
from .pdn import LOST_CELLS, STRIDE, create_pdn
from .statistics import channel_mean_std
from .weights import load_teacher_

logger = logging.getLogger(__name__)

BACKBONE_SIZE = 512
TEACHER_SIZE = 256
_MAX_UNREADABLE = 20


class Photos(Dataset[torch.Tensor]):
    """Photos as float tensors of shape ``(3, 512, 512)`` in [0, 1].

    A photo that cannot be read is named in a warning and the next one takes its place.

    Args:
        paths: Image files.
        transform: Applied to the RGB image.
    """

    def __init__(self, paths: Sequence[Path], transform: v2.Transform) -> None:
        self.paths = list(paths)
        self.unreadable: set[Path] = set()
        self.transform = v2.Compose([v2.ToImage(), transform, v2.ToDtype(torch.float32, scale=True)])

    def __len__(self) -> int:
        """Number of photos."""
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        """Read, transform and return one photo."""
        path = self.paths[index]
        try:
            with Image.open(path) as image:
                return self.transform(image.convert("RGB"))
        except (OSError, SyntaxError) as error:
            self.unreadable.add(path)
            if len(self.unreadable) > _MAX_UNREADABLE:
                msg = f"more than {_MAX_UNREADABLE} photos cannot be read; the last is {path}: {error}"
                raise RuntimeError(msg) from error
            logger.warning("skipping %s, which cannot be read: %s", path, error)
            return self[(index + 1) % len(self)]


class PhotoFolder(LightningDataModule):
    """Photos of a folder and its sub-folders, some of them held out to measure the distillation.

    Args:
        root: Folder with images.
        held_out: Number of photos for validation, chosen by ``seed``.
        batch_size: Fresh photos a step.
        min_area: Smallest share of a photo's area that a random crop shows; 1.0 shows whole photos, as the paper does.
        grayscale: Probability of a grey photo (EfficientAD: 0.1).
        num_workers: Processes that decode photos.
        seed: Seed of the split.
    """

    def __init__(
        self,
        root: str | Path,
        held_out: int = 300,
        batch_size: int = 16,
        min_area: float = 1.0,
        grayscale: float = 0.1,
        num_workers: int = 1,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()

    def setup(self, stage: str | None = None) -> None:
        """List the photos and split them."""
        del stage
        options = self.hparams
        paths = get_image_filenames(options["root"])
        if len(paths) <= options["held_out"]:
            found, held_out = len(paths), options["held_out"]
            msg = f"{options['root']} has {found} images; distillation needs more than the {held_out} held out"
            raise ValueError(msg)
        order = torch.randperm(len(paths), generator=torch.Generator().manual_seed(options["seed"])).tolist()
        shuffled = [paths[i] for i in order]
        size = (BACKBONE_SIZE, BACKBONE_SIZE)
        crop = v2.RandomResizedCrop(size, scale=(options["min_area"], 1.0), antialias=True)
        view = v2.Resize(size, antialias=True) if options["min_area"] == 1.0 else crop
        train = v2.Compose([view, v2.RandomHorizontalFlip(), v2.RandomGrayscale(options["grayscale"])])
        self.held_out = Photos(shuffled[: options["held_out"]], v2.Resize(size, antialias=True))
        self.photos = Photos(shuffled[options["held_out"] :], train)

    def train_dataloader(self) -> DataLoader[torch.Tensor]:
        """Random views of the training photos."""
        return self._loader(self.photos, shuffle=True)

    def val_dataloader(self) -> DataLoader[torch.Tensor]:
        """Whole held-out photos."""
        return self._loader(self.held_out, shuffle=False)

    def _loader(self, dataset: Photos, *, shuffle: bool) -> DataLoader[torch.Tensor]:
        workers = self.hparams["num_workers"]
        return DataLoader(
            dataset,
            self.hparams["batch_size"],
            shuffle=shuffle,
            drop_last=shuffle,
            num_workers=workers,
            persistent_workers=workers > 0,
        )


class Distillation(LightningModule):
    """Distils a backbone into a PDN teacher (RAAD Eq. 1, EfficientAD Algorithm 3).

    Args:
        backbone: What the teacher learns from, see :class:`PatchFeatures`.
        layers: The backbone's feature maps.
        backbone_weights: File with the backbone's weights instead of a download.
        out_channels: Channels of the teacher.
        model_size: Size of the teacher, ``small`` or ``medium``.
        start: Teacher to go on from, ``bundled`` or a file (see :func:`load_teacher_`); default: random weights.
        lr: Learning rate of Adam (paper: 1e-4).
        weight_decay: Weight decay of Adam (paper: 1e-5).
        cosine: Decay the learning rate to zero along a cosine over the trainer's steps.
        crop_size: Side of the crops in pixels of the 256x256 image, a multiple of 4; 256 uses whole images.
        crops: Crops a step, drawn from the pool.
        pool_size: Photos whose features are kept for reuse.
        normalization_images: Photos from which the features' channel statistics are computed (paper: 10,000).
    """

    feature_mean: torch.Tensor
    feature_std: torch.Tensor
    _errors: torch.Tensor
    _sums: torch.Tensor
    _squares: torch.Tensor
    _count: int

    def __init__(
        self,
        backbone: str = "wide_resnet101_2",
        layers: Sequence[int] = (2, 3),
        backbone_weights: str | Path | None = None,
        out_channels: int = 384,
        model_size: str = "small",
        start: str | Path | None = None,
        lr: float = 1e-4,
        weight_decay: float = 1e-5,
        cosine: bool = False,
        crop_size: int = TEACHER_SIZE,
        crops: int = 16,
        pool_size: int = 16,
        normalization_images: int = 10_000,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        if crop_size % STRIDE or not STRIDE * (2 * LOST_CELLS + 1) <= crop_size <= TEACHER_SIZE:
            msg = f"crop_size is {crop_size}; a multiple of 4 from 36 to {TEACHER_SIZE} pixels is needed"
            raise ValueError(msg)
        features = PatchFeatures(backbone, layers, out_channels, backbone_weights)
        self.features = features.to(memory_format=torch.channels_last)
        self.teacher = create_pdn(model_size, out_channels).to(memory_format=torch.channels_last)
        if start is not None:
            load_teacher_(self.teacher, start, model_size)
        for name in ("feature_mean", "feature_std"):
            self.register_buffer(name, torch.zeros(1, out_channels, 1, 1))
        for name in ("_errors", "_sums", "_squares"):  # of the validation, by channel
            self.register_buffer(name, torch.zeros(out_channels, dtype=torch.float64), persistent=False)
        self._pool: list[tuple[torch.Tensor, torch.Tensor]] = []

    def on_fit_start(self) -> None:
        """Compute the features' channel statistics once; a resumed run finds them in the checkpoint."""
        check_precision(self.trainer)
        if self.feature_std.any():
            return
        loader = datamodule_of(self.trainer).train_dataloader()
        batches = math.ceil(self.hparams["normalization_images"] / loader.batch_size)
        mean, std = channel_mean_std(self.features(photos.to(self.device)) for photos in islice(loader, batches))
        self.feature_mean.copy_(mean)
        self.feature_std.copy_(std)

    def _normalized_features(self, photos: torch.Tensor) -> torch.Tensor:
        photos = photos.contiguous(memory_format=torch.channels_last)
        return (self.features(photos).float() - self.feature_mean) / self.feature_std

    def training_step(self, photos: torch.Tensor, batch_idx: int) -> torch.Tensor:
        """Add fresh photos to the pool and learn from random crops of it."""
        del batch_idx
        images = F.interpolate(photos, size=(TEACHER_SIZE, TEACHER_SIZE), mode="bilinear", antialias=True)
        self._pool += list(zip(images, self._normalized_features(photos).to(torch.bfloat16), strict=True))
        self._pool = self._pool[-self.hparams["pool_size"] :]
        crops = [self._random_crop() for _ in range(self.hparams["crops"])]
        image = torch.stack([crop for crop, _ in crops]).contiguous(memory_format=torch.channels_last)
        target = torch.stack([target for _, target in crops])
        loss = F.mse_loss(self.teacher(image).float(), target.float())
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def _random_crop(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Cut the same random window from an image of the pool and from its features."""
        image, features = self._pool[int(torch.randint(len(self._pool), ()))]
        cells = self.hparams["crop_size"] // STRIDE
        top, left = torch.randint(TEACHER_SIZE // STRIDE - cells + 1, (2,)).tolist()
        y, x = top * STRIDE, left * STRIDE
        side = cells * STRIDE
        window = features[:, top : top + cells, left : left + cells]
        return image[:, y : y + side, x : x + side], window[:, LOST_CELLS:-LOST_CELLS, LOST_CELLS:-LOST_CELLS]

    def validation_step(self, photos: torch.Tensor, batch_idx: int) -> None:
        """Measure the loss on whole held-out photos, and each channel's variance and error."""
        del batch_idx
        images = F.interpolate(photos, size=(TEACHER_SIZE, TEACHER_SIZE), mode="bilinear", antialias=True)
        target = self._normalized_features(photos)[:, :, LOST_CELLS:-LOST_CELLS, LOST_CELLS:-LOST_CELLS]
        output = self.teacher(images.contiguous(memory_format=torch.channels_last)).float()
        self.log("val_loss", F.mse_loss(output, target), prog_bar=True)
        self._errors += (output - target).square().sum((0, 2, 3))
        self._sums += target.sum((0, 2, 3))
        self._squares += target.square().sum((0, 2, 3))
        self._count += target[:, 0].numel()

    def on_validation_epoch_start(self) -> None:
        """Forget the last validation."""
        self._count = 0
        for total in (self._errors, self._sums, self._squares):
            total.zero_()

    def on_validation_epoch_end(self) -> None:
        """Log the share of the held-out photos' feature variance that the teacher explains."""
        self.log("explained_variance", self.explained_variance().mean())

    def explained_variance(self) -> torch.Tensor:
        """Explained share of each channel's variance in the last validation, shape ``(C,)``, at most 1."""
        return 1 - self._errors / (self._squares - self._sums.square() / self._count)

    def configure_optimizers(self) -> Any:  # noqa: ANN401  # one of the many forms Lightning takes
        """Adam on the teacher, with a cosine decay if asked for."""
        options = self.hparams
        optimizer = torch.optim.Adam(self.teacher.parameters(), lr=options["lr"], weight_decay=options["weight_decay"])
        if not options["cosine"]:
            return {"optimizer": optimizer}
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
