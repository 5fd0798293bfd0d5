"""Hierarchical quantization scoring (HQS): how many bits each layer gets.

Paper, Eq. 4:  b_l = phi(s_l),  s_l = 1 / (c_l w_l h_l) * sum_c || T_c^l(i) - S_c^l(i) ||_F^2

Hidden layers of student and teacher were never trained to agree channel by channel, so Eq. 4 compares arbitrary orders
there. The misalignment does not depend on the order; it is reported beside the score and decides nothing.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch

from .quantizers import BITS


class LayerScores(NamedTuple):
    """One number for each layer."""

    literal: list[float]
    """Eq. 4, averaged over images and placed into (0, 1)."""
    misalignment: list[float]
    """1 - linear CKA (arXiv 1905.00414, Eq. 5) over all positions: 0 if student and teacher differ by a rotation."""


def layer_scores(aligned: Iterable[Sequence[tuple[torch.Tensor, torch.Tensor]]]) -> LayerScores:
    """Compare teacher and student layer by layer.

    Args:
        aligned: For each batch of normal images the pairs of teacher and student features, one pair per layer, each
            of shape ``(N, c_l, h_l, w_l)``. Both networks run on their own stream.

    Returns:
        The scores. The literal one is ``m / (1 + m)`` for each layer's mean squared difference ``m``: it keeps Eq. 4's
        order and lies in (0, 1) as the paper asks.

    Raises:
        ValueError: If there is no image.
    """
    images, sums = 0, torch.zeros(())
    alignments: list[_Alignment] = []
    for pairs in aligned:
        batch = len(pairs[0][0])
        discrepancy = torch.stack([(teacher - student).square().mean() for teacher, student in pairs]).double()
        images, sums = images + batch, sums.to(discrepancy) + batch * discrepancy
        alignments = alignments or [_Alignment() for _ in pairs]
        for alignment, (teacher, student) in zip(alignments, pairs, strict=True):
            alignment.update(teacher, student)
    if not images:
        msg = "hierarchical quantization scoring needs at least one normal image"
        raise ValueError(msg)
    mean = sums / images
    return LayerScores((mean / (1 + mean)).tolist(), [1 - alignment.cka() for alignment in alignments])


class _Alignment:
    """Linear CKA of two layers from sums over positions."""

    def __init__(self) -> None:
        self.count, self.sums, self.products = 0, torch.zeros(()), torch.zeros(())

    def update(self, teacher: torch.Tensor, student: torch.Tensor) -> None:
        """Add the positions of a batch of features, each ``(N, c, h, w)``."""
        both = torch.cat([teacher, student], dim=1).movedim(1, -1).flatten(0, -2).float()
        self.count += len(both)
        self.sums = self.sums.to(both.device) + both.sum(0).double()
        with torch.autocast(both.device.type, enabled=False):  # sums of 16-bit products are not precise enough
            self.products = self.products.to(both.device) + (both.T @ both).double()

    def cka(self) -> float:
        """``|| X^T Y ||^2 / (|| X^T X || || Y^T Y ||)`` of the centred features."""
        covariance = self.products - self.sums.outer(self.sums) / self.count
        half = len(covariance) // 2
        xx, xy, yy = covariance[:half, :half], covariance[:half, half:], covariance[half:, half:]
        return float(xy.square().sum() / (xx.norm() * yy.norm()).clamp(min=torch.finfo(torch.float64).tiny))


def phi(score: float, thresholds: Sequence[float]) -> int:
    """Turn a score in (0, 1) into a bit-width: a higher score gets more bits.

    Args:
        score: The layer's score.
        thresholds: Three increasing limits; the score's cell among them selects 2, 3, 4 or 8 bits.
    """
    return BITS[sum(score >= threshold for threshold in thresholds)]


def allot_by_budget(
    scores: Sequence[float],
    weights: Sequence[int],
    average_bits: float,
    first_last_bits: int,
) -> list[int]:
    """Give the layers 8 bits and take bits away, from low scores first, until the average is small enough.

    All inner layers go down to 4 bits, one after another, before the first goes down to 3.

    Args:
        scores: Score of each layer.
        weights: Number of weights of each layer.
        average_bits: Most bits a weight may have on average.
        first_last_bits: Bits of the first and the last layer.

    Raises:
        ValueError: If 2 bits in every inner layer are still too many.
    """

    def average() -> float:
        return sum(b * w for b, w in zip(bits, weights, strict=True)) / sum(weights)

    bits = [first_last_bits, *[BITS[-1]] * (len(scores) - 2), first_last_bits]
    by_score = sorted(range(1, len(scores) - 1), key=scores.__getitem__)
    for fewer in reversed(BITS[:-1]):
        for layer in by_score:
            if not average() <= average_bits:  # nor if it is not a number
                bits[layer] = fewer
    if not average() <= average_bits:
        least = f"with first_last_bits {first_last_bits} at least {average():.2f} are needed"
        msg = f"average_bits is {average_bits}; {least}"
        raise ValueError(msg)
    return bits


def allot_bits(scores: Sequence[float], thresholds: Sequence[float], first_last_bits: int) -> list[int]:
    """Give each layer its bits; the first and the last layer's are fixed (paper, section 4.2)."""
    bits = [phi(score, thresholds) for score in scores]
    bits[0] = bits[-1] = first_last_bits
    return bits
