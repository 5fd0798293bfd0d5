import pytest
import torch

from anomalib_raad.data.penalty import PenaltyImages


def test_images_have_the_batchs_shape(cells) -> None:
    torch.manual_seed(0)
    drawn = PenaltyImages(cells).draw(torch.zeros(3, 3, 40, 60))
    assert drawn.shape == (3, 3, 40, 60)
    assert 0 <= drawn.min() < drawn.max() <= 1


def test_no_image__error(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"penalty_dir .* has no image"):
        PenaltyImages(tmp_path)
