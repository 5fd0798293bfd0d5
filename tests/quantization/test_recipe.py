import json

import pytest
import torch
from torch import nn

from anomalib_raad.quantization.allocation import Allocation
from anomalib_raad.quantization.layers import make_quantizable_, quantizable_layers
from anomalib_raad.quantization.recipe import Outcome, quantize_, recorded_inputs
from anomalib_raad.quantization.reconstruction import BlockNetwork, Reconstruction
from anomalib_raad.quantization.size import model_bytes

NAMES = ["0", "1", "2"]


class Network(nn.Sequential, BlockNetwork):
    """Three 1x1 convolutions, each a block."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1))
        make_quantizable_(self)

    def blocks(self) -> list[nn.Module]:
        return [nn.Sequential(layer) for layer in self]


class Toy(nn.Module):
    """Three networks: the recipe needs nothing of anomalib."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.teacher, self.student, self.ae = Network(), Network(), Network()

    def forward(self, image: torch.Tensor) -> None:
        for network in (self.teacher, self.student, self.ae):
            network(image)

    def aligned_features(self, image: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        pairs, t, s = [], image, image
        for teacher, student in zip(self.teacher, self.student, strict=True):
            t, s = teacher(t), student(s)
            pairs.append((t, s))
        return pairs


@pytest.fixture
def images() -> list[torch.Tensor]:
    return list(torch.rand(4, 1, 3, 6, 6, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize(
    ("allocation", "bits"),
    [
        (Allocation(), [8, 4, 8]),
        (Allocation(bits=3), [8, 3, 8]),
        (Allocation(bits=3, average_bits=1), [8, 3, 8]),
        (Allocation(bits={"1": 3}), [8, 3, 8]),
        (Allocation(bits={"0": 2, "1": 2, "2": 2}), [2, 2, 2]),
        (Allocation(thresholds=(0.97, 0.98, 0.99)), [8, 2, 8]),
        (Allocation(thresholds=(1e-9, 1e-8, 1e-7)), [8, 8, 8]),
        (Allocation(average_bits=8), [8, 8, 8]),
    ],
)
def test_quantize_gives_teacher_and_student_the_same_bits(
    images: list[torch.Tensor],
    allocation: Allocation,
    bits: list[int],
) -> None:
    model = Toy()
    scores, _ = quantize_(model, images, images, allocation)
    assert list(scores) == NAMES
    for network in (model.teacher, model.student):
        layers = quantizable_layers(network).values()
        assert [layer.bits for layer in layers] == bits
        assert [layer.input_quantizer.bits for layer in layers] == bits
    assert [layer.bits for layer in quantizable_layers(model.ae).values()] == [8, 8, 8]


def test_activation_bits(images: list[torch.Tensor]) -> None:
    model = Toy()
    quantize_(model, images, images, Allocation(bits=2, activation_bits=8))
    for network in (model.teacher, model.student, model.ae):
        assert [layer.input_quantizer.bits for layer in quantizable_layers(network).values()] == [8, 8, 8]
    assert [layer.bits for layer in quantizable_layers(model.student).values()] == [8, 2, 8]
    values = model.student[1].quantized_input(torch.linspace(-9, 9, 10_000)).unique()
    assert 16 < len(values) <= 256


def test_the_first_calibration_batches_choose_the_grids(
    images: list[torch.Tensor],
) -> None:
    every, first, two = Toy(), Toy(), Toy()
    quantize_(every, images, images, Allocation())
    quantize_(first, images, images, Allocation(), grid_batches=2)
    quantize_(two, images, images[:2], Allocation())
    assert torch.equal(first.student[1].input_quantizer.scale, two.student[1].input_quantizer.scale)
    assert not torch.equal(first.student[1].input_quantizer.scale, every.student[1].input_quantizer.scale)


def test_quantize_leaves_no_hooks_behind(images: list[torch.Tensor]) -> None:
    model = Toy()
    quantize_(model, images, images, Allocation())
    assert not any(layer._forward_pre_hooks for layer in quantizable_layers(model).values())


def test_outcome_is_plain_values_and_back(images: list[torch.Tensor]) -> None:
    outcome = quantize_(Toy(), images, images, Allocation(bits=2), Reconstruction(iterations=1))
    assert outcome.blocks
    assert Outcome.from_state(json.loads(json.dumps(outcome.state()))) == outcome


def test_recorded_inputs_do_not_keep_whole_feature_maps() -> None:
    layer = Toy().teacher[0]
    with recorded_inputs({"first": layer}) as inputs:
        layer(torch.rand(1, 3, 256, 256))
    (values,) = inputs["first"]
    assert 4000 < len(values) < 5000
    assert values.untyped_storage().nbytes() == 4 * len(values)


def test_model_bytes_counts_bits_and_floats(images: list[torch.Tensor]) -> None:
    model = Toy()
    weights, biases = 3 * (12 + 16 + 8), 3 * 10
    assert model_bytes(model) == 4 * (weights + biases)
    quantize_(model, images, images, Allocation(bits=2))
    packed = 2 * (12 * 8 + 16 * 2 + 8 * 8) // 8 + (12 + 16 + 8)
    steps = 3 * (10 + 3 * 2)
    assert model_bytes(model) == packed + 4 * (biases + steps)
