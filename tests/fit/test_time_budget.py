from datetime import timedelta

import pytest
from anomalib.engine import Engine
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Timer

from anomalib_raad.fit.time_budget import StepClock, TimeBudget


@pytest.fixture
def clock(monkeypatch):
    """What time it is."""
    now = [100.0]
    monkeypatch.setattr("anomalib_raad.fit.time_budget.time.monotonic", lambda: now[0])
    return now


def test_the_limit_is_taken_over_from_lightnings_timer(clock) -> None:
    trainer = Trainer(max_time="00:00:15:00", logger=False, enable_checkpointing=False)
    assert any(isinstance(callback, Timer) for callback in trainer.callbacks)
    budget = TimeBudget.taken_from(trainer)
    assert not any(isinstance(callback, Timer) for callback in trainer.callbacks)
    assert budget.seconds == 900
    clock[0] += 60
    assert budget.remaining == 840
    clock[0] += 1000
    assert budget.remaining == -160


@pytest.mark.parametrize("callbacks", [[], [Timer()]])  # one that only measures stays
def test_without_a_limit_there_is_no_budget(callbacks) -> None:
    trainer = Trainer(callbacks=callbacks, logger=False, enable_checkpointing=False)
    assert TimeBudget.taken_from(trainer) is None
    assert all(callback in trainer.callbacks for callback in callbacks)


def test_anomalibs_engine_passes_the_limit_on() -> None:
    assert Engine(max_time=timedelta(minutes=1))._cache.args["max_time"] == timedelta(minutes=1)


def test_of_steps_that_take_long_the_clock_times_fewer(clock) -> None:
    steps = StepClock(0)
    for step, found in ((1, False), (2, True), (3, False)):
        clock[0] += 16
        assert steps.tick(step) == found
    assert steps.found == 16


def test_the_clock_times_the_steps_after_those_that_warm_up(clock) -> None:
    steps = StepClock(40)
    for step in range(41, 60):
        clock[0] += 2.4 if step <= 42 else 0.5
        assert steps.tick(step) == (step == 48)
        assert steps.tick(step) is False  # another batch of the same step
    assert steps.found == 0.5
