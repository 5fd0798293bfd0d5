"""The diagnostics of a finished run, from the checkpoint of its first stage and its normal training images."""

from pathlib import Path

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
    images = NormalImages(datamodule, raad.held_out, int(raad.run_seed), _CALIBRATION, raad.transform)
    held_out = list(images.prepared(images.held_out[:_HELD_OUT], "Held-out images"))
    calibration = images.prepared(images.calibration, "Inputs of the layers")
    diagnostics = diagnose(raad.model, held_out, calibration, raad.allocation.activation_bits)
    return write_diagnostics(results, diagnostics)
