import subprocess
import sys
from pathlib import Path

import torch


def fit(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """In processes of their own: Lightning leaves its port in the environment."""
    script = Path(__file__).with_name("fit_in_processes.py")
    command = [sys.executable, str(script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def test_two_processes_end_with_the_same_model(cells, tmp_path) -> None:
    done = fit(cells, tmp_path, "ddp_find_unused_parameters_true")
    assert done.returncode == 0, done.stderr[-3000:]
    (first, stages), (second, _) = [torch.load(tmp_path / f"rank{n}.pt", weights_only=True) for n in (0, 1)]
    torch.testing.assert_close(first, second, rtol=0, atol=0, equal_nan=True)
    assert stages == ["amplified", "distilled"]


def test_a_strategy_that_looks_for_no_unused_parameters__error(cells, tmp_path) -> None:
    done = fit(cells, tmp_path, "ddp")
    assert done.returncode != 0
    assert "take strategy ddp_find_unused_parameters_true" in done.stderr
