"""The attention bias of the paper's Figures 1 and 2 as a number."""

from collections.abc import Sequence

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


def held_out_figures(images: Sequence[torch.Tensor], maps: Sequence[torch.Tensor], blind_edge: int) -> dict[str, float]:
    """What the maps of held-out normal images say of a stage.

    Args:
        images: The images, each ``(1, 3, H, W)``.
        maps: Of each the student-teacher and the student-autoencoder map, unnormalised, ``(2, 1, 1, H, W)``.
        blind_edge: Pixels along the edges that the maps do not cover.

    Returns:
        The mean of either map, and its attention bias where there are two or more images of one size.
    """
    values = torch.cat([pair.flatten(1).float().cpu() for pair in maps], dim=1)
    figures = dict(zip(["held_out_map_st", "held_out_map_ae"], values.numpy().mean(axis=1).tolist(), strict=True))
    if len(images) > 1 and len({image.shape for image in images}) == 1:
        inside = slice(blind_edge, -blind_edge or None)
        (st, ae), seen = torch.cat([*maps], dim=1)[..., inside, inside], torch.cat([*images])[..., inside, inside]
        figures |= {"attention_bias_st": attention_bias(seen, st), "attention_bias_ae": attention_bias(seen, ae)}
    return figures
