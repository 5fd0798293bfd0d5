from collections.abc import Iterable
from types import SimpleNamespace

import pytest

from anomalib_raad import Raad
from anomalib_raad.fit.forecast import Forecast
from anomalib_raad.raad.schedule import Schedule


@pytest.fixture
def said(caplog, monkeypatch):
    """What is said of a run, from the seconds of its batches and the steps that are taken after each."""

    def run(schedule: Schedule, batches: Iterable[tuple[float, int]], batch_size: int, accumulated: int) -> str:
        now = [100.0]
        monkeypatch.setattr("time.monotonic", lambda: now[0])
        forecast, model = Forecast(), SimpleNamespace(schedule=schedule)
        data = SimpleNamespace(train_batch_size=batch_size)
        trainer = SimpleNamespace(accumulate_grad_batches=accumulated, datamodule=data)
        with caplog.at_level("INFO"):
            for seconds, steps in batches:
                now[0] += seconds
                trainer.global_step = steps
                forecast.on_train_batch_end(trainer, model)
        (message,) = caplog.messages
        return message

    return run


def test_how_long_the_run_takes_is_said_once(said) -> None:
    message = said(Schedule(1805, 1800), [(0.5, batch // 2) for batch in range(2, 40)], batch_size=4, accumulated=2)
    assert message.startswith(
        "3598 steps of 8 image(s) at 1.00 s take about 1 h 00 min on this machine (train 1805, quantize,"
    )
    assert "To shorten: --trainer.max_time" in message
    assert "--data.train_batch_size 1" in message


def test_what_lies_between_the_stages_is_not_timed(said) -> None:
    batches = [(100.0 if step == 4 else 1.0, step) for step in range(1, 20)]  # the fourth is the first of stage 3
    assert "of 1 image(s) at 1.00 s take" in said(Schedule(3, 1000), batches, batch_size=1, accumulated=1)


def test_raad_forecasts() -> None:
    assert any(isinstance(callback, Forecast) for callback in Raad(visualizer=False).configure_callbacks())
