"""The memory a process has used at most; run as a command, what an OpenVINO model takes to load and infer.

python -m benchmarks.memory model.xml f32
"""

import subprocess
import sys
from pathlib import Path


def peak_megabytes() -> float:
    """Highest resident size of this process, on Linux; ``getrusage`` would count what the parent had used before."""
    return _status("VmHWM")


def resident_megabytes() -> float:
    """Resident size of this process, on Linux."""
    return _status("VmRSS")


def _status(field: str) -> float:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def printed_by(module: str, *arguments: str) -> float:
    """Run a module in a process of its own and return the number that it prints."""
    command = [sys.executable, "-m", module, *arguments]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)  # noqa: S603


if __name__ == "__main__":
    import numpy as np
    import openvino

    path, *precision = sys.argv[1:]
    before = peak_megabytes()
    config = {"PERFORMANCE_HINT": "LATENCY"}
    if precision:
        config["INFERENCE_PRECISION_HINT"] = precision[0]
    model = openvino.Core().compile_model(path, "CPU", config)
    model(np.zeros([size.get_length() if size.is_static else 1 for size in model.input().partial_shape], np.float32))
    print(peak_megabytes() - before)  # noqa: T201
