"""Which normal images train, which are held out, and in which order they come, so that a run can be resumed."""

import math
from collections.abc import Callable, Iterator, Sequence
from copy import copy

import torch
from anomalib.data import AnomalibDataModule
from torch.utils.data import DataLoader, Sampler
from torchvision.transforms.v2 import Transform

from anomalib_raad.data.few_shot import VERSIONS
from anomalib_raad.progress import progress


class ResumableBatches(Sampler[list[int]]):
    """Batches of an endless shuffle whose n-th batch depends on the seed and on n alone.

    Every iteration continues at the batch that ``position`` names, so a run that was interrupted anywhere sees the
    images it would have seen. Several processes take the batches in turn.

    Args:
        indices: Images to draw from; each is drawn once a round.
        batch_size: Images a batch; the last of a round may be smaller.
        seed: Seed of the shuffle.
        position: Tells how many batches each process has used so far.
        rank: Number of this process.
        world_size: Number of processes.
    """

    def __init__(
        self,
        indices: Sequence[int],
        batch_size: int,
        seed: int,
        position: Callable[[], int],
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.indices = list(indices)
        self.batch_size = batch_size
        self.seed = seed
        self.position = position
        self.rank = rank
        self.world_size = world_size

    def __len__(self) -> int:
        """Batches of this process in a round, rounded up."""
        return math.ceil(self._batches_a_round / self.world_size)

    @property
    def _batches_a_round(self) -> int:
        return math.ceil(len(self.indices) / self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        """Yield one round's number of batches, which may reach into the next round."""
        start, current = self.position(), None
        for turn in range(start, start + len(self)):
            round_number, within = divmod(turn * self.world_size + self.rank, self._batches_a_round)
            if round_number != current:
                current, order = round_number, self._order(round_number)
            yield order[within * self.batch_size : (within + 1) * self.batch_size]

    def _order(self, round_number: int) -> list[int]:
        generator = torch.Generator().manual_seed(self.seed + round_number)
        return [self.indices[i] for i in torch.randperm(len(self.indices), generator=generator).tolist()]


def training_augmentations(datamodule: AnomalibDataModule) -> Transform | None:
    """The user's augmentations, which training images alone have: quantizers and statistics see images as they are.

    None in a tiled ensemble, where anomalib resizes in them, and cuts the tile out while it collates.
    """
    return datamodule.train_data.augmentations if datamodule.external_collate_fn is None else None


class NormalImages:
    """The normal training images of a datamodule, some of them held out from training.

    The held-out images score the layers and normalise the maps; test images never do.

    Args:
        datamodule: Its training data must be set up.
        held_out: Share of the images to hold out, at least one image and not all of them.
        seed: Seed of the split and of the order of training.
        calibration_images: At most so many of the kept images serve as ``calibration``.
        transform: What the model does to an image before its networks see it.
        device: Where they see it.
        shots: Train on so many images alone, each of which comes once in every version in a round; they are looked at
            instead of held-out images as well. ``None``: on all.

    Raises:
        ValueError: If there are fewer images than shots, or images of several products.
    """

    def __init__(
        self,
        datamodule: AnomalibDataModule,
        held_out: float,
        seed: int,
        calibration_images: int | None = None,
        transform: Transform | None = None,
        device: torch.device | str = "cpu",
        shots: int | None = None,
    ) -> None:
        self.datamodule = datamodule
        self.seed = seed
        order = torch.randperm(len(datamodule.train_data), generator=torch.Generator().manual_seed(seed)).tolist()
        number = min(max(1, round(held_out * len(order))), len(order) - 1)
        self.held_out, self.kept = order[:number], order[number:]
        if shots is not None:
            self._check_shots(shots)
            self.held_out = self.kept = order[:shots]
        self.calibration = self.kept[:calibration_images]
        self._repeated = 1 if shots is None else VERSIONS
        self.transform = transform
        self.device = device
        self._plain = copy(datamodule.train_data)
        self._collate = datamodule.external_collate_fn or self._plain.collate_fn
        if training_augmentations(datamodule):
            self._plain.augmentations = None

    def _check_shots(self, shots: int) -> None:
        samples = self.datamodule.train_data.samples
        if len(samples) < shots:
            msg = f"shots is {shots}, and the training set has {len(samples)} image(s) beside those for validation"
            raise ValueError(msg)
        if samples.get("product", samples.image_path.head(1)).nunique() > 1:
            msg = "shots are the images of one product, and the training set has several: leave shots out"
            raise ValueError(msg)

    @property
    def vary(self) -> bool:
        """Whether a training image is another each time, by the datamodule's random augmentations."""
        return self.datamodule.train_augmentations is not None

    def use_at_most(self, held_out: int, calibration: int) -> None:
        """Let fewer images be held out and calibrate; those that were held out beyond that do not train either."""
        self.held_out, self.calibration = self.held_out[:held_out], self.calibration[:calibration]

    def plain(self, indices: Sequence[int]) -> Iterator[torch.Tensor]:
        """Yield images without augmentation, each of shape ``(1, 3, H, W)`` in [0, 1]."""
        for index in indices:
            yield self._collate([self._plain[index]]).image

    def prepared(self, indices: Sequence[int], description: str) -> Iterator[torch.Tensor]:
        """Yield images without augmentation as the networks see them, under a progress bar."""
        for image in progress(self.plain(indices), description, len(indices)):
            yield self.transform(image.to(self.device)) if self.transform else image.to(self.device)

    def paths(self, indices: Sequence[int]) -> list[str]:
        """Paths of images, as the batches of training name them."""
        return self._plain.samples.image_path.iloc[list(indices)].tolist()

    def take_over_training(self, position: Callable[[], int], rank: int, world_size: int) -> None:
        """Let the datamodule train on the kept images, in an order that can be resumed, until :meth:`release`."""
        self.release()
        original = self.datamodule.train_dataloader

        def train_dataloader() -> DataLoader:
            loader = original()
            batches = ResumableBatches(
                self.kept * self._repeated, loader.batch_size, self.seed, position, rank, world_size
            )
            return DataLoader(
                loader.dataset,
                batch_sampler=batches,
                num_workers=loader.num_workers,
                collate_fn=loader.collate_fn,
                pin_memory=loader.pin_memory,
                persistent_workers=loader.persistent_workers,
            )

        vars(self.datamodule)["train_dataloader"] = train_dataloader

    def release(self) -> None:
        """Give the datamodule its own loader back."""
        vars(self.datamodule).pop("train_dataloader", None)
