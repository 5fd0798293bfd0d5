"""Post-training quantization of an OpenVINO model on normal training images."""

from typing import Any, cast

import torch
from anomalib.data import AnomalibDataModule

_IMAGES = 300  # NNCF's own number of images that serve


def quantize(model: Any, datamodule: AnomalibDataModule | None) -> Any:  # noqa: ANN401  # openvino.Model, which is optional
    """Quantize a model to 8 bits, with ranges from at most 300 normal training images.

    Args:
        model: An ``openvino.Model`` of images in [0, 1].
        datamodule: Of the images; those of its test set are not read.

    Raises:
        ValueError: If there is no datamodule.
    """
    import nncf  # noqa: PLC0415  # optional

    if datamodule is None:
        msg = "INT8_PTQ needs normal images to find the ranges of the features: pass a datamodule (--data)"
        raise ValueError(msg)
    datamodule.setup("fit")
    data = datamodule.train_data
    indices = range(0, len(data), max(len(data) // _IMAGES, 1))
    calibration = nncf.Dataset(
        list(indices)[:_IMAGES], lambda index: cast("torch.Tensor", data[index].image)[None].numpy()
    )
    return nncf.quantize(model, calibration, subset_size=_IMAGES)
