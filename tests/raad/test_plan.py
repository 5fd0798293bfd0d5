from dataclasses import replace

import pytest
import torch

from anomalib_raad.raad.plan import Pace, Plan, measure_pace, plan
from anomalib_raad.raad.schedule import Schedule

USUAL = Plan(calibration_images=128, held_out_images=42, samples=48_000, iterations=300, autoencoder_seconds=1e9)
PACE = Pace(image=0.1, position=1e-4, solution=1.0)


def test_an_hour_is_enough_for_the_usual_work() -> None:
    planned = plan(3600, PACE, USUAL, validation_images=47, images_a_step=1)
    assert replace(planned, autoencoder_seconds=1e9) == USUAL
    assert planned.autoencoder_seconds == 360


@pytest.mark.parametrize("seconds", [60, 120, 300, 600])
def test_less_time_makes_the_work_smaller_and_leaves_time_for_steps(seconds: int) -> None:
    planned, longer = (
        plan(time, PACE, USUAL, validation_images=47, images_a_step=1) for time in (seconds, 2 * seconds)
    )
    work, last = planned.seconds(PACE, 47)
    assert 0 < last < work < 0.8 * seconds
    for name in ("calibration_images", "held_out_images", "samples", "iterations"):
        assert 0 <= getattr(planned, name) <= getattr(longer, name) <= getattr(USUAL, name)


def test_too_little_time__error() -> None:
    with pytest.raises(
        ValueError, match=r"max_time leaves 5 s; on this machine these images need (\d+) s at least"
    ) as error:
        plan(5, PACE, USUAL, validation_images=47, images_a_step=1)
    least = float(str(error.value).split("need ")[1].split()[0])
    plan(1.1 * least, PACE, USUAL, validation_images=47, images_a_step=1)  # which is enough


def test_large_steps_need_more_time() -> None:
    with pytest.raises(ValueError, match=r"or less than 32 of them a step \(train_batch_size\)"):
        plan(60, PACE, USUAL, validation_images=47, images_a_step=32)


def test_steps_are_shared_as_usual() -> None:
    assert USUAL.schedule(130, 0.1, done=8, full=Schedule(7, 6)) == Schedule(704, 604)
    assert USUAL.schedule(-20, 0.1, done=8, full=Schedule(7, 6)) == Schedule(9, 1)


def test_plain_values_and_back() -> None:
    planned = USUAL
    assert Plan(**planned.state()) == planned


def test_the_pace_of_each_kind_of_work(untrained) -> None:
    model, images = untrained
    weight = model.student.head.weight.clone()
    pace = measure_pace(model, images[0], solves=True)
    assert pace.image > 0
    assert pace.position >= 0
    assert pace.solution >= 0
    assert torch.equal(model.student.head.weight, weight)
    plain = measure_pace(model, images[0], solves=False)
    assert plain.image > 0
    assert plain.position == plain.solution == 0
    assert plan(600, plain, USUAL, validation_images=5, images_a_step=1).autoencoder_seconds == 0
