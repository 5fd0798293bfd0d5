import numpy as np
import pytest
import torch
from torch import nn

from anomalib_raad.quantization.layers import make_quantizable_
from anomalib_raad.raad.ridge import sample, solve_layer_


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
def test_solution_equals_numpys_ridge_regression(padding: int) -> None:
    torch.manual_seed(0)
    images = list(torch.rand(3, 1, 2, 8, 9))
    layer = make_quantizable_(nn.Sequential(nn.Conv2d(2, 4, 3, padding=padding)))[0]
    targets = [torch.randn_like(layer(image)).detach() for image in images]
    # 7 rows of 19 at a time, so that there are blocks beside the diagonal
    solve_layer_(layer, everywhere(layer, images, targets), rows_at_a_time=7)

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
        network[0].quantize_weight_(2)
        network[0].quantize_input_(image, 8)
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
