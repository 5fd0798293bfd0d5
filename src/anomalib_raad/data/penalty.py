"""Images of anything but the part, for EfficientAD's penalty on the student."""

from pathlib import Path

import torch
from anomalib.data.utils import get_image_filenames, read_image
from torchvision.transforms.v2 import CenterCrop, Compose, RandomGrayscale, Resize

_GRAYSCALE = 0.3  # EfficientAD, comments on Algorithms 1 and 2


class PenaltyImages:
    """Random images of a folder, prepared as EfficientAD prepares ImageNet images.

    Args:
        root: Folder with images, in sub-folders or not.

    Raises:
        ValueError: If the folder has no image.
    """

    def __init__(self, root: str | Path) -> None:
        try:
            self.paths = get_image_filenames(root)
        except (ValueError, FileNotFoundError) as error:
            msg = f"penalty_dir {str(root)!r} has no image; name a folder with photos, or None for no penalty"
            raise ValueError(msg) from error

    def draw(self, like: torch.Tensor) -> torch.Tensor:
        """Draw as many images as ``like`` has, of its shape ``(N, 3, H, W)`` and device, values in [0, 1].

        Each is resized to twice the size, grey with probability 0.3, and cropped in the middle.
        """
        height, width = like.shape[-2:]
        prepare = Compose(
            [
                Resize((2 * height, 2 * width), antialias=True),
                RandomGrayscale(_GRAYSCALE),
                CenterCrop((height, width)),
            ]
        )
        drawn = torch.randint(len(self.paths), (len(like),)).tolist()
        return torch.stack([prepare(read_image(self.paths[i], as_tensor=True)) for i in drawn]).to(like)
