from copy import deepcopy

import numpy as np
import pytest
import torch
from torch import nn

from anomalib_raad import RaadModel
from anomalib_raad.closed_form import equalize_last_input_, last_input, sample, solve_layer_, solve_student_
from anomalib_raad.quantization.layers import last_layer, make_quantizable_, quantizable_layers
from anomalib_raad.quantization.recipe import Allocation, quantize_


def everywhere(layer, images, targets):
    """Examples at all positions of the output, of which there are fewer than 500."""
    return (sample(layer, *pair, 500, torch.Generator()) for pair in zip(images, targets, strict=True))


def test_a_linear_target_is_found() -> None:
    torch.manual_seed(0)
    images = list(torch.rand(4, 1, 3, 20, 20))
    truth, network = nn.Conv2d(3, 5, 3), make_quantizable_(nn.Sequential(nn.Conv2d(3, 5, 3)))
    with torch.no_grad():
        solve_layer_(network[0], everywhere(network[0], images, map(truth, images)))
        for image in images:
            torch.testing.assert_close(network(image), truth(image), rtol=0, atol=0.01)


@pytest.mark.parametrize("padding", [0, 1])
def test_solution_equals_numpys_ridge_regression(padding: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    images = list(torch.rand(3, 1, 2, 8, 9))
    layer = make_quantizable_(nn.Sequential(nn.Conv2d(2, 4, 3, padding=padding)))[0]
    targets = [torch.randn_like(layer(image)).detach() for image in images]
    monkeypatch.setattr("anomalib_raad.closed_form._ROWS", 7)  # of 19, so that there are blocks beside the diagonal
    solve_layer_(layer, everywhere(layer, images, targets))

    rows = [nn.functional.unfold(image, 3, padding=padding)[0].T.numpy() for image in images]
    phi = np.concatenate(rows).astype(np.float64)
    phi = np.hstack([phi, np.ones((len(phi), 1))])
    y = np.concatenate([target[0].flatten(1).T.numpy() for target in targets])
    gram = phi.T @ phi
    expected = np.linalg.solve(gram + 1e-4 * np.trace(gram) / len(gram) * np.eye(len(gram)), phi.T @ y)
    actual = np.vstack([layer.weight.detach().flatten(1).T.numpy(), layer.bias.detach().numpy()])
    np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=1e-4)


def test_the_bias_makes_up_for_the_rounding_of_the_weights() -> None:
    torch.manual_seed(0)
    image = torch.rand(1, 3, 20, 20)
    network = make_quantizable_(nn.Sequential(nn.Conv2d(3, 5, 3))).eval()
    with torch.no_grad():
        target = network(image)
        network[0].quantize_(2, image, 8)
        solve_layer_(network[0], everywhere(network[0], [image], [target]))
        error = network(image) - target
    assert error.abs().mean() > 0.01
    torch.testing.assert_close(error.mean(dim=(0, 2, 3)), torch.zeros(5), rtol=0, atol=1e-3)


def test_solving_under_autocast_is_as_precise() -> None:
    torch.manual_seed(0)
    image = torch.rand(1, 3, 20, 20)
    layer = make_quantizable_(nn.Sequential(nn.Conv2d(3, 5, 3)))[0]
    examples = list(everywhere(layer, [image], [layer(image).detach()]))
    solve_layer_(layer, examples)
    expected = layer.weight.detach().clone()
    with torch.autocast("cpu", torch.bfloat16):
        solve_layer_(layer, examples)
    torch.testing.assert_close(layer.weight, expected, rtol=0, atol=0)


def test_solving_the_student_lowers_both_its_losses_and_leaves_its_inner_layers(untrained) -> None:
    model, images = untrained
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with torch.no_grad():
        torch.manual_seed(1)  # both times the same augmentation
        random = [model.losses(image) for image in images]
        solve_student_(model, images, map(model.teacher_features, images), seed=0)
        torch.manual_seed(1)
        solved = [model.losses(image) for image in images]
        energy = sum(model.autoencode(image, (24, 24)).square().mean() for image in images)
    assert sum(losses.stae for losses in solved) < 0.5 * energy
    for term in ("st", "stae"):
        assert sum(getattr(losses, term) for losses in solved) < 0.5 * sum(getattr(losses, term) for losses in random)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != name.startswith("student.conv4"), name


def test_solving_mends_what_quantization_did(untrained) -> None:
    """At 3 bits the maps of normal images grow; afterwards they are close to what they were."""
    model, images = untrained
    solve_student_(model, images, map(model.teacher_features, images), seed=0)
    before = deepcopy(model)
    quantize_(model, images, images, Allocation(bits=3))
    model.set_teacher_statistics_(map(model.teacher_features, images))

    def mean_map(some: RaadModel) -> float:
        with torch.no_grad():
            return float(sum(some.maps(image)[0].mean() for image in images))

    float_map, quantized_map = mean_map(before), mean_map(model)
    solve_student_(model, images, map(model.teacher_features, images), seed=0)
    assert quantized_map - float_map > 4 * abs(mean_map(model) - float_map)
    last = last_layer(model.student)
    assert last.bits == 8
    steps = (last.quantized_weight() / last.weight_step).detach()
    torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-3)


@pytest.fixture
def equalized(untrained, coarse_grids):
    """A quantized and equalized student, what it was before, the images it saw, and the scale."""
    model, images = untrained
    quantize_(model, images, images, Allocation(8))
    with torch.no_grad():
        model.student.conv3.weight[5], model.student.conv3.bias[5] = 0, -1  # a channel that never fires
    before = deepcopy(model.student)
    return model.student, before, images, equalize_last_input_(model.student, images)


def test_equalization_scales_ranges_to_their_roots_and_leaves_dead_channels(equalized) -> None:
    student, before, images, scale = equalized

    def largest(network: nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return torch.cat([last_input(network, image) for image in images]).amax((0, 2, 3))

    old, new = largest(before), largest(student)
    live = old > 1e-3 * old.max()
    assert not live[5]
    assert live.sum() > 100
    torch.testing.assert_close(new[live], (old[live] * old[live].mean()).sqrt())
    torch.testing.assert_close(new[~live], old[~live])
    torch.testing.assert_close(new * scale.flatten(), old)


def test_equalization_rounds_no_weight_of_the_layer_before_anew(equalized) -> None:
    student, before, *_ = equalized
    moved = student.conv3.integer_weight() != before.conv3.integer_weight()
    assert moved.sum() < 5  # of 589,824: those within float32's errors of half a step
    for name, layer in quantizable_layers(student).items():
        assert (layer.bits, layer.input_bits) == (8, 8)
        if name in ("conv1", "conv2"):
            assert torch.equal(layer.weight, getattr(before, name).weight)


def test_equalization_changes_nothing_in_float(equalized) -> None:
    student, before, images, _ = equalized
    for network in (student, before):
        last_layer(network).bits = last_layer(network).input_bits = 0
        network.eval()
    with torch.no_grad():
        expected = last_layer(before)(last_input(before, images[0]))
        torch.testing.assert_close(last_layer(student)(last_input(student, images[0])), expected)


def test_equalization_makes_the_solution_predict_better(equalized, untrained) -> None:
    student, before, images, _ = equalized
    model = untrained[0]
    model.set_teacher_statistics_(map(model.teacher_features, images))

    def mean_map(network: nn.Module) -> float:
        model.student = network
        solve_student_(model, images, map(model.teacher_features, images), seed=0)
        with torch.no_grad():
            return float(sum(model.maps(image)[0].mean() for image in images))

    assert mean_map(student) < mean_map(before)
