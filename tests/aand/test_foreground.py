import pytest
import torch

from anomalib_raad.aand.foreground import Foreground


def discs(background: float, part: float) -> list[torch.Tensor]:
    """Images of a disc, each elsewhere and with a little noise."""
    rows, columns = torch.meshgrid(torch.arange(96), torch.arange(128), indexing="ij")
    images = []
    for centre in (50, 64, 78):
        disc = (rows - 48) ** 2 + (columns - centre) ** 2 < 30**2
        grey = torch.where(disc, part, background)
        images.append((grey + 0.02 * torch.randn(96, 128)).clamp(0, 1).expand(1, 3, -1, -1))
    return images


@pytest.mark.parametrize(("background", "part"), [(0.1, 0.8), (0.8, 0.1)])
def test_the_part_is_what_the_border_is_not(background: float, part: float) -> None:
    torch.manual_seed(0)
    foreground, images = Foreground(), discs(background, part)
    share = foreground.find_(images)
    assert share == pytest.approx(3.14 * 30**2 / (96 * 128), abs=0.03)
    mask = foreground(images[1])
    assert mask.shape == (1, 1, 96, 128)
    assert mask[0, 0, 48, 64] == 1
    assert mask[0, 0, 5, 5] == 0
    assert float(mask.mean()) == pytest.approx(share, abs=0.02)


def test_everything_is_foreground_where_the_border_has_both_classes() -> None:
    halves = torch.zeros(1, 3, 96, 96)
    halves[..., 48:] = 1
    foreground = Foreground()
    assert foreground.find_([halves]) == 1
    assert foreground(halves).all()


@pytest.mark.parametrize("texture", [torch.rand(1, 3, 96, 96), torch.full((1, 3, 96, 96), 0.5)])
def test_everything_is_foreground_of_a_texture(texture: torch.Tensor) -> None:
    foreground = Foreground()
    assert foreground.find_([texture]) == 1
    assert foreground(texture).all()


def test_what_was_found_is_state() -> None:
    found, other = Foreground(), Foreground()
    found.find_(discs(0.8, 0.1))
    other.load_state_dict(found.state_dict())
    image = discs(0.8, 0.1)[0]
    assert torch.equal(other(image), found(image))
    assert not other(image).all()
