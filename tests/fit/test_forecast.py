from types import SimpleNamespace

from anomalib_raad import Raad
from anomalib_raad.fit.forecast import Forecast
from anomalib_raad.raad.schedule import Schedule


def test_how_long_the_run_takes_is_said_once(caplog, monkeypatch) -> None:
    seconds = iter([100.0, 106.0])
    monkeypatch.setattr("time.monotonic", lambda: next(seconds))
    forecast, model = Forecast(first=2, last=5), SimpleNamespace(schedule=Schedule(1805, 1800))
    with caplog.at_level("INFO"):
        for batch in range(2, 20):  # two batches a step
            forecast.on_train_batch_end(SimpleNamespace(global_step=batch // 2), model)
    (message,) = caplog.messages
    assert message.startswith("3600 steps at 2.00 s take about 2 h 00 min on this machine (train 1805, quantize,")
    assert "To shorten: --trainer.max_time" in message


def test_raad_forecasts() -> None:
    assert any(isinstance(callback, Forecast) for callback in Raad(visualizer=False).configure_callbacks())
