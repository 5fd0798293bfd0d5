"""What Lightning's ``Trainer`` has without declaring it."""

from typing import Any

from lightning.pytorch import Trainer


def datamodule_of(trainer: Trainer) -> Any:  # noqa: ANN401  # of any class, None where there are only loaders
    """The datamodule that a trainer works with."""
    return vars(trainer).get("datamodule")


def is_dev_run(trainer: Trainer) -> bool:
    """Whether the run is one of ``fast_dev_run``, which writes nothing."""
    return bool(vars(trainer).get("fast_dev_run"))
