import math

import pytest
import torch
from torch import nn

from anomalib_raad.quantization.layers import make_quantizable_, quantizable_layers
from anomalib_raad.quantization.recipe import Allocation, Outcome, _recorded_inputs, model_bytes, quantize_

NAMES = ["0", "1", "2"]


class Toy(nn.Module):
    """Three 1x1 convolutions a network: the recipe needs nothing of anomalib."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        for name in ("teacher", "student", "ae"):
            setattr(
                self, name, make_quantizable_(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1)))
            )

    def forward(self, image: torch.Tensor) -> None:
        for network in (self.teacher, self.student, self.ae):
            network(image)

    def blocks(self, network: nn.Module) -> nn.Module:
        return network

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
    scores, *_ = quantize_(model, images, images, allocation)
    assert list(scores) == NAMES
    for network in (model.teacher, model.student):
        layers = quantizable_layers(network).values()
        assert [layer.bits for layer in layers] == bits
        assert [layer.input_bits for layer in layers] == bits
    assert [layer.bits for layer in quantizable_layers(model.ae).values()] == [8, 8, 8]


def test_activation_bits(images: list[torch.Tensor]) -> None:
    model = Toy()
    quantize_(model, images, images, Allocation(bits=2, activation_bits=8))
    for network in (model.teacher, model.student, model.ae):
        assert [layer.input_bits for layer in quantizable_layers(network).values()] == [8, 8, 8]
    assert [layer.bits for layer in quantizable_layers(model.student).values()] == [8, 2, 8]
    values = model.student[1].quantized_input(torch.linspace(-9, 9, 10_000)).unique()
    assert 16 < len(values) <= 256


def test_the_first_calibration_batches_choose_the_grids(
    images: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    every, first, two = Toy(), Toy(), Toy()
    quantize_(every, images, images, Allocation())
    monkeypatch.setattr("anomalib_raad.quantization.recipe._GRID_BATCHES", 2)
    quantize_(first, images, images, Allocation())
    quantize_(two, images, images[:2], Allocation())
    assert torch.equal(first.student[1].input_step, two.student[1].input_step)
    assert not torch.equal(first.student[1].input_step, every.student[1].input_step)


def test_quantize_leaves_no_hooks_behind(images: list[torch.Tensor]) -> None:
    model = Toy()
    quantize_(model, images, images, Allocation())
    assert not any(layer._forward_pre_hooks for layer in quantizable_layers(model).values())


def test_sensitivity_is_the_change_of_the_map_by_one_layer_alone(images: list[torch.Tensor]) -> None:
    model, trial = Toy(), Toy()
    outcome = quantize_(model, images, images, Allocation())
    for network in (trial.teacher, trial.student):
        network[1].quantize_(3, torch.cat([network[0](image).flatten() for image in images]))
    changes, means = [], []
    for image in images:
        before, after = ((net.teacher(image) - net.student(image)).square().mean(dim=1) for net in (Toy(), trial))
        changes.append((after - before).abs().mean())
        means.append(before.mean())
    assert outcome.sensitivity["1"][3] == pytest.approx((sum(changes) / sum(means)).item(), rel=1e-5)
    assert list(outcome.sensitivity) == NAMES
    for moves in outcome.sensitivity.values():
        assert moves[2] > moves[4] > moves[8] > 0


def test_signal_to_noise_of_the_weights(images: list[torch.Tensor]) -> None:
    model, before = Toy(), Toy()
    outcome = quantize_(model, images, images, Allocation(bits=2))
    for network, weight in (("teacher", before.teacher[1].weight), ("ae", before.ae[1].weight)):
        noise = weight - getattr(model, network)[1].quantized_weight()
        expected = 10 * math.log10(float(weight.square().sum() / noise.square().sum()))
        assert outcome.sqnr_db[f"{network}.1"] == pytest.approx(expected, rel=1e-5)
    assert outcome.sqnr_db["ae.1"] > outcome.sqnr_db["teacher.1"] + 20  # 6 dB a bit


def test_outcome_of_an_earlier_version() -> None:
    state = {
        "scores": {"0": 0.5},
        "misalignment": {"0": 0.1},
        "blocks": [{"layers": ["0"], "nearest": 2, "learned": 1}],
    }
    outcome = Outcome.from_state(state)
    assert outcome.state() == state | {"sensitivity": {}, "sqnr_db": {}}


def test_recorded_inputs_do_not_keep_whole_feature_maps() -> None:
    layer = Toy().teacher[0]
    with _recorded_inputs({"first": layer}) as inputs:
        layer(torch.rand(1, 3, 256, 256))
    (values,) = inputs["first"]
    assert 4000 < len(values) < 5000
    assert values.untyped_storage().nbytes() == 4 * len(values)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 5}, "bits is 5"),
        ({"bits": {"conv2": 6}}, "conv2 is 6"),
        ({"first_last_bits": 16}, "first_last_bits is 16"),
        ({"activation_bits": 5}, "activation_bits is 5"),
        ({"autoencoder_bits": 1}, "autoencoder_bits is 1"),
        ({"thresholds": (0.5, 0.4, 0.9)}, "three increasing numbers"),
        ({"thresholds": (0.5, 0.6)}, "three increasing numbers"),
    ],
)
def test_allocation__error(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Allocation(**options)


def test_allot__error() -> None:
    with pytest.raises(ValueError, match=r"unknown layers \['conv9'\]"):
        Allocation(bits={"conv9": 4}, average_bits=8).allot({"conv1": 0.5, "conv2": 0.5}, {"conv1": 1, "conv2": 1})


def test_model_bytes_counts_bits_and_floats(images: list[torch.Tensor]) -> None:
    model = Toy()
    weights, biases = 3 * (12 + 16 + 8), 3 * 10
    assert model_bytes(model) == 4 * (weights + biases)
    quantize_(model, images, images, Allocation(bits=2))
    packed = 2 * (12 * 8 + 16 * 2 + 8 * 8) // 8 + (12 + 16 + 8)
    steps = 3 * (10 + 3 * 2)
    assert model_bytes(model) == packed + 4 * (biases + steps)
