"""The diagnostics of a finished run, from the checkpoint of its first stage and its normal training images."""

from pathlib import Path

import torch
from anomalib.data import AnomalibDataModule

from anomalib_raad.fit.images import NormalImages
from anomalib_raad.report.diagnostics import diagnose, write_diagnostics

from .lightning_model import Raad

_HELD_OUT, _CALIBRATION = 4, 32  # images; of the held-out each is run once for every layer and bit-width


def diagnose_run(results: Path, trained: Path, datamodule: AnomalibDataModule) -> Path:
    """Write ``diagnostics.json`` and ``diagnostics.png`` into the results folder of a run.

    Args:
        results: The folder.
        trained: The checkpoint before quantization.
        datamodule: The run's data, set up.

    Returns:
        Path of the picture.
    """
    raad = Raad.load_from_checkpoint(trained, map_location="cpu").eval()
    images = NormalImages(datamodule, raad.held_out, int(raad.run_seed))

    def seen(indices: list[int]) -> list[torch.Tensor]:
        return [raad.transform(image) if raad.transform else image for image in images.plain(indices)]

    held_out, calibration = seen(images.held_out[:_HELD_OUT]), seen(images.kept[:_CALIBRATION])
    diagnostics = diagnose(raad.model, held_out, calibration, raad.allocation.activation_bits)
    return write_diagnostics(results, diagnostics)
