"""A fit that is finished in the time that its user gives, ``--trainer.max_time``."""

import time

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Timer

from .trainer import callbacks_of


class TimeBudget:
    """The time that a fit has.

    Args:
        seconds: How long the fit may take from now on.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._end = time.monotonic() + seconds

    @classmethod
    def taken_from(cls, trainer: Trainer) -> "TimeBudget | None":
        """Take the limit over from Lightning's timer, which would cut the fit off before its model is finished."""
        callbacks = callbacks_of(trainer)
        for callback in callbacks:
            if isinstance(callback, Timer) and (seconds := callback.time_remaining()) is not None:
                callbacks.remove(callback)
                return cls(seconds)
        return None

    @property
    def remaining(self) -> float:
        """Seconds that are left; negative when they are over."""
        return self._end - time.monotonic()


class StepClock:
    """Times the first optimizer steps after it is made, but for those that warm up.

    Args:
        step: Number of the steps taken before.
        warm_up: Steps that are not timed.
        timed: Steps that are.
    """

    def __init__(self, step: int, warm_up: int = 2, timed: int = 6) -> None:
        self.found = 0.0
        self._first = step + warm_up
        self._timed = timed
        self._start: float | None = None

    def tick(self, step: int) -> bool:
        """Tell how many steps have been taken; true once, when ``found``, the seconds of a step, is known."""
        if self.found or step < self._first:
            return False
        if self._start is None:
            self._first, self._start = step, time.monotonic()
        if step < self._first + self._timed:
            return False
        self.found = (time.monotonic() - self._start) / (step - self._first)
        return True
