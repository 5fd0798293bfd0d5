import torch

from anomalib_raad.fit.feature_cache import FeatureCache


def test_each_image_is_computed_once_and_alone() -> None:
    computed = []

    def compute(image: torch.Tensor) -> list[torch.Tensor]:
        computed.append(image)
        return [2 * image, image[..., :1]]

    cache, images = FeatureCache(compute), torch.rand(3, 3, 4, 4)
    for _ in range(2):
        assert torch.equal(cache(["a", "b", "c"], images)[0], 2 * images)
        first, second = cache(["c", "a"], images[[2, 0]])
        assert torch.equal(first, 2 * images[[2, 0]])
        assert torch.equal(second, images[[2, 0]][..., :1])
    assert [tuple(image.shape) for image in computed] == [(1, 3, 4, 4)] * 3
    cache.clear()
    cache(["a"], images[:1])
    assert len(computed) == 4


def test_a_full_cache_computes_again() -> None:
    computed = []
    cache = FeatureCache(lambda image: computed.append(1) or [image], limit=2 * 4 * 3 * 16)
    for _ in range(2):
        cache(["a", "b", "c"], torch.rand(3, 3, 4, 4))
    assert len(computed) == 3 + 1
