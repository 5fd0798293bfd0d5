"""Post-training quantization of an OpenVINO model on normal training images."""

from collections.abc import Collection
from copy import copy
from typing import cast

import numpy as np
import openvino
import torch
from anomalib.data import AnomalibDataModule
from openvino import Model, Node, Output, opset13
from torchvision.transforms.v2.functional import resize

from anomalib_raad.progress import progress

_IMAGES = 300  # NNCF's own number of images that serve
_COMPARED = 32  # of them, whose maps are compared


def quantize(model: Model, datamodule: AnomalibDataModule | None, integer: Collection[str]) -> Model:
    """Quantize layers of an anomaly detector to 8 bits, with ranges from normal training images.

    Rounding makes what is compared differ a little everywhere. What that adds to the maps of normal images is
    subtracted again, so that thresholds keep their meaning.

    Args:
        model: Maps images in [0, 1] to an anomaly map, of which the score is the maximum.
        datamodule: Of the images; those for validation and test are not read.
        integer: OpenVINO's types of the layers.

    Raises:
        ValueError: If there is no datamodule.
    """
    import nncf  # noqa: PLC0415  # slow to import

    if datamodule is None:
        msg = "INT8_PTQ needs normal images to find the ranges of the features: pass a datamodule (--data)"
        raise ValueError(msg)
    datamodule.setup("fit")
    data, shape = copy(datamodule.train_data), model.input(0).partial_shape
    data.augmentations = None
    size = [shape[2].get_length(), shape[3].get_length()] if shape[2].is_static else None

    def read(index: int) -> np.ndarray:
        image = cast("torch.Tensor", data[index].image)[None]
        return (resize(image, size, antialias=True) if size else image).numpy()

    indices = range(0, len(data), max(len(data) // _IMAGES, 1))
    ignored = nncf.IgnoredScope(names=_in_full_precision(model, integer), validate=False)
    quantized = nncf.quantize(model, nncf.Dataset(indices, read), subset_size=_IMAGES, ignored_scope=ignored)
    before, after = _compiled_map(model), _compiled_map(quantized)
    added = [
        after(image)[0].mean() - before(image)[0].mean()
        for image in map(read, progress(indices[:: max(len(indices) // _COMPARED, 1)], "What rounding adds"))
    ]
    _subtract_from_map_(quantized, float(np.mean(added)))
    return quantized


def _in_full_precision(model: Model, integer: Collection[str]) -> list[str]:
    """Names of what is not quantized: everything but layers of some types that see features.

    Normal images show the range of features, not that of anomaly maps, which an anomaly exceeds: a map of 8 bits would
    be cut off at the highest normal score.
    """
    return [
        op.get_friendly_name()
        for op in model.get_ordered_ops()
        if op.get_type_name() not in integer or not _sees_features(op)
    ]


def _sees_features(op: Node) -> bool:
    """Whether a layer has weights of its own and sees more than an anomaly map."""
    if op.get_type_name() != "MatMul":
        return op.input(0).get_partial_shape()[1] != 1
    matrix = op.input_value(1).get_node()
    while matrix.get_type_name() in {"Convert", "Transpose"}:
        matrix = matrix.input_value(0).get_node()
    return matrix.get_type_name() == "Constant"


def _map(model: Model) -> Output:
    """The anomaly map before its post-processing: what the last maximum, the score, is taken of, or of its means."""
    maxima = [op for op in model.get_ordered_ops() if op.get_type_name() == "ReduceMax"]
    output = maxima[-1].input(0).get_source_output()
    node = output.get_node()
    return node.input(0).get_source_output() if node.get_type_name() == "AvgPool" else output


def _compiled_map(model: Model) -> openvino.CompiledModel:
    maps = Model([_map(model)], model.get_parameters())
    return openvino.compile_model(maps, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})


def _subtract_from_map_(model: Model, value: float) -> None:
    output = _map(model)
    readers = output.get_target_inputs()
    corrected = opset13.subtract(output, opset13.constant(np.float32(value)))
    for reader in readers:
        reader.replace_source_output(corrected.output(0))
