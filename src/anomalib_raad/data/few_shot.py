"""Versions of the few images that a model is to be trained on."""

import torch
from torchvision.transforms import v2

VERSIONS = 32
"""Of each image; the paper's number, which does not say what they are."""


def version(image: torch.Tensor, number: int) -> torch.Tensor:
    """A version of an image ``(1, 3, H, W)``: flipped or not, turned and shifted a little; number 0 is as it is."""
    if number == 0:
        return image
    height, width = image.shape[-2:]
    change = v2.Compose(
        [
            v2.RandomHorizontalFlip(),
            v2.RandomVerticalFlip(),
            v2.Pad((width // 4, height // 4), padding_mode="reflect"),
            v2.RandomAffine(degrees=10, translate=(0.05, 0.05), interpolation=v2.InterpolationMode.BILINEAR),
            v2.CenterCrop((height, width)),
        ]
    )
    with torch.random.fork_rng(devices=[]):  # torchvision draws on the processor
        torch.manual_seed(number)
        return change(image)
