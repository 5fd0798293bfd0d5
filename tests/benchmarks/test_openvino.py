import numpy as np
import pytest

openvino = pytest.importorskip("openvino")
from openvino import opset13  # noqa: E402

from anomalib_raad.export.openvino import convolutions  # noqa: E402
from benchmarks.openvino import _peak_model, multiply_adds  # noqa: E402


def test_multiply_adds_of_a_convolution() -> None:
    x = opset13.parameter([1, 3, 8, 9], np.float32)
    kernel = opset13.constant(np.ones((5, 3, 2, 2), dtype=np.float32))
    y = opset13.convolution(x, kernel, [1, 1], [0, 0], [0, 0], [1, 1])
    assert multiply_adds(openvino.Model([y], [x], "one")) == 7 * 8 * 5 * 3 * 4


def test_multiply_adds_of_grouped_and_transposed_convolutions() -> None:
    x = opset13.parameter([1, 4, 8, 8], np.float32)
    kernel = opset13.constant(np.ones((4, 1, 1, 3, 3), dtype=np.float32))
    y = opset13.group_convolution(x, kernel, [1, 1], [1, 1], [1, 1], [1, 1])
    doubling = opset13.constant(np.ones((4, 6, 2, 2), dtype=np.float32))
    z = opset13.convolution_backprop_data(y, doubling, strides=[2, 2])
    assert multiply_adds(openvino.Model([z], [x], "two")) == 4 * 64 * 9 + 4 * 64 * 6 * 4


def test_peak_is_taken_in_integers() -> None:
    assert convolutions(openvino.Core().compile_model(_peak_model(), "CPU")) == {"u8": 4}
