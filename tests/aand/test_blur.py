import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from anomalib_raad.aand.blur import Blur


@pytest.mark.parametrize("sigma", [0.0, 1.0, 4.0])
def test_blur_is_scipys(sigma: float) -> None:
    torch.manual_seed(0)
    maps = torch.rand(2, 1, 40, 53)
    expected = np.stack([gaussian_filter(m[0].numpy(), sigma, mode="mirror") for m in maps])
    torch.testing.assert_close(Blur(sigma)(maps)[:, 0], torch.tensor(expected), rtol=0, atol=1e-5)


def test_blur_keeps_full_precision_under_autocast() -> None:
    maps, blur = torch.rand(1, 1, 40, 40), Blur(2.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = blur(maps)
    assert torch.equal(found, blur(maps))
