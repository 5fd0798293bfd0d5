import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from anomalib_raad.agpnet.perturbation import disturbed, most_attended, normalized


def test_normalized_is_of_each_image() -> None:
    maps = torch.stack([torch.arange(6.0).view(1, 2, 3), 100 + 10 * torch.arange(6.0).view(1, 2, 3)])
    expected = torch.arange(6.0).view(1, 1, 2, 3) / 5
    torch.testing.assert_close(normalized(maps), expected.expand(2, -1, -1, -1))


def test_a_constant_map_is_zero() -> None:
    assert normalized(torch.full((1, 1, 4, 4), 0.3)).abs().max() == 0


@pytest.mark.parametrize("share", [0.6, 0.83, 1.0])
def test_the_most_attended_pixels_are_chosen(share: float) -> None:
    torch.manual_seed(0)
    attention = torch.rand(2, 1, 4, 3)
    chosen = most_attended(attention, (16, 12), share)
    pixels = F.interpolate(attention, size=(16, 12), mode="bilinear")
    assert chosen.sum((1, 2, 3)).tolist() == [round(share * 192)] * 2
    for image in range(2):
        if share < 1:
            assert pixels[image][chosen[image] == 1].min() >= pixels[image][chosen[image] == 0].max()
    assert set(chosen.unique().tolist()) <= {0.0, 1.0}


def test_noise_has_the_strength_of_each_cell_in_units_of_the_features() -> None:
    torch.manual_seed(0)
    features = 3 * torch.randn(1, 20_000, 1, 3)
    strength = torch.tensor([0.0, 0.1, 1.1]).view(1, 1, 1, 3)
    deviations = (disturbed(features, strength) - features).std(dim=1)[0, 0]
    torch.testing.assert_close(deviations, 3 * torch.tensor([0.0, 0.1, 1.1]), rtol=0.02, atol=0)
