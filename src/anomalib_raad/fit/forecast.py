"""How long a run will take, said once its pace is known."""

import logging
from typing import Any, Protocol, cast

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from .time_budget import StepClock

logger = logging.getLogger(__name__)


class Plan(Protocol):
    """What a model's ``schedule`` says of its run, beside its text."""

    @property
    def total(self) -> int:
        """Optimizer steps."""


class Forecast(Callback):
    """Tells once how long the run of a model with a ``schedule`` will take.

    Args:
        first: Optimizer step of this process from which the pace is taken; those before it warm up.
        last: Step at which the pace is known.
    """

    def __init__(self, first: int = 5, last: int = 25) -> None:
        self.first = first
        self.last = last
        self._clock: StepClock | None = None

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Count the steps of this process."""
        if self._clock is None:
            self._clock = StepClock(trainer.global_step - 1, warm_up=self.first, timed=self.last - self.first)
        if self._clock.tick(trainer.global_step):
            plan = cast("Plan", pl_module.schedule)
            seconds = self._clock.found
            steps = plan.total - trainer.global_step
            hours, minutes = divmod(round(steps * seconds / 60), 60)
            logger.info(
                "%d steps at %.2f s take about %d h %02d min on this machine (%s). "
                "To shorten: --trainer.max_time 00:00:15:00, --trainer.max_steps, --trainer.precision bf16-mixed.",
                *(steps, seconds, hours, minutes, plan),
            )
