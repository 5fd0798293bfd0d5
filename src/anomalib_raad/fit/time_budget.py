"""A fit that is finished in the time that its user gives, ``--trainer.max_time``."""

import time

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Timer

from .trainer import callbacks_of

_WARM_UP, _TIMED = 2, 6  # optimizer steps that are not timed, and those that are
_ENOUGH = 5.0  # seconds after which fewer of either will do


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
    """Times the first optimizer steps after it is made, but for those that warm up: fewer where a step takes long.

    Args:
        step: Number of the steps taken before.
    """

    def __init__(self, step: int) -> None:
        self.found = 0.0
        self._first = step + _WARM_UP
        self._warm = False
        self._start = time.monotonic()

    def tick(self, step: int) -> bool:
        """Tell how many steps have been taken; true once, when ``found``, the seconds of a step, is known."""
        seconds = time.monotonic() - self._start
        if self.found:
            return False
        if not self._warm:
            if step >= self._first or seconds >= _ENOUGH:
                self._warm, self._first, self._start = True, step, time.monotonic()
            return False
        steps = step - self._first
        if steps < 1 or (steps < _TIMED and seconds < _ENOUGH):
            return False
        self.found = seconds / steps
        return True
