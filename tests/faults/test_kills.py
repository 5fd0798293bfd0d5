"""``anomalib fit`` killed by SIGKILL and resumed: the weights must be those of a run that nobody killed.

FAULT_ROUNDS=5 kills 20 times (`make faults`); the ordinary tests do one round of four kills.
"""

import multiprocessing
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from anomalib.models import Raad
from lightning.pytorch import seed_everything

ROUNDS = int(os.environ.get("FAULT_ROUNDS", "1"))
CONFIG = """
model:
  class_path: Raad
  init_args:
    bits: {conv2: 4}
    calibration_images: 1
    reconstruction_iterations: 0
    closed_form: false
    visualizer: false
    pre_processor:
      class_path: anomalib_raad.pre_processing.RaadPreProcessor
      init_args: {transform: {class_path: torchvision.transforms.v2.Resize, init_args: {size: [64, 64]}}}
data:
  class_path: anomalib.data.Folder
  init_args:
    name: cells
    normal_dir: train
    train_batch_size: 2
    num_workers: 0
    test_split_mode: none
    val_split_mode: from_train
    val_split_ratio: 0.2
    seed: 0
trainer: {max_steps: 6, accelerator: cpu, logger: false, enable_progress_bar: false}
"""


class Runs:
    """Starts fits in processes of their own, all into one folder."""

    def __init__(self, folder: Path, cells: Path, temporary: str) -> None:
        self.folder, self.temporary = folder, temporary
        self.arguments = ["-c", str(folder / "config.yaml"), "--data.root", str(cells)]
        self.arguments += ["--default_root_dir", str(folder)]
        (folder / "config.yaml").write_text(CONFIG)
        # A server that has imported everything forks the processes, so that each starts in a moment.
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["anomalib.cli.cli", "anomalib_raad.raad.lightning_model"])

    def start(self) -> multiprocessing.Process:
        """Start, or resume from the last checkpoint."""
        resume = ["--ckpt_path", str(self.last("*.ckpt"))] if self.files("*.ckpt") else []
        command = ["anomalib", "fit", *self.arguments, *resume]
        process = self.context.Process(target=anomalib, args=(command, self.folder / "output.txt", self.temporary))
        process.start()
        return process

    def files(self, pattern: str) -> set[Path]:
        return set(self.folder.rglob(f"weights/lightning/{pattern}"))

    def last(self, pattern: str) -> Path:
        return max(self.files(pattern), key=lambda path: path.stat().st_mtime)

    def until(self, process: multiprocessing.Process, pattern: str, seconds: float = 300) -> float:
        """Wait until a new file appears, or for some seconds, and return how long it was."""
        before, begin = self.files(pattern), time.monotonic()
        while self.files(pattern) == before and process.is_alive() and time.monotonic() < begin + seconds:
            time.sleep(0.005)
        assert process.is_alive() or process.exitcode == 0, (self.folder / "output.txt").read_text()[-3000:]
        return time.monotonic() - begin

    def finish(self, process: multiprocessing.Process) -> dict[str, torch.Tensor]:
        """Wait for the end of a run and return the weights that it left."""
        process.join()
        assert process.exitcode == 0, (self.folder / "output.txt").read_text()[-3000:]
        return Raad.load_from_checkpoint(self.last("model.ckpt")).state_dict()


def anomalib(command: list[str], output: Path, temporary: str) -> None:
    """What a process does: anomalib's command line, its output in a file."""
    from anomalib.cli.cli import main

    with output.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    seed_everything(7)  # anomalib 2.7 reads the option of this name and does nothing with it
    tempfile.tempdir = temporary
    sys.argv = command
    main()


@pytest.fixture(scope="module")
def make_runs(cells, tmp_path_factory) -> Iterator:
    # Temporary files on another device, as on many machines: a file does not come from there in one step.
    memory = Path("/dev/shm")  # noqa: S108
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as temporary:
        yield lambda: Runs(tmp_path_factory.mktemp("runs"), cells, temporary)


@pytest.fixture(scope="module")
def uninterrupted(make_runs) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Final weights of a run that nobody kills, and the seconds that its parts take."""
    runs = make_runs()
    process = runs.start()
    seconds = {name: runs.until(process, f"{name}.ckpt") for name in ("trained", "quantized", "model")}
    return runs.finish(process), seconds


@pytest.mark.parametrize("round_number", range(ROUNDS))
def test_kills_in_every_stage(make_runs, uninterrupted, round_number: int) -> None:
    """In stage 1, in quantization, while a checkpoint is written, in stage 3; each resumes what the last one left."""
    expected, seconds = uninterrupted
    draw, runs = random.Random(round_number), make_runs()  # noqa: S311
    for number, name in enumerate(("trained", "quantized", "", "model")):
        process = runs.start()
        if name == "quantized":
            runs.until(process, "trained.ckpt")
        runs.until(process, f"{name}*", draw.uniform(0, seconds[name]) if name else 300)
        process.kill()
        process.join()
        assert process.exitcode == -9, f"kill {number} came too late"
    assert_equal(runs.finish(runs.start()), expected)


def test_the_same_seed_gives_the_same_weights(make_runs, uninterrupted) -> None:
    runs = make_runs()
    assert_equal(runs.finish(runs.start()), uninterrupted[0])


def assert_equal(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(actual[key], value, rtol=0, atol=0, equal_nan=True, msg=key)
        else:
            assert actual[key] == value, key
