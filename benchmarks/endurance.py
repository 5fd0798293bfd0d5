"""Memory and scores over many inferences and training steps.

    TRUST_REMOTE_CODE=1 python -m benchmarks.endurance --ckpt_path model.ckpt --images parts/good

anomalib's OpenVINO and torch inferencers read and infer the images of a folder again and again in several threads, each
with an inferencer of its own: a compiled model answers one request at a time. The torch inferencer unpickles the model
that this command has just written, hence the variable. Then Raad trains on the same images at 64x64. Linux only.
"""

import json
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from anomalib.callbacks import ModelCheckpoint
from anomalib.data import Folder
from anomalib.data.utils import get_image_filenames
from anomalib.deploy import OpenVINOInferencer, TorchInferencer
from anomalib.engine import Engine
from jsonargparse import auto_cli
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from tqdm import trange

from anomalib_raad import Raad

from .memory import resident_megabytes

_READINGS = 100  # of the memory in each part


def main(
    ckpt_path: Path,
    images: Path,
    inferences: int = 20_000,
    threads: int = 4,
    steps: int = 5_000,
    output: Path | None = None,
) -> None:
    """Infer and train for long and print what became of memory and scores.

    Args:
        ckpt_path: Checkpoint of a finished model.
        images: Folder with normal images.
        inferences: Inferences by each inferencer.
        threads: Threads that infer at the same time.
        steps: Optimizer steps.
        output: JSON file for the figures.
    """
    model = Raad.load_from_checkpoint(ckpt_path, visualizer=False)
    paths = get_image_filenames(images)
    with TemporaryDirectory() as folder:
        makers: dict[str, Callable[[], Any]] = {
            "OpenVINO": partial(OpenVINOInferencer, model.to_openvino(folder)),
            "torch": partial(TorchInferencer, model.to_torch(folder), "cpu"),
        }
        parts = {name: partial(infer, make, paths, inferences, threads) for name, make in makers.items()}
        parts["training"] = partial(train, images, steps, Path(folder))
        figures = {}
        for name, part in parts.items():
            figures[name] = part()
            Console().print({name: figures[name]})
            if output:  # each part takes long, what follows may be interrupted
                output.write_text(json.dumps(figures, indent=1))


def infer(make: Callable[[], Any], paths: Sequence[Path], inferences: int, threads: int) -> dict[str, float]:
    """Infer images in turn.

    Returns:
        The trend of the memory, and the largest difference between two scores of one image.
    """
    own = threading.local()

    def score(number: int) -> float:
        if not hasattr(own, "inferencer"):
            own.inferencer = make()
        return float(own.inferencer.predict(paths[number % len(paths)]).pred_score.item())

    first: dict[int, float] = {}
    memory, drift = [], 0.0
    share = max(1, inferences // _READINGS)
    with ThreadPoolExecutor(threads) as pool:
        for start in trange(0, inferences, share, desc="Inferences"):
            numbers = range(start, min(start + share, inferences))
            for number, value in zip(numbers, pool.map(score, numbers), strict=True):
                drift = max(drift, abs(value - first.setdefault(number % len(paths), value)))
            memory.append(resident_megabytes())
    return {"inferences": inferences, "threads": threads, "drift": drift, **_trend(memory, inferences)}


def train(images: Path, steps: int, folder: Path) -> dict[str, float]:
    """Take optimizer steps at 64x64 and return the trend of the memory in each stage."""
    data = Folder(
        name="endurance", normal_dir=images, train_batch_size=1, num_workers=0, test_split_mode="none",
        val_split_mode="from_train", val_split_ratio=0.1, seed=0,
    )  # fmt: skip
    model = Raad(pre_processor=Raad.configure_pre_processor((64, 64)), reconstruction_iterations=2, visualizer=False)
    readings = _Readings(max(1, steps // _READINGS))
    engine = Engine(
        max_steps=steps,
        callbacks=[readings, ModelCheckpoint(save_top_k=0)],
        logger=False,
        accelerator="cpu",
        default_root_dir=folder,
    )
    engine.fit(model, datamodule=data)
    first = model.schedule.first // readings.every
    return {"steps": steps} | {
        f"{stage} {name}": value
        for stage, memory in (("stage 1", readings.memory[:first]), ("stage 3", readings.memory[first:]))
        for name, value in _trend(memory, len(memory) * readings.every).items()
    }


class _Readings(Callback):
    def __init__(self, every: int) -> None:
        self.every = every
        self.memory: list[float] = []

    def on_train_batch_end(self, trainer: Any, *_arguments: Any) -> None:  # noqa: ANN401
        if trainer.global_step % self.every == 0:
            self.memory.append(resident_megabytes())


def _trend(memory: Sequence[float], events: int) -> dict[str, float]:
    """Megabytes at the end, and how they rise after the first tenth, when everything has been loaded."""
    settled = np.array(memory[len(memory) // 10 :])
    slope = np.polyfit(np.arange(len(settled)), settled, 1)[0] * len(memory) / events if len(settled) > 1 else 0.0
    return {
        "megabytes": float(settled[-1]),
        "megabytes_per_1000": float(1000 * slope),
        "growth": float(settled[-1] / settled[0] - 1),
    }


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
