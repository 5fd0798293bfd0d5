import pytest

from anomalib_raad.raad.schedule import LearningRates, Schedule, Stage


@pytest.mark.parametrize(
    ("total", "train", "finetune"),
    [(130_000, 70_000, 60_000), (600, 323, 277), (13, 7, 6), (2, 1, 1)],
)
def test_scaled_keeps_the_proportion(total: int, train: int, finetune: int) -> None:
    assert Schedule.scaled(70_000, 60_000, total) == Schedule(train, finetune)


@pytest.mark.parametrize(("train", "finetune", "total"), [(70_000, 60_000, 1), (999, 1, 10), (1, 999, 10)])
def test_scaled__error(train: int, finetune: int, total: int) -> None:
    with pytest.raises(ValueError, match="leave a stage without a step"):
        Schedule.scaled(train, finetune, total)


def test_stage_of_each_step() -> None:
    schedule = Schedule(2, 1)
    assert [schedule.stage(step) for step in range(3)] == [Stage.TRAINED, Stage.TRAINED, Stage.FINE_TUNED]
    assert schedule.total == 3


def test_progress_within_each_stage() -> None:
    schedule = Schedule(4, 2)
    assert [schedule.progress(step) for step in range(6)] == [0, 0.25, 0.5, 0.75, 0, 0.5]


def test_stages_are_counted_as_in_the_paper() -> None:
    assert {stage.value: stage.number for stage in Stage} == {"trained": 1, "quantized": 2, "fine_tuned": 3}


def test_learning_rates_of_each_step() -> None:
    rates, schedule = LearningRates(1e-3, 1e-5, 0.5), Schedule(2, 2)
    factors = [1e-3 * rates.factor(schedule, step) for step in range(4)]
    assert factors == pytest.approx([1e-3, 1e-4, 1e-5, 1e-6])
    assert LearningRates(1e-3, 1e-3, 0.0).factor(schedule, 1) == 1
