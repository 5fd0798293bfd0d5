import pytest

from anomalib_raad.raad.schedule import LearningRates, Schedule, Stage


def test_stage_of_each_step() -> None:
    schedule = Schedule(2, 1)
    assert [schedule.stage(step) for step in range(3)] == [Stage.TRAINED, Stage.TRAINED, Stage.FINE_TUNED]


def test_stages_are_counted_as_in_the_paper() -> None:
    assert {stage.value: stage.number for stage in Stage} == {"trained": 1, "quantized": 2, "fine_tuned": 3}


def test_learning_rates_of_each_step() -> None:
    rates, schedule = LearningRates(1e-3, 1e-5, 0.5), Schedule(2, 2)
    factors = [1e-3 * rates.factor(schedule, step) for step in range(4)]
    assert factors == pytest.approx([1e-3, 1e-4, 1e-5, 1e-6])
    assert LearningRates(1e-3, 1e-3, 0.0).factor(schedule, 1) == 1
