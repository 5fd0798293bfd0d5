import threading
from types import SimpleNamespace

import pytest
import torch

from benchmarks.endurance import _trend, infer


def test_the_largest_difference_of_two_scores_of_one_image() -> None:
    calls, lock = {}, threading.Lock()

    class Inferencer:
        def predict(self, path: str) -> SimpleNamespace:
            with lock:
                calls[path] = calls.get(path, 0) + 1
                late = path == "b" and calls[path] == 3
            return SimpleNamespace(pred_score=torch.tensor([0.5 if late else ord(path)]))

    figures = infer(Inferencer, ["a", "b"], inferences=6, threads=1)
    assert calls == {"a": 3, "b": 3}
    assert figures["drift"] == 97.5
    assert infer(Inferencer, ["a", "c"], inferences=40, threads=3)["drift"] == 0


def test_trend_of_the_memory() -> None:
    loading = [500.0] * 10
    assert _trend(loading + [1000.0] * 90, 20_000)["megabytes_per_1000"] == pytest.approx(0, abs=1e-9)
    rising = _trend(loading + [1000.0 + number for number in range(90)], 20_000)
    assert rising["megabytes_per_1000"] == pytest.approx(100 / 20)
    assert rising["growth"] == pytest.approx(0.089)
