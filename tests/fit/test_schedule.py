import pytest

from anomalib_raad.fit.schedule import TwoStages


@pytest.mark.parametrize(
    ("total", "first", "second"),
    [(130_000, 70_000, 60_000), (600, 323, 277), (13, 7, 6), (2, 1, 1)],
)
def test_scaled_keeps_the_proportion(total: int, first: int, second: int) -> None:
    assert TwoStages.scaled(70_000, 60_000, total) == TwoStages(first, second)


@pytest.mark.parametrize(("first", "second", "total"), [(70_000, 60_000, 1), (999, 1, 10), (1, 999, 10)])
def test_scaled__error(first: int, second: int, total: int) -> None:
    with pytest.raises(ValueError, match="leave a stage without a step"):
        TwoStages.scaled(first, second, total)


def test_progress_within_each_stage() -> None:
    schedule = TwoStages(4, 2)
    assert [schedule.progress(step) for step in range(6)] == [0, 0.25, 0.5, 0.75, 0, 0.5]


def test_a_model_may_have_no_first_stage() -> None:
    schedule = TwoStages.scaled(0, 120, 5)
    assert schedule == TwoStages(0, 5)
    assert schedule.begun(0)
    assert [schedule.progress(step) for step in range(5)] == [0, 0.2, 0.4, 0.6, 0.8]


def test_a_subclass_makes_its_own() -> None:
    class Stages(TwoStages):
        pass

    assert type(Stages.scaled(1, 1, 4)) is Stages
