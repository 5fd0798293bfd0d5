import numpy as np
import pytest

openvino = pytest.importorskip("openvino")
from openvino import opset13  # noqa: E402

from anomalib_raad.export.pooling import pool_by_resizing_  # noqa: E402


def pooling(pad: int, rank: int = -1) -> openvino.Model:
    """Average pooling and a quantizer of 256 levels behind it."""
    x = opset13.parameter([1, 16, rank, rank], np.float32)
    y = opset13.avg_pool(x, [2, 2], [pad, pad], [pad, pad], [2, 2], exclude_pad=False)
    low, high = np.float32(0), np.float32(1)
    return openvino.Model([opset13.fake_quantize(y, low, high, low, high, 256)], [x], "pooling")


def run(model: openvino.Model, x: np.ndarray) -> np.ndarray:
    return openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(x)[0]


@pytest.mark.parametrize("size", [(8, 8), (9, 7), (253, 126)])
def test_a_resize_is_the_pooling(size: tuple[int, int]) -> None:
    # Sums of four 8-bit values whose quarter is never between two of the quantizer's 256 levels
    x = np.random.default_rng(0).integers(0, 64, (1, 16, *size)).astype(np.float32) * np.float32(4 / 255)
    model = pooling(0)
    expected = run(model, x)
    pool_by_resizing_(model)
    assert "AvgPool" not in {operation.get_type_name() for operation in model.get_ordered_ops()}
    np.testing.assert_allclose(run(model, x), expected, rtol=0, atol=1e-6)


def test_a_padded_pooling_stays() -> None:
    model = pooling(1)
    pool_by_resizing_(model)
    assert "AvgPool" in {operation.get_type_name() for operation in model.get_ordered_ops()}
