import subprocess
import sys
from pathlib import Path

import torch


def test_two_processes_end_with_the_same_model(cells, tmp_path) -> None:
    script = Path(__file__).with_name("fit_in_processes.py")
    command = [sys.executable, str(script), str(cells), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    (first, stages), (second, _) = [torch.load(tmp_path / f"rank{n}.pt", weights_only=True) for n in (0, 1)]
    torch.testing.assert_close(first, second, rtol=0, atol=0, equal_nan=True)
    assert stages == ["amplified", "distilled"]
