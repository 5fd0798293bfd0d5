from copy import deepcopy

import pytest
import torch
from torch import nn

from anomalib_raad import RaadModel
from anomalib_raad.quantization.allocation import Allocation
from anomalib_raad.quantization.layers import quantizable_layers
from anomalib_raad.quantization.recipe import quantize_
from anomalib_raad.raad.student_head import equalize_head_input_


def test_solving_the_student_lowers_both_its_losses_and_leaves_its_inner_layers(untrained) -> None:
    model, images = untrained
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with torch.no_grad():
        torch.manual_seed(1)  # both times the same augmentation
        random = [model.losses(image) for image in images]
        model.solve_student_(images, map(model.teacher, images), seed=0)
        torch.manual_seed(1)
        solved = [model.losses(image) for image in images]
        energy = sum(model.ae(image, (24, 24)).square().mean() for image in images)
    assert sum(losses.stae for losses in solved) < 0.5 * energy
    for term in ("st", "stae"):
        assert sum(getattr(losses, term) for losses in solved) < 0.5 * sum(getattr(losses, term) for losses in random)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != name.startswith("student.conv4"), name


def test_solving_mends_what_quantization_did(untrained) -> None:
    """At 3 bits the maps of normal images grow; afterwards they are close to what they were."""
    model, images = untrained
    model.solve_student_(images, map(model.teacher, images), seed=0)
    before = deepcopy(model)
    quantize_(model, images, images, Allocation(bits=3))
    model.set_teacher_statistics_(map(model.teacher, images))

    def mean_map(some: RaadModel) -> float:
        with torch.no_grad():
            return float(sum(some.maps(image)[0].mean() for image in images))

    float_map, quantized_map = mean_map(before), mean_map(model)
    model.solve_student_(images, map(model.teacher, images), seed=0)
    assert quantized_map - float_map > 4 * abs(mean_map(model) - float_map)
    last = model.student.head
    assert last.bits == 8
    steps = (last.quantized_weight() / last.weight_quantizer.scale).detach()
    torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-3)


@pytest.fixture
def equalized(untrained, coarse_grids):
    """A quantized and equalized student, what it was before, the images it saw, and the scale."""
    model, images = untrained
    quantize_(model, images, images, Allocation(8))
    with torch.no_grad():
        model.student.conv3.weight[5], model.student.conv3.bias[5] = 0, -1  # a channel that never fires
    before = deepcopy(model.student)
    return model.student, before, images, equalize_head_input_(model.student, images)


def test_equalization_scales_ranges_to_their_roots_and_leaves_dead_channels(equalized) -> None:
    student, before, images, scale = equalized

    def largest(network: nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return torch.cat([network.head_input(image) for image in images]).amax((0, 2, 3))

    old, new = largest(before), largest(student)
    live = old > 1e-3 * old.max()
    assert not live[5]
    assert live.sum() > 100
    torch.testing.assert_close(new[live], (old[live] * old[live].mean()).sqrt())
    torch.testing.assert_close(new[~live], old[~live])
    torch.testing.assert_close(new * scale.flatten(), old)


def test_equalization_rounds_no_weight_of_the_layer_before_anew(equalized) -> None:
    student, before, *_ = equalized
    integers = [net.conv3.weight_quantizer.integers(net.conv3.weight) for net in (student, before)]
    moved = integers[0] != integers[1]
    assert moved.sum() < 5  # of 589,824: those within float32's errors of half a step
    for name, layer in quantizable_layers(student).items():
        assert (layer.bits, layer.input_quantizer.bits) == (8, 8)
        if name in ("conv1", "conv2"):
            assert torch.equal(layer.weight, getattr(before, name).weight)


def test_equalization_changes_nothing_in_float(equalized) -> None:
    student, before, images, _ = equalized
    for network in (student, before):
        network.head.weight_quantizer.bits = network.head.input_quantizer.bits = 0
        network.eval()
    with torch.no_grad():
        expected = before.head(before.head_input(images[0]))
        torch.testing.assert_close(student.head(student.head_input(images[0])), expected)


def test_equalization_makes_the_solution_predict_better(equalized, untrained) -> None:
    student, before, images, _ = equalized
    model = untrained[0]
    model.set_teacher_statistics_(map(model.teacher, images))

    def mean_map(network: nn.Module) -> float:
        model.student = network
        model.solve_student_(images, map(model.teacher, images), seed=0)
        with torch.no_grad():
            return float(sum(model.maps(image)[0].mean() for image in images))

    assert mean_map(student) < mean_map(before)


def test_restoring_gives_back_the_layer_and_the_channels_as_they_were(untrained, coarse_grids) -> None:
    model, images = untrained
    quantize_(model, images, images, Allocation(8))
    before = deepcopy(model.student.state_dict())
    for _ in range(2):  # a second solution does not take the first for what was trained
        model.solve_student_(images, map(model.teacher, images), seed=0)
    assert model.student_head.solved
    assert not torch.equal(model.student.conv4.weight, before["conv4.weight"])
    assert not torch.equal(model.student.conv4.input_quantizer.scale, before["conv4.input_quantizer.scale"])
    model.student_head.restore_(model.student)
    for name, value in model.student.state_dict().items():
        if isinstance(value, torch.Tensor):
            exact = name.startswith("conv4") and "weight_quantizer" not in name
            torch.testing.assert_close(value, before[name], **({"rtol": 0, "atol": 0} if exact else {}), msg=name)
    restored = deepcopy(model.student.state_dict())
    model.student_head.restore_(model.student)
    assert all(torch.equal(value, restored[name]) for name, value in model.student.named_parameters())


def test_a_solved_model_loads_into_a_fresh_one(untrained) -> None:
    model, images = untrained
    trained = model.student.conv4.weight.detach().clone()
    model.solve_student_(images, map(model.teacher, images), seed=0)
    fresh = RaadModel()
    fresh.load_state_dict(model.state_dict())
    fresh.student_head.restore_(fresh.student)
    assert torch.equal(fresh.student.conv4.weight, trained)
