"""Whether images look at all like those that a model was trained on."""

from collections.abc import Iterable, Mapping

import torch

FACTOR = 2.0
"""How far a property may lie below the least and above the greatest value of the training images."""

Ranges = dict[str, tuple[float, float]]


def properties(image: torch.Tensor) -> dict[str, float]:
    """Channels (1 if all three are the same), height, width, mean and deviation of an image ``(3, H, W)`` in [0, 1]."""
    return {
        "channels": 1.0 if torch.equal(image[0], image[1]) and torch.equal(image[1], image[2]) else 3.0,
        "height": float(image.shape[-2]),
        "width": float(image.shape[-1]),
        "brightness": float(image.mean()),
        "contrast": float(image.std(correction=0)),
    }


def ranges(images: Iterable[torch.Tensor]) -> Ranges:
    """The least and the greatest value of each property of images, each of shape ``(3, H, W)``."""
    found = [properties(image) for image in images]
    return {name: (min(p[name] for p in found), max(p[name] for p in found)) for name in found[0]}


def differences(image: torch.Tensor, seen: Mapping[str, tuple[float, float]]) -> str:
    """Say which properties of an image ``(3, H, W)`` lie outside the training images', if any."""
    return ", ".join(
        f"{name} {_text(value)} (training: {_text(seen[name][0])} to {_text(seen[name][1])})"
        for name, value in properties(image).items()
        if not seen[name][0] / FACTOR <= value <= seen[name][1] * FACTOR
    )


def _text(value: float) -> str:
    """Counts as counts, shares with three digits."""
    return str(int(value)) if value.is_integer() and value >= 1 else f"{value:.3g}"
