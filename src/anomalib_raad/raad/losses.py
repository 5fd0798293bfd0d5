"""The terms of RAAD's loss (paper, Eq. 5 and 6)."""

import math
from typing import NamedTuple

import torch
from torchvision.transforms.v2 import functional as TF  # noqa: N812


class Losses(NamedTuple):
    """The three terms of Eq. 6 and EfficientAD's penalty, each a scalar, not yet weighted."""

    st: torch.Tensor
    """L_ts: student against teacher, hard features only."""
    stae: torch.Tensor
    """L_aes: student against autoencoder."""
    ae: torch.Tensor
    """L_tae: autoencoder against teacher."""
    penalty: torch.Tensor | None = None
    """Mean squared student output on an image that has nothing to do with the part."""

    def weighted(self, lambdas: tuple[float, float, float]) -> torch.Tensor:
        """Eq. 6: the sum of the terms times their lambdas; the penalty, if there is one, as it is."""
        total = lambdas[0] * self.st + lambdas[1] * self.stae + lambdas[2] * self.ae
        return total if self.penalty is None else total + self.penalty


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


def augment(images: torch.Tensor) -> torch.Tensor:
    """Change brightness, contrast or saturation of each image by a factor from U(0.8, 1.2), EfficientAD Algorithm 1."""
    adjustments = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation)
    choices = torch.randint(len(adjustments), (len(images),)).tolist()
    factors = torch.empty(len(images)).uniform_(0.8, 1.2).tolist()
    return torch.stack([adjustments[c](i, f) for c, i, f in zip(choices, images, factors, strict=True)])
