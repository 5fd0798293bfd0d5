from copy import deepcopy
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import nn

from anomalib_raad.quantization import reconstruction
from anomalib_raad.quantization.layers import QuantConv2d, make_quantizable_
from anomalib_raad.quantization.quantizers import WeightQuantizer
from anomalib_raad.quantization.reconstruction import Reconstruction, fisher_weights, reconstruct_
from anomalib_raad.quantization.uniform import weight_range

BITS = 2
TOY = Reconstruction(regularization=10.0)  # for blocks of a hundred weights instead of a million


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def inputs() -> torch.Tensor:
    """Strongly correlated inputs, for which the nearest weight is not the best one."""
    torch.manual_seed(0)
    return (torch.randn(64, 1, 6, 6) + 0.3 * torch.randn(64, 4, 6, 6)).relu()


def toy_blocks() -> list[nn.Module]:
    torch.manual_seed(1)
    first = nn.Sequential(nn.Conv2d(4, 6, 2), nn.ReLU(), nn.Conv2d(6, 5, 1), nn.ReLU())
    return [make_quantizable_(first), make_quantizable_(nn.Sequential(nn.Conv2d(5, 3, 2)))]


def quantized(blocks: list[nn.Module], bits: int = BITS, input_bits: bool = True) -> list[nn.Module]:
    blocks = deepcopy(blocks)
    for block in blocks:
        for layer in block:
            if isinstance(layer, QuantConv2d):
                layer.quantize_weight_(bits)
                if input_bits:
                    layer.quantize_input_(torch.linspace(0, 3, 1000), bits)
    return blocks


def test_rounding_is_among_the_best_of_all(inputs, generator) -> None:
    """Brute force over every way to round the weights of one small layer."""
    reference = [make_quantizable_(nn.Sequential(nn.Conv2d(4, 1, (2, 1))))]
    reference[0][0].weight.data = torch.linspace(0.3, 0.45, 8).view(1, 4, 2, 1)  # nearest rounding makes them all 0
    blocks = quantized(reference, input_bits=False)
    layer, target = blocks[0][0], reference[0](inputs).detach()
    layer.weight_quantizer.scale.fill_(1.0)
    floor = layer.weight.detach().floor()
    errors = []
    for up in product((0, 1), repeat=floor.numel()):
        weight = (floor + torch.tensor(up).view_as(floor)).clamp(*weight_range(BITS)) * layer.weight_quantizer.scale
        output = nn.functional.conv2d(inputs, weight, layer.bias.detach())
        errors.append(float((output - target).square().sum(1).mean()))
    (report,) = reconstruct_("toy", blocks, reference, inputs, replace(TOY, iterations=400), generator)
    better = sum(error < report.learned * 0.9999 for error in errors)
    assert better < 0.15 * len(errors)
    assert report.learned < 0.1 * report.nearest


def test_weights_end_on_their_grid_one_step_from_where_they_were(inputs, generator) -> None:
    reference = toy_blocks()
    blocks = quantized(reference)
    before = deepcopy(blocks)
    reconstruct_("toy", blocks, reference, inputs, replace(TOY, iterations=50), generator)
    for block, old in zip(blocks, before, strict=True):
        for layer, start in zip(block, old, strict=True):
            if not isinstance(layer, QuantConv2d):
                continue
            assert type(layer.weight_quantizer) is WeightQuantizer
            torch.testing.assert_close(layer.quantized_weight(), layer.weight, rtol=0, atol=1e-7)
            assert all(len(channel.unique()) <= 2**BITS for channel in layer.weight)
            inside = (start.weight / start.weight_quantizer.scale).abs() < 1
            moved = (layer.weight - start.weight).abs() / start.weight_quantizer.scale
            assert moved[inside].max() <= 1


def test_reports_hold_the_errors_of_the_blocks(inputs, generator, monkeypatch) -> None:
    weights = [torch.linspace(0.5, 1.5, channels).view(1, -1, 1, 1) for channels in (5, 3)]
    monkeypatch.setattr(reconstruction, "fisher_weights", lambda rest, *_: weights[1 - len(rest)])
    reference = toy_blocks()
    blocks = quantized(reference)
    reports = reconstruct_("toy", blocks, reference, inputs, replace(TOY, iterations=200), generator)
    given = wanted = inputs
    for block, float_block, report, weight in zip(blocks, reference, reports, weights, strict=True):
        with torch.no_grad():
            given, wanted = block(given), float_block(wanted)
        error = ((given - wanted).square() * weight).sum(1).mean()
        assert report.learned == pytest.approx(float(error), rel=1e-4)
        assert report.learned < 0.9 * report.nearest


def test_the_scale_of_a_blocks_output_changes_no_rounding(inputs) -> None:
    small = toy_blocks()
    large = deepcopy(small)
    with torch.no_grad():
        large[0][2].weight.mul_(2**-6)
        large[0][2].bias.mul_(2**-6)
    settings = replace(TOY, iterations=50)
    learned = []
    for reference in (small, large):
        blocks = quantized(reference)
        generator = torch.Generator().manual_seed(0)
        report, *_ = reconstruct_("toy", blocks[:1], reference[:1], inputs, settings, generator)
        learned.append((report, blocks[0][2].weight_quantizer.integers(blocks[0][2].weight)))
    (report, weight), (scaled_report, scaled_weight) = learned
    assert report.learned < report.nearest
    assert scaled_report.learned == pytest.approx(report.learned * 2**-12, rel=1e-3)
    assert torch.equal(weight, scaled_weight)


@pytest.mark.parametrize("bias", [0.0, -1e3], ids=["wild", "silent"])  # nothing a silent block does has an error
def test_a_reconstruction_that_fails_keeps_nearest_rounding(bias, inputs, generator) -> None:
    reference = toy_blocks()
    with torch.no_grad():
        reference[0][2].bias.add_(bias)
    blocks = quantized(reference)
    before = deepcopy(blocks[0].state_dict())
    wild = replace(TOY, iterations=5, rounding_lr=50.0, scale_lr=3.0)
    report, *_ = reconstruct_("toy", blocks, reference, inputs, wild, generator)
    assert report.learned == report.nearest
    assert all(
        torch.equal(value, before[name]) for name, value in blocks[0].state_dict().items() if torch.is_tensor(value)
    )


def test_blocks_of_8_bits_keep_nearest_rounding(inputs, generator) -> None:
    reference = toy_blocks()
    blocks = quantized(reference, bits=8)
    before = deepcopy(blocks)
    assert reconstruct_("toy", blocks, reference, inputs, Reconstruction(), generator) == []
    assert all(
        torch.equal(a, b)
        for a, b in zip(nn.ModuleList(blocks).parameters(), nn.ModuleList(before).parameters(), strict=True)
    )


def test_fisher_weights_equal_the_brute_force_diagonal(generator) -> None:
    """E[g^2] for g = J^T eps is the sum of the squares of a column of J; a loop over outputs and inputs."""
    torch.manual_seed(2)
    rest = [nn.Sequential(nn.Conv2d(3, 4, 2), nn.ReLU()), nn.Conv2d(4, 2, 1)]
    outputs = torch.rand(2, 3, 4, 4)
    jacobian = torch.autograd.functional.jacobian(lambda z: rest[1](rest[0](z)), outputs)  # (y..., z...)
    diagonal = jacobian.flatten(0, 3).square().sum(0)
    expected = diagonal.mean((0, 2, 3))
    weights = fisher_weights(rest, outputs, generator, probes=3000)
    torch.testing.assert_close(weights.flatten(), expected / expected.mean(), rtol=0.1, atol=0)


def test_the_last_blocks_channels_weigh_alike(generator) -> None:
    assert fisher_weights([], torch.rand(64, 5, 9, 9), generator, probes=200).flatten().tolist() == pytest.approx(
        [1.0] * 5, abs=0.02
    )
