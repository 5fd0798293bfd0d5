"""What Lightning's ``Trainer`` has without declaring it."""

import re
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn

_PUT_OFF = "raad_limit_val_batches"


def datamodule_of(trainer: Trainer) -> Any:  # noqa: ANN401  # of any class, None where there are only loaders
    """The datamodule that a trainer works with."""
    return vars(trainer).get("datamodule")


def is_dev_run(trainer: Trainer) -> bool:
    """Whether the run is one of ``fast_dev_run``, which writes nothing."""
    return bool(vars(trainer).get("fast_dev_run"))


def tile_of(trainer: Trainer) -> str:
    """The tile whose model anomalib's tiled ensemble trains, as its checkpoint names it: ``0_1``; empty without one."""
    callback = trainer.checkpoint_callback
    name = callback.filename if isinstance(callback, ModelCheckpoint) else None
    tile = re.fullmatch(r"model(\d+_\d+)", name or "")
    return tile[1] if tile else ""


def images_a_step(trainer: Trainer) -> int:
    """Images of an optimizer step in each process."""
    return datamodule_of(trainer).train_batch_size * trainer.accumulate_grad_batches


def validation_images(trainer: Trainer) -> int:
    """Images of the datamodule's validation."""
    return len(getattr(datamodule_of(trainer), "val_data", None) or ())


def stop_not_before(trainer: Trainer, step: int) -> None:
    """Let the trainer go on when a callback asks it to stop before a step; who asked is seen in ``should_stop``."""
    trainer.fit_loop.epoch_loop.min_steps = step


def put_off_validation(trainer: Trainer) -> None:
    """Validate no more, until :func:`allow_validation`."""
    vars(trainer).setdefault(_PUT_OFF, trainer.limit_val_batches)
    trainer.limit_val_batches = 0


def allow_validation(trainer: Trainer) -> None:
    """Validate again at this epoch's end, if :func:`put_off_validation` was called."""
    if _PUT_OFF in vars(trainer):
        trainer.limit_val_batches = vars(trainer).pop(_PUT_OFF)
        trainer.check_val_every_n_epoch = 1


class TidyUp(Callback):
    """Lets a model's ``teardown`` follow on a fit that is interrupted as well; Lightning leaves it out."""

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Tidy up."""
        del exception
        if trainer.state.fn == TrainerFn.FITTING:
            pl_module.teardown("fit")


def monitors_of(trainer: Trainer) -> dict[str, Callback]:
    """What callbacks watch, by name, and a callback that does."""
    found = {getattr(callback, "monitor", None): callback for callback in callbacks_of(trainer)}
    return {name: callback for name, callback in found.items() if name is not None}


def forget_best(trainer: Trainer) -> None:
    """Let every ``EarlyStopping`` begin anew, where what it watches is not comparable with before."""
    for callback in callbacks_of(trainer):
        if isinstance(callback, EarlyStopping):
            worst = torch.inf if callback.mode == "min" else -torch.inf
            callback.wait_count, callback.best_score = 0, torch.tensor(worst)


def callbacks_of(trainer: Trainer) -> list[Callback]:
    """All callbacks, the model's among them."""
    return vars(trainer).get("callbacks", [])
