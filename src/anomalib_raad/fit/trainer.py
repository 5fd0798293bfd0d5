"""What Lightning's ``Trainer`` has without declaring it."""

from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback


def datamodule_of(trainer: Trainer) -> Any:  # noqa: ANN401  # of any class, None where there are only loaders
    """The datamodule that a trainer works with."""
    return vars(trainer).get("datamodule")


def is_dev_run(trainer: Trainer) -> bool:
    """Whether the run is one of ``fast_dev_run``, which writes nothing."""
    return bool(vars(trainer).get("fast_dev_run"))


def callbacks_of(trainer: Trainer) -> list[Callback]:
    """All callbacks, the model's among them."""
    return vars(trainer).get("callbacks", [])
