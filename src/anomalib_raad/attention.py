"""The attention bias of the paper's Figures 1 and 2 as a number."""

import torch

_VARYING = 0.25  # the share of pixels that counts as varying


def attention_bias(images: torch.Tensor, maps: torch.Tensor) -> float:
    """How many times more a map says, on average, where normal images vary most than elsewhere.

    Args:
        images: Two or more normal images of the same view, ``(N, 3, H, W)``.
        maps: Their anomaly maps, not negative, ``(N, 1, H, W)``.

    Returns:
        The maps' mean over the quarter of the pixels whose grey level has the largest deviation over the images,
        divided by their mean over the other pixels; 1 is an even-handed map.
    """
    deviation = images.mean(dim=1).std(dim=0).flatten()
    varying = torch.zeros_like(deviation, dtype=torch.bool)
    varying[deviation.topk(round(_VARYING * deviation.numel())).indices] = True
    mean_map = maps.float().mean(dim=(0, 1)).flatten()
    return float(mean_map[varying].mean() / mean_map[~varying].mean().clamp(min=torch.finfo(torch.float32).tiny))
