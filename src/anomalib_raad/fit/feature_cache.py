"""Features of the training images from a frozen network, computed once each as far as memory allows."""

from collections.abc import Callable, Sequence

import torch

CACHE_BYTES = 2**30  # of PDN-S's features at 256x256 in bf16 about 440 images


class FeatureCache:
    """Keeps the features of images that come again and again.

    Every image is computed alone, so its features do not depend on the batch it happens to be in, and a resumed run
    with an empty cache sees the same numbers. When the cache is full, further images are computed each time.

    Args:
        compute: Feature maps, each ``(1, C, h, w)``, of an image ``(1, 3, H, W)``.
        limit: Bytes to keep at most.
    """

    def __init__(self, compute: Callable[[torch.Tensor], Sequence[torch.Tensor]], limit: int = CACHE_BYTES) -> None:
        self._compute = compute
        self._limit = limit
        self._features: dict[str, Sequence[torch.Tensor]] = {}
        self._bytes = 0

    def __call__(self, names: Sequence[str], images: torch.Tensor) -> list[torch.Tensor]:
        """Feature maps ``(N, C, h, w)`` of images ``(N, 3, H, W)``; a name must always stand for the same image."""
        found = [self._of(name, image.unsqueeze(0)) for name, image in zip(names, images, strict=True)]
        return [torch.cat(maps) for maps in zip(*found, strict=True)]

    def clear(self) -> None:
        """Forget everything, because the network has changed."""
        self._features.clear()
        self._bytes = 0

    @torch.no_grad()
    def _of(self, name: str, image: torch.Tensor) -> Sequence[torch.Tensor]:
        if name in self._features:
            return self._features[name]
        features = self._compute(image)
        size = sum(feature.nbytes for feature in features)
        if self._bytes + size <= self._limit:
            self._features[name] = features
            self._bytes += size
        return features
