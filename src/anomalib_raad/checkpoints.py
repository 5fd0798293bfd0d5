"""Checkpoints that a power cut cannot spoil."""

import os
from pathlib import Path
from typing import Any

import torch
from anomalib.engine.plugins.checkpoint_io import AnomalibCheckpointIO
from lightning.fabric.utilities.cloud_io import _is_local_file_protocol
from lightning.fabric.utilities.types import _PATH


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
