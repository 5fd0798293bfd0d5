"""The terms of RAAD's loss (paper, Eq. 5 and 6)."""

import math

import torch


def squared_difference(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Elementwise ``D = (a - b)^2`` in float32."""
    return (a.float() - b.float()).square()


def hard_feature_loss(teacher: torch.Tensor, student: torch.Tensor, p_hard: float = 0.999) -> torch.Tensor:
    """L_ts, Eq. 5 on the hardest features: the mean of the elements of D that reach its ``p_hard``-quantile.

    The quantile is taken of each image on its own, over all channels and positions, so a batch's loss is the mean of
    its images' losses. Of ``n`` elements ``n - ceil(p_hard * (n - 1))`` reach the (interpolated) quantile: 1,573 of the
    384 x 64 x 64 elements of a 256x256 image at 0.999. Elements that tie with the last of them are not added.

    Args:
        teacher: Normalised teacher features of shape ``(N, C, h, w)``.
        student: Student features of the same shape.
        p_hard: Quantile in [0, 1); 0 averages all elements.

    Returns:
        Scalar loss.
    """
    elements = squared_difference(teacher, student).flatten(1)
    n = elements.shape[1]
    return elements.topk(n - math.ceil(p_hard * (n - 1)), dim=1, sorted=False).values.mean()
