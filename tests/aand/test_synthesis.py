import pytest
import torch
from PIL import Image

from anomalib_raad.aand.synthesis import Synthesis, find_textures


@pytest.fixture
def images() -> torch.Tensor:
    return torch.full((40, 3, 64, 80), 0.5)


@pytest.fixture
def foreground(images) -> torch.Tensor:
    mask = torch.zeros_like(images[:, :1])
    mask[..., 16:48, 16:64] = 1
    return mask


def test_anomalies_lie_on_the_part_and_a_fifth_of_the_images_stays_clean(images, foreground) -> None:
    torch.manual_seed(0)
    changed, masks = Synthesis()(images, foreground)
    assert changed.shape == images.shape
    assert masks.shape == foreground.shape
    assert set(masks.unique().tolist()) == {0.0, 1.0}
    assert not (masks * (1 - foreground)).any()
    assert torch.equal(changed * (1 - masks), images * (1 - masks))
    clean = sum(not mask.any() for mask in masks)
    assert 3 <= clean <= 14
    different = (changed != images).any(1, keepdim=True)
    assert float((different * masks).sum() / masks.sum()) > 0.9
    assert changed.min() >= 0
    assert changed.max() <= 1


def test_the_textures_weight_is_between_a_fifth_and_1(images, foreground, monkeypatch) -> None:
    torch.manual_seed(0)
    synthesis = Synthesis()
    synthesis.textures = ["white"]
    monkeypatch.setattr(synthesis, "_texture", lambda size: torch.ones(3, *size))
    changed, masks = synthesis(images, foreground)
    weights = [float((c[0][m[0] > 0].mean() - 0.5) / 0.5) for c, m in zip(changed, masks, strict=True) if m.any()]
    assert 0.2 <= min(weights) < 0.4
    assert 0.8 < max(weights) <= 1


def test_the_same_random_numbers_give_the_same_anomalies(images, foreground) -> None:
    drawn = []
    for _ in range(2):
        torch.manual_seed(3)
        drawn.append(Synthesis()(images[:4], foreground[:4]))
    assert torch.equal(drawn[0][0], drawn[1][0])
    assert torch.equal(drawn[0][1], drawn[1][1])


def test_a_part_of_a_few_pixels_stays_clean(images) -> None:
    few = torch.zeros_like(images[:, :1])
    few[..., 30, 30:33] = 1
    changed, masks = Synthesis()(images[:5], few[:5])
    assert torch.equal(changed, images[:5])
    assert not masks.any()


def test_photos_give_the_textures(tmp_path, images, foreground) -> None:
    (tmp_path / "wood").mkdir()
    Image.new("RGB", (30, 20), (255, 0, 0)).save(tmp_path / "wood" / "red.png")
    torch.manual_seed(0)
    changed, masks = Synthesis(find_textures(tmp_path))(images, foreground)
    seen = changed.permute(0, 2, 3, 1)[masks[:, 0] > 0]
    assert float((seen[:, 0] - seen[:, 1]).abs().mean()) > 0.02  # Perlin noise is grey before its augmentation


def test_a_texture_folder_that_cannot_serve__error(tmp_path) -> None:
    with pytest.raises(ValueError, match="photos' is no folder"):
        find_textures(tmp_path / "photos")
    with pytest.raises(ValueError, match="has 0 images, and 0 that cannot be read"):
        find_textures(tmp_path)
    (tmp_path / "broken.png").write_text("no image")
    with pytest.raises(ValueError, match=r"1 that cannot be read\n.*broken.png"):
        find_textures(tmp_path)
