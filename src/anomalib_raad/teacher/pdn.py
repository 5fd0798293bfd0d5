"""The patch description network (PDN) in anomalib's two sizes, and what its geometry is."""

from anomalib.models.image.efficient_ad.torch_model import (
    EfficientAdModelSize,
    MediumPatchDescriptionNetwork,
    SmallPatchDescriptionNetwork,
)
from torch import nn

STRIDE = 4
"""Pixels of the image for each cell of a PDN's output."""
LOST_CELLS = 4
"""Cells a PDN without padding loses on each side of its output."""
_CLASSES = {
    EfficientAdModelSize.S.value: SmallPatchDescriptionNetwork,
    EfficientAdModelSize.M.value: MediumPatchDescriptionNetwork,
}


def create_pdn(model_size: str, out_channels: int, padding: bool = False) -> nn.Module:
    """Create anomalib's network, which normalises images in [0, 1] itself.

    Args:
        model_size: ``small`` or ``medium``.
        out_channels: Channels of the features.
        padding: Zero-pad the convolutions.

    Raises:
        ValueError: If there is no such size.
    """
    if model_size not in _CLASSES:
        msg = f"model_size is {model_size!r}; the sizes are {', '.join(sorted(_CLASSES))}"
        raise ValueError(msg)
    return _CLASSES[model_size](out_channels, padding)
