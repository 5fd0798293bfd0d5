"""What is checked before a fit begins: what it would end in otherwise shows only hours later."""

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from numbers import Integral, Real
from typing import Any

from anomalib.data import AnomalibDataModule
from anomalib.data.transforms.utils import extract_transforms_by_type
from lightning.pytorch import Trainer
from torchvision.transforms.v2 import Normalize, Resize, Transform

from anomalib_raad.data.readable import list_faults, unreadable
from anomalib_raad.progress import progress

from .trainer import monitors_of

HELD_OUT_LOSS = "held_out_loss"
"""What is logged of the training's progress on held-out normal images, at the end of each epoch."""

NEEDS: dict[str, Callable[[Any], bool]] = {
    "a positive number up to 1": lambda x: 0 < x <= 1,
    "a positive number": lambda x: x > 0,
    "zero or a positive number": lambda x: 0 <= x < math.inf,
    "a whole number from 1": lambda x: x >= 1 and isinstance(x, Integral),
    "a whole number from 0": lambda x: x >= 0 and isinstance(x, Integral),
    "a share between 0 and 1": lambda x: 0 < x < 1,
    "a share from 0 to 1": lambda x: 0 <= x <= 1,
    "a quantile in [0, 1)": lambda x: 0 <= x < 1,
}
"""What a number may have to be, in words that an error can use."""


def check_numbers(settings: Mapping[str, Any], needs: Mapping[str, Iterable[str]]) -> None:
    """Check settings.

    Args:
        settings: Values by name.
        needs: For each of :data:`NEEDS` the names of the settings that have to be so.

    Raises:
        ValueError: If a setting is out of its range; the message names it.
    """
    for need, names in needs.items():
        for name in names:
            value = settings[name]
            if not isinstance(value, Real) or not NEEDS[need](value):
                msg = f"{name} is {value!r}; {need} is needed"
                raise ValueError(msg)


def check_images(datamodule: AnomalibDataModule, validates: bool, few_shot: bool = False) -> None:
    """Read every image for training and validation.

    Args:
        datamodule: Its data must be set up.
        validates: Whether the model's thresholds come from the validation images.
        few_shot: Whether no image is held out.

    Raises:
        ValueError: If there are fewer than two training images, no validation image that is needed, or an image cannot
            be read.
    """
    number = len(datamodule.train_data)
    if number < 2 and not few_shot:
        msg = f"the training set has {number} image(s); one is needed to train on and one to hold out, better 20"
        raise ValueError(msg)
    validation = getattr(datamodule, "val_data", None)
    if validates and not validation:
        msg = "the validation set has no images, and the thresholds come from it: with val_split_mode=from_train, a "
        msg += f"val_split_ratio above {1 / number:.2f} takes at least one of the {number} training images"
        raise ValueError(msg)
    datasets = [datamodule.train_data, *([validation] if validation else [])]
    paths = [path for dataset in datasets for path in dataset.samples.image_path]
    if faults := unreadable(progress(paths, "Checking the images")):
        msg = f"{len(faults)} image(s) for training or validation cannot be used:\n{list_faults(faults)}"
        raise ValueError(msg)


def check_monitors(trainer: Trainer, logged: Collection[str]) -> None:
    """Look at what callbacks watch: metrics of the validation exist at the end of a fit only.

    Args:
        trainer: Its callbacks are looked at.
        logged: What training logs beside the loss on held-out images.

    Raises:
        ValueError: If an ``EarlyStopping`` or a ``ModelCheckpoint`` watches anything else.
    """
    for name, callback in monitors_of(trainer).items():
        if name != HELD_OUT_LOSS and name not in logged:
            msg = f"{type(callback).__name__} monitors {name!r}, which does not exist during a fit: the model is "
            msg += f"validated once, when it is finished. Monitor {HELD_OUT_LOSS}, {', '.join(logged)}, or nothing"
            raise ValueError(msg)


def check_transform(
    transform: Transform | None,
    augmentations: Transform | None,
    input_size: tuple[int, int] | None,
    least: int,
    most: int,
) -> None:
    """Check what a model will see of an image.

    Args:
        transform: The pre-processor's transform.
        augmentations: Those that training images alone have.
        input_size: Height and width that it resizes to, if any.
        least: Smallest side.
        most: Largest side.

    Raises:
        ValueError: If it normalises, or resizes to another size, or augmentations resize instead of it.
    """
    if not transform and augmentations and extract_transforms_by_type(augmentations, Resize):
        msg = "training augmentations resize, which held-out images do not have: give the size to the pre-processor "
        msg += "instead of pre_processor=False"
        raise ValueError(msg)
    if transform and extract_transforms_by_type(transform, Normalize):
        msg = "the pre-processor has a Normalize; the networks normalise themselves and need images in [0, 1]"
        raise ValueError(msg)
    if input_size and not all(least <= side <= most for side in input_size):
        msg = f"the image size is {tuple(input_size)}; sides of {least} to {most} are needed"
        raise ValueError(msg)
