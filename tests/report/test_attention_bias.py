import pytest
import torch

from anomalib_raad.report.attention_bias import attention_bias


def test_attention_bias_is_the_ratio_of_the_means_inside_and_outside() -> None:
    """A quarter of the image flickers; the map says 3 there and 2 elsewhere."""
    images, maps = torch.full((4, 3, 8, 8), 0.5), torch.full((4, 1, 8, 8), 2.0)
    images[::2, :, :4, :4] = 0.9
    maps[:, :, :4, :4] = torch.tensor([2.0, 4.0, 2.0, 4.0]).view(4, 1, 1, 1)
    assert attention_bias(images, maps) == pytest.approx(1.5)
    assert attention_bias(images, torch.ones_like(maps)) == pytest.approx(1)
    assert attention_bias(images, torch.zeros_like(maps)) == 0
