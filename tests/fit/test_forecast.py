from types import SimpleNamespace

from anomalib_raad import Raad
from anomalib_raad.fit.forecast import Forecast
from anomalib_raad.raad.schedule import Schedule


def test_how_long_the_run_takes_is_said_once(caplog, monkeypatch) -> None:
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    forecast, model = Forecast(), SimpleNamespace(schedule=Schedule(1805, 1800))
    trainer = SimpleNamespace(accumulate_grad_batches=2, datamodule=SimpleNamespace(train_batch_size=4))
    with caplog.at_level("INFO"):
        for batch in range(2, 40):
            now[0] += 0.5
            trainer.global_step = batch // 2
            forecast.on_train_batch_end(trainer, model)
    (message,) = caplog.messages
    assert message.startswith(
        "3598 steps of 8 image(s) at 1.00 s take about 1 h 00 min on this machine (train 1805, quantize,"
    )
    assert "To shorten: --trainer.max_time" in message
    assert "--data.train_batch_size 1" in message


def test_what_lies_between_the_stages_is_not_timed(caplog, monkeypatch) -> None:
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    forecast, model = Forecast(), SimpleNamespace(schedule=Schedule(3, 1000))
    trainer = SimpleNamespace(accumulate_grad_batches=1, datamodule=SimpleNamespace(train_batch_size=1))
    with caplog.at_level("INFO"):
        for step in range(1, 20):
            now[0] += 100.0 if step == 4 else 1.0  # the fourth step is the first of stage 3
            trainer.global_step = step
            forecast.on_train_batch_end(trainer, model)
    (message,) = caplog.messages
    assert "of 1 image(s) at 1.00 s take" in message


def test_raad_forecasts() -> None:
    assert any(isinstance(callback, Forecast) for callback in Raad(visualizer=False).configure_callbacks())
