"""Hierarchical quantization scoring (HQS): how many bits each layer gets.

Paper, Eq. 4:  b_l = phi(s_l),  s_l = 1 / (c_l w_l h_l) * sum_c || T_c^l(i) - S_c^l(i) ||_F^2
"""

from collections.abc import Iterable, Sequence

import torch

from .quantizers import BITS


def layer_scores(aligned: Iterable[Sequence[tuple[torch.Tensor, torch.Tensor]]]) -> list[float]:
    """Average Eq. 4's discrepancy of teacher and student over images and place it into (0, 1).

    Args:
        aligned: For each batch of normal images the pairs of teacher and student features, one pair per layer, each
            of shape ``(N, c_l, h_l, w_l)``. Both networks run on their own stream.

    Returns:
        ``m / (1 + m)`` for each layer's mean squared difference ``m``: it keeps Eq. 4's order and lies in (0, 1) as the
        paper asks.

    Raises:
        ValueError: If there is no image.
    """
    images, sums = 0, torch.zeros(())
    for pairs in aligned:
        batch = len(pairs[0][0])
        discrepancy = torch.stack([(teacher - student).square().mean() for teacher, student in pairs]).double()
        images, sums = images + batch, sums.to(discrepancy) + batch * discrepancy
    if not images:
        msg = "hierarchical quantization scoring needs at least one normal image"
        raise ValueError(msg)
    mean = sums / images
    return (mean / (1 + mean)).tolist()


def phi(score: float, thresholds: Sequence[float]) -> int:
    """Turn a score in (0, 1) into a bit-width: a higher score gets more bits.

    Args:
        score: The layer's score.
        thresholds: Three increasing limits; the score's cell among them selects 2, 3, 4 or 8 bits.
    """
    return BITS[sum(score >= threshold for threshold in thresholds)]


def allot_bits(scores: Sequence[float], thresholds: Sequence[float], first_last_bits: int) -> list[int]:
    """Give each layer its bits; the first and the last layer's are fixed (paper, section 4.2)."""
    bits = [phi(score, thresholds) for score in scores]
    bits[0] = bits[-1] = first_last_bits
    return bits
