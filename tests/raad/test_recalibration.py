import numpy as np
import pytest
import torch
from scipy.ndimage import convolve

from anomalib_raad.raad.recalibration import Recalibration, smooth

KERNEL = np.outer([1, 2, 1], [1, 2, 1]) / 16


def maps_with_bias(number: int = 40, strength: float = 3.0, seed: int = 0) -> list[torch.Tensor]:
    """Maps that are noise everywhere, and in a corner of the first map so many times larger."""
    generator = torch.Generator().manual_seed(seed)
    maps = torch.rand(number, 2, 32, 32, generator=generator) + 0.5
    maps[:, 0, 8:16, 8:16] *= strength
    return list(maps.split(1))


def slow_bias(maps: np.ndarray) -> np.ndarray:
    """The equations of the module, place by place."""

    def relative(values: np.ndarray) -> np.ndarray:
        def soft(x: np.ndarray) -> np.ndarray:
            return convolve(convolve(x, KERNEL, mode="nearest"), KERNEL, mode="nearest")

        level = soft(values.mean(0)) + 2 * np.sqrt(soft(values.var(0)))
        return level / level.mean()

    whole, first, second = relative(maps), relative(maps[::2]) - 1, relative(maps[1::2]) - 1
    agreement = max((first * second).sum() / np.sqrt((first**2).sum() * (second**2).sum()), 0)
    return np.maximum(1 + 2 * agreement / (1 + agreement) * (whole - 1), 0.05)


def test_the_bias_is_the_slow_one() -> None:
    maps = maps_with_bias()
    recalibration = Recalibration()
    recalibration.fit_(maps)
    expected = np.stack([slow_bias(torch.cat(maps)[:, number].double().numpy()) for number in range(2)])
    np.testing.assert_allclose(recalibration.bias[0].numpy(), expected, rtol=1e-4)


def test_a_bias_is_removed_and_a_defect_stays() -> None:
    recalibration = Recalibration()
    recalibration.fit_(maps_with_bias())
    defect = maps_with_bias(1, seed=1)[0]
    defect[0, 0, 24:27, 24:27] += 3.0
    after = recalibration(defect)[0, 0]
    assert defect[0, 0, 8:16, 8:16].max() > defect[0, 0, 24:27, 24:27].min()  # the corner hides it
    assert int(after.argmax()) // 32 in {24, 25, 26}
    normal = torch.cat([recalibration(each) for each in maps_with_bias(20, seed=2)])[:, 0].mean(0)
    assert normal[10:14, 10:14].mean() / normal[20:, :].mean() == pytest.approx(1, abs=0.1)


def test_where_places_do_not_differ_nothing_changes() -> None:
    recalibration = Recalibration()
    recalibration.fit_(maps_with_bias(strength=1.0))
    assert (recalibration.bias - 1).abs().max() < 0.1


@pytest.mark.parametrize("maps", [maps_with_bias(1), [torch.zeros(1, 2, 16, 16)] * 5])
def test_one_image_and_parts_without_variation_change_nothing(maps: list[torch.Tensor]) -> None:
    recalibration = Recalibration()
    recalibration.fit_(maps)
    assert (recalibration.bias == 1).all()
    assert recalibration(maps[0]).isfinite().all()


def test_places_that_are_always_zero_are_not_divided_by_nothing() -> None:
    maps = [torch.zeros(1, 2, 32, 32) for _ in range(6)]
    for each in maps:
        each[..., :4, :4] = 1.0
    recalibration = Recalibration()
    recalibration.fit_(maps)
    assert recalibration(torch.full((1, 2, 32, 32), 1e-3)).max() < 0.03


@pytest.mark.parametrize("size", [(16, 16), (64, 64), (24, 48), (18, 23)])
def test_images_of_any_size_are_recalibrated(size: tuple[int, int]) -> None:
    maps = [torch.rand(1, 2, *size) + 0.5 for _ in range(10)]
    recalibration = Recalibration()
    recalibration.fit_(maps)
    assert recalibration(maps[0]).shape == maps[0].shape


def test_smoothing_is_the_binomial_kernel() -> None:
    maps = torch.rand(2, 2, 9, 7)
    expected = np.stack([[convolve(m.numpy(), KERNEL, mode="nearest") for m in both] for both in maps])
    torch.testing.assert_close(smooth(maps), torch.from_numpy(expected))
