"""Hierarchical quantization scoring (HQS): a score for each layer.

Paper, Eq. 4:  b_l = phi(s_l),  s_l = 1 / (c_l w_l h_l) * sum_c || T_c^l(i) - S_c^l(i) ||_F^2
"""

from collections.abc import Iterable, Sequence

import torch


def layer_scores(aligned: Iterable[Sequence[tuple[torch.Tensor, torch.Tensor]]]) -> list[float]:
    """Compare teacher and student layer by layer, Eq. 4 averaged over images.

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
