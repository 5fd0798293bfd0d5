import pytest

from anomalib_raad.agpnet.schedule import Schedule, Stage

RUN = Schedule(0, 100)


def test_the_noise_on_features_grows_for_four_fifths_of_the_run() -> None:
    assert [RUN.alpha(step) for step in (0, 40, 80, 99)] == pytest.approx([0, 0.5, 1, 1])


def test_the_share_of_noisy_pixels() -> None:
    assert [RUN.rho(step) for step in (0, 20, 50, 80, 99)] == pytest.approx([0.6, 0.6, 0.8, 1, 1])


def test_the_learning_rate_drops_once() -> None:
    assert [RUN.rate(step) for step in (0, 39, 40, 99)] == [1, 1, 0.1, 0.1]


def test_a_run_of_one_step() -> None:
    assert (Schedule(0, 1).alpha(0), Schedule(0, 1).rho(0), Schedule(0, 1).rate(0)) == (0, 0.6, 1)
    assert RUN.stage(0) is Stage.RECONSTRUCTED
    assert str(RUN) == "reconstruct 100"
