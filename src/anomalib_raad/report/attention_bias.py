"""The attention bias of the paper's Figures 1 and 2 as a number."""

from collections.abc import Sequence

import torch
from torch.nn import functional as F  # noqa: N812

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


def held_out_figures(
    images: Sequence[torch.Tensor], maps: Sequence[torch.Tensor], recalibrated: Sequence[torch.Tensor]
) -> dict[str, float]:
    """What the maps of held-out normal images say of a stage.

    Args:
        images: The images, each ``(1, 3, H, W)``.
        maps: Of each the student-teacher and the student-autoencoder map, ``(1, 2, h, w)``.
        recalibrated: The same, recalibrated.

    Returns:
        The mean of either map, and its attention bias before and after recalibration where there are two or more images
        of one size.
    """
    figures = {}
    for number, name in enumerate(("st", "ae")):
        figures[f"held_out_map_{name}"] = float(torch.cat([m[:, number].flatten() for m in maps]).float().mean())
    if len(images) > 1 and len({image.shape for image in images}) == 1:
        seen = torch.cat([F.interpolate(image.float(), size=maps[0].shape[-2:], mode="area") for image in images])
        for when, values in (("", torch.cat([*maps])), ("_recalibrated", torch.cat([*recalibrated]))):
            for number, name in enumerate(("st", "ae")):
                figures[f"attention_bias_{name}{when}"] = attention_bias(seen, values[:, number : number + 1])
    return figures
