import numpy as np
import pytest
import torch
from anomalib.data.utils import read_image
from torch import nn

from anomalib_raad import RaadModel
from anomalib_raad.initialization import solve_last_layer_, start_in_closed_form_, train_autoencoder_
from anomalib_raad.quantization.layers import make_quantizable_
from anomalib_raad.teacher.weights import load_teacher_


def test_a_linear_target_is_found() -> None:
    torch.manual_seed(0)
    images = list(torch.rand(4, 1, 3, 20, 20))
    truth, network = nn.Conv2d(3, 5, 3), make_quantizable_(nn.Sequential(nn.Conv2d(3, 5, 3)))
    with torch.no_grad():
        solve_last_layer_(network[0], network, images, lambda image, _: truth(image), torch.Generator())
        for image in images:
            torch.testing.assert_close(network(image), truth(image), rtol=0, atol=0.01)


@pytest.mark.parametrize("padding", [0, 1])
def test_solution_equals_numpys_ridge_regression(padding: int) -> None:
    torch.manual_seed(0)
    images = list(torch.rand(3, 1, 2, 8, 9))
    layer = make_quantizable_(nn.Sequential(nn.Conv2d(2, 4, 3, padding=padding)))[0]
    targets = {id(image): torch.randn_like(layer(image)).detach() for image in images}
    solve_last_layer_(layer, layer, images, lambda image, _: targets[id(image)], torch.Generator())

    rows = [nn.functional.unfold(image, 3, padding=padding)[0].T.numpy() for image in images]
    phi = np.concatenate(rows).astype(np.float64)
    phi = np.hstack([phi, np.ones((len(phi), 1))])
    y = np.concatenate([targets[id(image)][0].flatten(1).T.numpy() for image in images])
    gram = phi.T @ phi
    expected = np.linalg.solve(gram + 1e-3 * np.trace(gram) / len(gram) * np.eye(len(gram)), phi.T @ y)
    actual = np.vstack([layer.weight.detach().flatten(1).T.numpy(), layer.bias.detach().numpy()])
    np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=1e-4)


@pytest.fixture
def untrained(cells):
    """A model with the bundled teacher, and real images."""
    torch.manual_seed(0)
    model = RaadModel().eval()
    load_teacher_(model.teacher, "bundled", "small")
    images = [read_image(path, as_tensor=True)[None, :, :128, :128] for path in sorted(cells.glob("train/*"))]
    model.set_teacher_statistics_(images)
    return model, images


def test_losses_start_lower_and_inner_layers_stay(untrained) -> None:
    model, images = untrained
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with torch.no_grad():
        random = [model.losses(image) for image in images]
        start_in_closed_form_(model, images, seed=0, autoencoder_steps=8)
        solved = [model.losses(image) for image in images]
        energy = sum(model.autoencode(image, (24, 24)).square().mean() for image in images)
    st, ae = ([sum(getattr(losses, name) for losses in runs) for runs in (random, solved)] for name in ("st", "ae"))
    assert st[1] < 0.5 * st[0]
    assert ae[1] < ae[0]
    assert sum(losses.stae for losses in solved) < 0.5 * energy
    for name, parameter in model.named_parameters():
        changed = name.startswith(("student.conv4", "ae."))
        assert torch.equal(parameter, before[name]) != changed, name


def test_autoencoder_learns_the_same_in_autocast(untrained) -> None:
    model, images = untrained
    start = {name: parameter.clone() for name, parameter in model.ae.state_dict().items() if name.endswith("weight")}
    moved = []
    for bfloat16 in (False, True):
        model.ae.load_state_dict(start, strict=False)
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            train_autoencoder_(model, images, seed=0, steps=6)
        moved.append(torch.cat([(p - start[n]).flatten() for n, p in model.ae.named_parameters() if n in start]))
    assert torch.cosine_similarity(*moved, dim=0) > 0.98


def test_training_the_autoencoder_leaves_the_random_numbers_alone(untrained) -> None:
    model, images = untrained
    state = torch.get_rng_state()
    train_autoencoder_(model, images, seed=0, steps=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.ae.training
