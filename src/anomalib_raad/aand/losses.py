"""The losses of both stages (Eq. 6 to 11)."""

from collections.abc import Sequence

import torch
from torch.nn import functional as F  # noqa: N812

_POSITIVE_WEIGHT, _EXPONENT = 0.8, 2  # alpha and gamma of the focal loss
_MARGIN = 0.3  # alpha of Eq. 8
_MOST_ANOMALOUS, _MOST_NORMAL = 1_000, 5_000  # cells of a level and batch that form pairs


def focal_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Focal loss of the gate, averaged over all cells.

    Args:
        logits: The gate before its sigmoid.
        labels: 1 for an anomalous cell, 0 for a normal one, of the same shape.
    """
    gate = logits.sigmoid()
    anomalous = _POSITIVE_WEIGHT * (1 - gate) ** _EXPONENT * F.logsigmoid(logits) * labels
    normal = (1 - _POSITIVE_WEIGHT) * gate**_EXPONENT * F.logsigmoid(-logits) * (1 - labels)
    return -(anomalous + normal).mean()


def amplification_loss(
    features: torch.Tensor, amplified: torch.Tensor, labels: torch.Tensor, foreground: torch.Tensor
) -> torch.Tensor:
    """Anomalous cells are to be less similar to normal ones than before, by a margin (Eq. 7 and 8), as a hinge.

    Args:
        features: F_T, ``(N, C, H, W)``.
        amplified: F_A, of the same shape.
        labels: 1 for an anomalous cell, ``(N, 1, H, W)``.
        foreground: True where normal cells may be drawn, ``(N, 1, H, W)``.

    Returns:
        Mean over pairs of ``relu(cos(F_A^a, F_T^n) - cos(F_T^a, F_T^n) + 0.3)``; 0 where there are none.
    """
    anomalous = _draw((labels > 0).flatten(), _MOST_ANOMALOUS)
    normal = _draw(((labels == 0) & foreground).flatten(), _MOST_NORMAL)
    before, after = (F.normalize(x.float(), dim=1).permute(0, 2, 3, 1).flatten(0, 2) for x in (features, amplified))
    if not len(anomalous) or not len(normal):
        return 0 * amplified.sum()
    reference = before[normal].T
    return F.relu(after[anomalous] @ reference - before[anomalous] @ reference + _MARGIN).mean()


def _draw(cells: torch.Tensor, most: int) -> torch.Tensor:
    """Numbers of the cells that are true, at most so many of them, drawn at random."""
    (numbers,) = cells.nonzero(as_tuple=True)
    return numbers[torch.randperm(len(numbers), device=numbers.device)[:most]]


def distances(target: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """1 - cos of each cell over the channels (Eq. 13), in float32, ``(N, 1, H, W)``, between 0 and 2."""
    return 1 - F.cosine_similarity(target.float(), found.float(), dim=1).unsqueeze(1)


def distillation_loss(targets: Sequence[torch.Tensor], found: Sequence[torch.Tensor]) -> torch.Tensor:
    """1 - cos of whole levels as vectors, averaged over images and summed over levels (Eq. 10).

    Args:
        targets: F_A of each level, ``(N, C_k, H_k, W_k)``.
        found: F_S of each level.
    """
    pairs = zip(targets, found, strict=True)
    return sum(
        ((1 - F.cosine_similarity(t.float().flatten(1), f.float().flatten(1))).mean() for t, f in pairs),
        start=torch.zeros((), device=targets[0].device),
    )


def hard_distillation_loss(
    targets: Sequence[torch.Tensor], found: Sequence[torch.Tensor], hard_cells: int
) -> torch.Tensor:
    """Mean distance of the hardest cells of each image and level, summed over levels (Eq. 11).

    Args:
        targets: F_A of each level, ``(N, C_k, H_k, W_k)``.
        found: F_S of each level.
        hard_cells: K_h, at most all cells of a level.
    """
    total = torch.zeros((), device=targets[0].device)
    for target, level in zip(targets, found, strict=True):
        cells = distances(target, level).flatten(1)
        total = total + cells.topk(min(hard_cells, cells.shape[1]), dim=1).values.mean()
    return total
