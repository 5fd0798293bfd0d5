"""Channel statistics of features, over more images than fit into memory."""

from collections.abc import Iterable

import torch


def channel_mean_std(batches: Iterable[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of each channel over all images and positions, mu and sigma in EfficientAD.

    Args:
        batches: Features of shape ``(N, C, h, w)``; at least one batch.

    Returns:
        Two float32 tensors of shape ``(1, C, 1, 1)``; the standard deviation is never zero.
    """
    count, total, squares = 0, torch.zeros(()), torch.zeros(())
    for features in batches:
        values = features.double()
        count += values.numel() // values.shape[1]
        total = total.to(values) + values.sum((0, 2, 3), keepdim=True)
        squares = squares.to(values) + values.square().sum((0, 2, 3), keepdim=True)
    mean = total / count
    variance = (squares / count - mean.square()).clamp(min=1e-12)  # a channel may be dead, never divide by zero
    return mean.float(), variance.sqrt().float()
