"""Average pooling in an operator into which OpenVINO fuses the quantizer behind it."""

import numpy as np
from openvino import Model, Node, opset13

_POOLING_BY_TWO = {"kernel": [2, 2], "strides": [2, 2], "pads_begin": [0, 0], "pads_end": [0, 0]}


def pool_by_resizing_(model: Model) -> None:
    """Write every average pooling of 2x2 pixels without padding as a bilinear reduction by a half, in place.

    The bilinear value in the middle of four pixels is their mean. The CPU plugin makes one node of a resize and the
    quantizer that follows. Behind a pooling it would write floats, change their layout, quantize them and change the
    layout back.
    """
    for operation in model.get_ordered_ops():
        if operation.get_type_name() == "AvgPool" and _is_by_two(operation):
            resized = opset13.interpolate(
                operation.input_value(0),
                np.array([0.5, 0.5], dtype=np.float32),
                mode="linear_onnx",
                shape_calculation_mode="scales",
                axes=np.array([2, 3]),
            )
            operation.output(0).replace(resized.output(0))


def _is_by_two(pooling: Node) -> bool:
    attributes = pooling.get_attributes()
    return all(list(attributes[name]) == value for name, value in _POOLING_BY_TWO.items())
