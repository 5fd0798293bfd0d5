import subprocess
import sys
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="module")
def runs(cells, tmp_path_factory):
    """Outcome of one process with batches of two, and of both of two processes with single images."""
    script = Path(__file__).with_name("fit_in_processes.py")
    loaded = {}
    for processes, batch_size in ((1, 2), (2, 1)):
        results = tmp_path_factory.mktemp(f"processes{processes}")
        command = [sys.executable, str(script), str(cells), str(results), str(processes), str(batch_size)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        loaded[processes] = [torch.load(path, weights_only=True) for path in sorted(results.glob("rank*.pt"))]
    return loaded[1], loaded[2]


def test_every_process_ends_with_the_same_model(runs) -> None:
    _, (first, second) = runs
    for name, value in first["state"].items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(second["state"][name], value, rtol=0, atol=0, equal_nan=True, msg=name)
        else:
            assert second["state"][name] == value, name
    assert first["state"]["model.student.conv2._extra_state"]["bits"]


def test_two_processes_equal_one_with_twice_the_batch(runs) -> None:
    (one,), (two, _) = runs
    for network in ("model.student", "model.ae"):
        a, b = (
            torch.cat([v.flatten() for n, v in run["moved"].items() if n.startswith(network)]) for run in (one, two)
        )
        assert a.norm() > 0
        assert (a - b).norm() < 0.02 * a.norm(), network
