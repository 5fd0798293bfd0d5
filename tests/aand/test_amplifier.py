import math

import pytest
import torch
from torch import nn

from anomalib_raad.aand.amplifier import Amplifier, position_code

CHANNELS, ITEMS, SIZE = 8, 2, (3, 5)


@pytest.fixture
def amplifier() -> Amplifier:
    torch.manual_seed(0)
    return Amplifier(CHANNELS, ITEMS, temperature=0.2).double()


@pytest.fixture
def features() -> torch.Tensor:
    return torch.randn(2, CHANNELS, *SIZE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def perceptron(layers: nn.Sequential, vector: torch.Tensor) -> torch.Tensor:
    for layer in layers:
        vector = vector.relu() if isinstance(layer, nn.ReLU) else layer.weight[:, :, 0, 0] @ vector + layer.bias
    return vector


def code(column: int, row: int) -> torch.Tensor:
    """The position code of a cell, one channel after another."""
    values, quarter = [], CHANNELS // 4
    for place in (column, row):
        for function in (math.sin, math.cos):
            values += [function(place * 10_000 ** (-2 * j / (CHANNELS / 2))) for j in range(quarter)]
    return torch.tensor(values, dtype=torch.float64)


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a @ b / (a.norm() * b.norm())).item()


def test_each_cell_equals_a_slow_reference(amplifier, features) -> None:
    gate, amplified = amplifier.logits(features).sigmoid(), amplifier(features)
    for image in range(2):
        for row in range(SIZE[0]):
            for column in range(SIZE[1]):
                cell = features[image, :, row, column]
                query = perceptron(amplifier.query, cell + code(column, row))
                shares = [
                    math.exp(cosine(query, item) / 0.2)
                    for items in (amplifier.normal_items, amplifier.anomalous_items)
                    for item in items
                ]
                weight = sum(shares[ITEMS:]) / sum(shares)
                expected = cell + weight * torch.tanh(perceptron(amplifier.scaling, cell)) * cell
                assert float(gate[image, 0, row, column]) == pytest.approx(weight, abs=1e-6)
                torch.testing.assert_close(amplified[image, :, row, column], expected, rtol=0, atol=1e-6)


def test_equal_memories_say_a_half(amplifier, features) -> None:
    amplifier.anomalous_items.data.copy_(amplifier.normal_items)
    assert torch.equal(amplifier.logits(features), torch.zeros(2, 1, *SIZE))


@pytest.mark.parametrize(("temperature", "least"), [(1.0, 0.1192), (0.2, 4.54e-5)])
def test_the_temperature_bounds_the_gate(temperature: float, least: float) -> None:
    amplifier = Amplifier(CHANNELS, 1, temperature)
    amplifier.query = nn.Identity()
    direction = torch.ones(1, CHANNELS, 1, 1)
    query = direction - position_code(direction)
    for sign, expected in ((1.0, least), (-1.0, 1 - least)):
        amplifier.normal_items.data.fill_(sign)
        amplifier.anomalous_items.data.fill_(-sign)
        assert float(amplifier.logits(query).sigmoid()) == pytest.approx(expected, rel=1e-3)


def test_the_gate_does_not_depend_on_the_querys_length(amplifier, features) -> None:
    before = amplifier.logits(features)
    for parameter in amplifier.query[-1].parameters():
        parameter.data.mul_(7)
    torch.testing.assert_close(amplifier.logits(features), before)


def test_signs_stay_and_no_value_is_doubled(amplifier, features) -> None:
    features[:, 0] = 0
    amplified = amplifier(10 * features, gate=torch.ones(2, 1, *SIZE))
    assert torch.equal(amplified.sign(), features.sign())
    assert (amplified.abs() <= 20 * features.abs()).all()


def test_cells_with_label_0_are_the_features_bit_for_bit(amplifier, features) -> None:
    labels = torch.zeros(2, 1, *SIZE).double()
    labels[0, 0, 1, 1] = 1
    changed = (amplifier(features, labels) != features).any(1, keepdim=True)
    assert torch.equal(changed, labels.bool())


def test_channels_that_cannot_code_places__error() -> None:
    with pytest.raises(ValueError, match="a level has 6 channels; the position code needs a number divisible by 4"):
        Amplifier(6)
