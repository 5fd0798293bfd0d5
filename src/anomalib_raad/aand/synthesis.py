"""Synthetic anomalies for stage 1: Perlin-shaped patches of a foreign texture on normal images."""

from collections.abc import Sequence
from pathlib import Path

import torch
from anomalib.data.utils import read_image
from anomalib.data.utils.generators.perlin import PerlinAnomalyGenerator
from torchvision.transforms.v2.functional import resize

from anomalib_raad.data.readable import list_faults, unreadable

_CLEAN = 0.2  # share of the images that stay as they are
_LEAST_WEIGHT = 0.2  # of the texture, at most 1
_LEAST_PIXELS, _TRIES = 5, 10  # of a mask, and how often another is drawn where it has fewer
_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")


def find_textures(texture_dir: str | Path) -> list[Path]:
    """The photos of a folder, in sub-folders or not.

    Raises:
        ValueError: If there is no such folder, or it has no image, or one that cannot be read.
    """
    if not Path(texture_dir).is_dir():
        msg = f"texture_dir {str(texture_dir)!r} is no folder"
        raise ValueError(msg)
    textures = sorted(path for path in Path(texture_dir).rglob("*") if path.suffix.lower() in _SUFFIXES)
    faults = unreadable(textures)
    if faults or not textures:
        msg = f"texture_dir {str(texture_dir)!r} has {len(textures)} images, and "
        msg += f"{len(faults)} that cannot be read\n{list_faults(faults)}"
        raise ValueError(msg.rstrip())
    return textures


class Synthesis:
    """Blends textures into normal images: ``I^a = (1 - M) I + M ((1 - b) T + b I)``.

    The shapes are anomalib's Perlin masks, cut to the foreground. A texture is a photo of a folder, augmented, or
    Perlin noise.

    Args:
        textures: Photos; none for Perlin noise.
    """

    def __init__(self, textures: Sequence[Path] = ()) -> None:
        self.textures = list(textures)
        self.generator = PerlinAnomalyGenerator()

    def __call__(self, images: torch.Tensor, foreground: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw an anomaly for each of most images; the draws are torch's.

        Args:
            images: Normal images ``(N, 3, H, W)`` in [0, 1].
            foreground: 1 where they show the part, ``(N, 1, H, W)``.

        Returns:
            The images, and masks ``(N, 1, H, W)`` that are 1 where they have been changed.
        """
        drawn = [self._draw(*pair) for pair in zip(images.cpu(), foreground.cpu(), strict=True)]
        changed, masks = (torch.stack(parts).to(images) for parts in zip(*drawn, strict=True))
        return changed, masks

    def _draw(self, image: torch.Tensor, foreground: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        nothing = torch.zeros_like(foreground)
        if torch.rand(()) < _CLEAN:
            return image, nothing
        size = image.shape[-2:]
        for _ in range(_TRIES):
            noise, shape = self.generator.generate_perturbation(size[0], size[1], image.device)
            mask = shape.permute(2, 0, 1) * foreground
            if mask.sum() >= _LEAST_PIXELS:
                texture = self._texture(size) if self.textures else noise.permute(2, 0, 1)
                weight = _LEAST_WEIGHT + (1 - _LEAST_WEIGHT) * torch.rand(())
                return torch.where(mask > 0, (weight * texture + (1 - weight) * image).clamp(0, 1), image), mask
        return image, nothing

    def _texture(self, size: torch.Size) -> torch.Tensor:
        path = self.textures[int(torch.randint(len(self.textures), ()))]
        return self.generator.augmenters(resize(read_image(path, as_tensor=True), list(size), antialias=True))
