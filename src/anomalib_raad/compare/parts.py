"""A comparison on one's own parts, in the same time for all models; other models, data and seeds in a file: --config.

anomalib-raad compare --data Folder --data.name parts --data.root parts --data.normal_dir good --data.abnormal_dir bad
"""

import inspect
import re
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from anomalib.data import AnomalibDataModule
from jsonargparse import ArgumentParser

from .grid import compare

MODELS: dict[str, dict[str, Any]] = {
    "Raad": {"class_path": "anomalib_raad.Raad"},
    "Aand": {"class_path": "anomalib_raad.Aand", "data": {"train_batch_size": 16}},
    "Agpnet": {"class_path": "anomalib_raad.Agpnet", "data": {"train_batch_size": 4}},
    "EfficientAd": {"class_path": "anomalib_raad.compare.baselines.OfflineEfficientad"},
    "PatchCore": {
        "class_path": "anomalib_raad.compare.baselines.OfflinePatchcore",
        "init_args": {"bank_size": 5000},  # chosen in minutes
        # It has nothing to train; anomalib computes its distances in this precision.
        "trainer": {"max_steps": -1, "max_epochs": 1, "max_time": None, "precision": "32-true"},
    },
}
"""Models by name, in a form that needs no download."""

_DATA = {  # where the user says nothing else: what all models can train on, and thresholds without test images
    "train_batch_size": 1,
    "eval_batch_size": 1,
    "num_workers": 2,
    "val_split_mode": "from_train",
    "val_split_ratio": 0.1,
    "seed": 0,
}


def compare_parts(arguments: Sequence[str]) -> int:
    """Run the comparison that command line arguments describe.

    Args:
        arguments: ``--data`` and its options as anomalib's command line takes them, and those of :func:`parser`.

    Returns:
        What :func:`~.grid.compare` returns.
    """
    command = parser()
    options = command.parse_args(list(arguments))
    given = command.parse_args(list(arguments), defaults=False).data  # only what the user says
    unknown = [name for name in options.models if name not in MODELS]
    if unknown:
        msg = f"unknown models {unknown}; there are {list(MODELS)}, and others in a file, see --config"
        raise SystemExit(msg)
    module, _, name = given.class_path.rpartition(".")
    accepted = inspect.signature(getattr(import_module(module), name)).parameters
    own = given.as_dict().get("init_args", {})
    init_args = {key: value for key, value in _DATA.items() if key in accepted} | own
    title = init_args.get("name") or init_args.get("category") or name
    # EfficientAd asks for a number of steps as well; the time is over long before.
    limit = (
        {"max_steps": 70_000, "max_time": options.max_time} if options.steps is None else {"max_steps": options.steps}
    )
    return compare(
        {name: MODELS[name] for name in options.models},
        {str(title): {"class_path": given.class_path, "init_args": init_args}},
        seeds=options.seeds,
        trainer={"accelerator": "cpu", "logger": False} | limit,
        results=options.results,
        check=options.check,
    )


def _duration(text: str) -> str:
    if not re.fullmatch(r"\d\d:\d\d:\d\d:\d\d", text):
        msg = f"max_time is {text!r}; days:hours:minutes:seconds are needed, as in 00:00:10:00"
        raise ValueError(msg)
    return text


def parser() -> ArgumentParser:
    """The command's options."""
    options = ArgumentParser(prog="anomalib-raad compare", description=__doc__)
    options.add_subclass_arguments(AnomalibDataModule, "data", required=True)
    options.add_argument("--models", type=list[str], default=list(MODELS), help="names, the first against the others")
    options.add_argument("--max_time", type=_duration, default="00:00:10:00", help="of each fit, DD:HH:MM:SS")
    options.add_argument("--steps", type=int | None, default=None, help="optimizer steps of each fit instead of a time")
    options.add_argument("--seeds", type=list[int], default=[0], help="of weights and order")
    options.add_argument("--results", type=Path, default=Path("results/comparison"), help="folder for cells and report")
    options.add_argument("--check", type=bool, default=False, help="only say what is missing on this machine")
    return options
