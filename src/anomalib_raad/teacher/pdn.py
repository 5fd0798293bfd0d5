"""The patch description network (PDN) in anomalib's two sizes, and what its geometry is."""

import math

from anomalib.models.image.efficient_ad.torch_model import (
    EfficientAdModelSize,
    MediumPatchDescriptionNetwork,
    SmallPatchDescriptionNetwork,
)
from torch import nn

CHANNELS = 384
"""Channels of EfficientAD's teachers."""
STRIDE = 4
"""Pixels of the image for each cell of a PDN's output."""
LOST_CELLS = 4
"""Cells a PDN without padding loses on each side of its output."""
MARGIN = 8
"""Pixels by which an image is extended on each side for a PDN without padding: a quarter of what a patch covers."""
UNSEEN_CELLS = LOST_CELLS - MARGIN // STRIDE
"""Cells along each edge of an image that are no patch's centre then."""
_CLASSES = {
    EfficientAdModelSize.S.value: SmallPatchDescriptionNetwork,
    EfficientAdModelSize.M.value: MediumPatchDescriptionNetwork,
}


def create_pdn(model_size: str, out_channels: int, padding: bool = False) -> nn.Module:
    """Create anomalib's network, which normalises images in [0, 1] itself.

    Its inner layers are those of a network of 384 channels, or a multiple, whatever its last one says.

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
    whole = math.ceil(out_channels / CHANNELS) * CHANNELS
    network = _CLASSES[model_size](whole, padding)
    if out_channels < whole:
        name, head = [(name, part) for name, part in network.named_children() if isinstance(part, nn.Conv2d)][-1]
        last = nn.Conv2d(head.in_channels, out_channels, head.kernel_size, padding=head.padding)  # type: ignore[arg-type]
        network.add_module(name, last)
    return network
