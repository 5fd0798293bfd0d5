import numpy as np
import pytest
import torch

from anomalib_raad.quantization.uniform import (
    BITS,
    check_bits,
    fake_quantize,
    input_range,
    search_input_grid,
    search_weight_scale,
    weight_range,
)


@pytest.mark.parametrize("bits", BITS)
def test_fake_quantize_equals_torchs_own_operator(bits: int) -> None:
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(bits))
    scale, zero_point = 0.125, 1  # a power of two: division and multiplication by the inverse agree
    low, high = input_range(bits)
    expected = torch.fake_quantize_per_tensor_affine(x, scale, zero_point, low, high)
    assert torch.equal(fake_quantize(x, torch.tensor(scale), zero_point, low, high), expected)


@pytest.mark.parametrize("bits", BITS)
def test_fake_quantize_equals_integer_arithmetic(bits: int) -> None:
    x = np.random.default_rng(bits).normal(size=1000).astype(np.float32)
    low, high = weight_range(bits)
    scale = np.float32(0.1)
    integers = np.clip(np.rint(x / scale), low, high).astype(np.int8)
    expected = integers.astype(np.float32) * scale
    actual = fake_quantize(torch.from_numpy(x), torch.tensor(scale), 0, low, high).numpy()
    np.testing.assert_array_equal(actual, expected)
    assert len(np.unique(actual)) <= 2**bits


def test_two_products_fit_16_bits_signed() -> None:
    """What integer kernels without VNNI need to be exact, at each bit-width."""
    assert [weight_range(bits) for bits in BITS] == [(-2, 1), (-4, 3), (-8, 7), (-64, 63)]
    _, largest_input = input_range(8)
    assert all(2 * largest_input * -weight_range(bits)[0] < 2**15 for bits in BITS)
    assert 2 * largest_input * 65 >= 2**15


def test_gradient_passes_rounding_and_stops_at_clipping() -> None:
    x = torch.tensor([-9.0, -1.2, 0.3, 1.4, 9.0], requires_grad=True)
    fake_quantize(x, torch.tensor(1.0), 0, -2, 1).sum().backward()
    assert x.grad.tolist() == [0.0, 1.0, 1.0, 0.0, 0.0]


@pytest.mark.parametrize("bits", BITS)
def test_weight_scale_is_as_good_as_a_fine_brute_force_search(bits: int) -> None:
    weight = torch.randn(3, 32, 4, 4, generator=torch.Generator().manual_seed(0))
    low, high = weight_range(bits)
    scale = search_weight_scale(weight, bits)
    assert scale.shape == (3, 1, 1, 1)
    error = (fake_quantize(weight, scale, 0, low, high) - weight).square().sum((1, 2, 3))
    for channel in range(3):
        candidates = torch.linspace(1e-3, float(weight[channel].abs().max()) * 2, 2000)
        errors = [
            (fake_quantize(weight[channel], c, 0, low, high) - weight[channel]).square().sum() for c in candidates
        ]
        assert error[channel] <= 1.02 * min(errors)


def test_weight_scale_of_a_channel_of_zeros_keeps_the_zeros() -> None:
    weight = torch.zeros(1, 2, 3, 3)
    assert torch.equal(fake_quantize(weight, search_weight_scale(weight, 2), 0, *weight_range(2)), weight)


@pytest.mark.parametrize("bits", BITS)
def test_input_grid_holds_zero_exactly(bits: int) -> None:
    values = torch.randn(2000, generator=torch.Generator().manual_seed(1)) + 0.3
    scale, zero_point = search_input_grid(values, bits)
    assert scale > 0
    assert zero_point == zero_point.round()
    assert fake_quantize(torch.zeros(1), scale, zero_point, *input_range(bits)).item() == 0.0


def test_input_grid_of_relu_outputs_has_zero_point_zero() -> None:
    _, zero_point = search_input_grid(torch.randn(500).relu(), 4)
    assert zero_point == 0


def test_input_grid_of_8_bits_is_fine() -> None:
    values = torch.linspace(0, 1, 256)
    scale, zero_point = search_input_grid(values, 8)
    error = (fake_quantize(values, scale, zero_point, *input_range(8)) - values).abs().max()
    assert error < 1e-6


def test_input_grid_of_a_constant_zero() -> None:
    scale, zero_point = search_input_grid(torch.zeros(10), 8)
    assert torch.equal(fake_quantize(torch.zeros(3), scale, zero_point, 0, 255), torch.zeros(3))


@pytest.mark.parametrize("bits", [0, 1, 5, 6, 16])
def test_check_bits__error(bits: int) -> None:
    with pytest.raises(ValueError, match=f"first_last_bits is {bits}; RAAD quantizes to 2, 3, 4, 8 bits"):
        check_bits("first_last_bits", bits)


def test_the_scales_gradient_is_that_of_learned_step_sizes() -> None:
    """LSQ, Eq. 3: the rounding error in cells for a value inside the grid, the grid's end outside."""
    scale = torch.tensor([[0.5], [2.0]], requires_grad=True)
    x = torch.tensor([[0.4, -0.1, 9.0], [0.6, -9.0, 3.9]])
    fake_quantize(x, scale, 0, -2, 1).sum().backward()
    assert scale.grad.flatten().tolist() == pytest.approx([(1 - 0.8) + (0 + 0.2) + 1, (0 - 0.3) - 2 + 1])
