"""How long a run will take, said once its pace is known."""

import logging
from typing import Any, Protocol, cast

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from .time_budget import StepClock
from .trainer import images_a_step

logger = logging.getLogger(__name__)


class Plan(Protocol):
    """What a model's ``schedule`` says of its run, beside its text."""

    @property
    def total(self) -> int:
        """Optimizer steps."""

    def stage(self, step: int) -> object:
        """Which stage a step belongs to."""


class Forecast(Callback):
    """Tells once how long the run of a model with a ``schedule`` will take."""

    def __init__(self) -> None:
        self._clock: StepClock | None = None
        self._stage: object = None

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Count the steps of this process."""
        plan = cast("Plan", pl_module.schedule)
        stage = plan.stage(trainer.global_step - 1)
        if self._clock is None or (stage != self._stage and not self._clock.found):  # stages do other work between them
            self._clock, self._stage = StepClock(trainer.global_step - 1), stage
        elif self._clock.tick(trainer.global_step):
            images, seconds = images_a_step(trainer), self._clock.found
            steps = plan.total - trainer.global_step
            hours, minutes = divmod(round(steps * seconds / 60), 60)
            logger.info(
                "%d steps of %d image(s) at %.2f s take about %d h %02d min on this machine (%s). "
                "To shorten: --trainer.max_time 00:00:15:00%s, --trainer.max_steps, --trainer.precision bf16-mixed.",
                *(steps, images, seconds, hours, minutes, plan),
                ", --data.train_batch_size 1" if images > 1 else "",
            )
