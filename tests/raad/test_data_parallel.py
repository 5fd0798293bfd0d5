import subprocess
import sys
from pathlib import Path

import pytest
import torch


def fit(cells: Path, results: Path, processes: int, batch_size: int, *closed_form: str) -> list[dict]:
    """What each process saved."""
    script = Path(__file__).with_name("fit_in_processes.py")
    command = [sys.executable, str(script), str(cells), str(results), str(processes), str(batch_size), *closed_form]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(path, weights_only=True) for path in sorted(results.glob("rank*.pt"))]


@pytest.fixture(scope="module")
def runs(cells, tmp_path_factory):
    """Outcome of one process with batches of two, and of both of two processes with single images."""
    return [fit(cells, tmp_path_factory.mktemp(f"processes{n}"), n, size) for n, size in ((1, 2), (2, 1))]


def test_every_process_ends_with_the_same_model(runs) -> None:
    _, (first, second) = runs
    for name, value in first["state"].items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(second["state"][name], value, rtol=0, atol=0, equal_nan=True, msg=name)
        else:
            assert second["state"][name] == value, name
    assert first["state"]["model.student.conv2.weight_quantizer._extra_state"]["bits"]


def test_two_processes_equal_one_with_twice_the_batch(runs) -> None:
    (one,), (two, _) = runs
    for network in ("model.student", "model.ae"):
        a, b = (
            torch.cat([v.flatten() for n, v in run["moved"].items() if n.startswith(network)]) for run in (one, two)
        )
        assert a.norm() > 0
        assert (a - b).norm() < 0.02 * a.norm(), network


def test_every_process_fine_tunes_from_the_same_student(cells, tmp_path) -> None:
    """One process alone has solved and equalized it; all take the trained layer and its channels up again."""
    first, second = (run["fine_tuned_from"] for run in fit(cells, tmp_path, 2, 1, "closed_form"))
    torch.testing.assert_close(first, second, rtol=0, atol=0)
