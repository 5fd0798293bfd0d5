"""Checkpoints that a power cut cannot spoil, and files of torch that are checked before they are read."""

import os
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

import torch
from anomalib.engine.plugins.checkpoint_io import AnomalibCheckpointIO
from lightning.fabric.utilities.cloud_io import _is_local_file_protocol
from lightning.fabric.utilities.types import _PATH
from torch import nn


class AtomicCheckpointIO(AnomalibCheckpointIO):
    """Writes a checkpoint beside its place and moves it there when it is complete and on the disk.

    Lightning writes into the folder for temporary files, and where that is another device it copies the file over the
    last checkpoint; whoever is interrupted then has neither of the two.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: _PATH, storage_options: Any | None = None) -> None:  # noqa: ANN401
        """Write a checkpoint; on a remote file system as Lightning does."""
        if not _is_local_file_protocol(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        unfinished = Path(f"{path}.unfinished")
        unfinished.parent.mkdir(parents=True, exist_ok=True)
        with unfinished.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)

    def load_checkpoint(self, path: _PATH, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Check and read a checkpoint."""
        check_archive(path)
        return super().load_checkpoint(path, *args, **kwargs)


def check_finite(network: nn.Module) -> None:
    """Look at a network's weights before they are saved.

    Raises:
        FloatingPointError: If a weight is not finite; a checkpoint of it would be of no use.
    """
    if broken := [name for name, value in network.named_parameters() if not value.isfinite().all()]:
        msg = f"no checkpoint: the values of {', '.join(broken)} are not finite. Lower the learning rates."
        raise FloatingPointError(msg)


def state_of(checkpoint: dict[str, Any], model: str) -> dict[str, Any]:
    """What a model has put into a checkpoint under its name.

    Raises:
        ValueError: If the checkpoint is of another model.
    """
    if model not in checkpoint:
        msg = f"this is not a checkpoint of {model}; it holds a model of another class"
        raise ValueError(msg)
    return checkpoint[model]


def keep_metrics_of(module: nn.Module, checkpoint: dict[str, Any]) -> None:
    """Let a checkpoint have the metrics of the module that reads it: a model can be tested with any."""
    metrics = {name: value for name, value in module.state_dict().items() if name.startswith("evaluator.")}
    weights = {k: v for k, v in checkpoint["state_dict"].items() if not k.startswith("evaluator.")}
    checkpoint["state_dict"] = weights | metrics


def check_archive(path: _PATH) -> None:
    """Compare a local file of ``torch.save`` with the checksums in it; ``torch.load`` does not.

    Raises:
        ValueError: If the file is damaged or of another kind.
    """
    if not Path(path).is_file():  # remote, or missing, which its reader will say
        return
    try:
        with ZipFile(path) as archive:
            damaged = archive.testzip()
    except BadZipFile as error:
        msg = f"{path} was not written by torch.save, or is cut off: {error}"
        raise ValueError(msg) from error
    if damaged:
        msg = f"{path} is damaged: the checksum of {damaged} is wrong; take another copy of the file"
        raise ValueError(msg)
