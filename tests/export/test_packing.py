import numpy as np
import pytest

openvino = pytest.importorskip("openvino")

from openvino import opset13  # noqa: E402

from anomalib_raad.export.packing import pack_weights_  # noqa: E402


@pytest.mark.parametrize("size", [64, 1])
def test_pack_weights(size: int) -> None:
    """A convolution of an 8-bit constant, with every value a type can hold."""
    for low, high, kind in ((-2, 1, "u2"), (-8, 7, "i4"), (-9, 7, None), (-128, 127, None)):
        values = np.resize(np.arange(low, high + 1), (size, 3, 1, 1)).astype(np.int8)
        weights = opset13.multiply(opset13.convert(opset13.constant(values), openvino.Type.f32), np.float32(0.5))
        image = opset13.parameter([1, 3, 2, 2], openvino.Type.f32)
        output = opset13.convolution(image, weights, [1, 1], [0, 0], [0, 0], [1, 1])
        model, x = openvino.Model([output], [image]), np.random.default_rng(0).random((1, 3, 2, 2), np.float32)
        before = openvino.compile_model(model.clone(), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(x)[0]
        pack_weights_(model)
        types = {operation.get_element_type().get_type_name() for operation in model.get_ops()}
        assert (kind in types) if kind else not types & {"u2", "i4"}
        after = openvino.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(x)[0]
        np.testing.assert_array_equal(after, before)
