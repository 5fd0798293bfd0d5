"""Weights of an OpenVINO model in as few bits as hold them; the runtime unpacks them when it loads the model."""

import numpy as np
from openvino import Model, Node, Shape, Tensor, Type, opset13

_CONVOLUTION_DIMENSIONS = 4


def pack_weights_(model: Model) -> None:
    """Store every 8-bit convolution weight of a model in 2 or 4 bits if its values allow, in place.

    ``u2`` holds -2 to 1 as 0 to 3, ``i4`` holds -8 to 7; 3-bit weights take 4 bits. The packed model computes exactly
    what the unpacked one does.
    """
    for constant in model.get_ordered_ops():
        if constant.get_type_name() != "Constant" or constant.get_element_type() != Type.i8:
            continue
        values = constant.data
        if values.ndim < _CONVOLUTION_DIMENSIONS:
            continue
        if values.min() >= -2 and values.max() <= 1:
            unpacked = opset13.add(_stored(values + 2, Type.u2), opset13.constant(np.int8(-2)))
        elif values.min() >= -8 and values.max() <= 7:
            unpacked = _stored(values, Type.i4)
        else:
            continue
        constant.output(0).replace(unpacked.output(0))


def _stored(values: np.ndarray, kind: Type) -> Node:
    """Integers stored in a type of less than 8 bits, least significant bits first, and converted back to 8."""
    per_byte = 8 // kind.bitwidth
    digits = values.ravel().astype(np.uint8) & (2**kind.bitwidth - 1)
    digits = np.pad(digits, (0, -len(digits) % per_byte)).reshape(-1, per_byte)
    tensor = Tensor(kind, Shape(values.shape))
    tensor.data.ravel()[:] = np.bitwise_or.reduce(
        digits << (kind.bitwidth * np.arange(per_byte, dtype=np.uint8)), axis=1
    )
    return opset13.convert(opset13.constant(tensor), Type.i8)
