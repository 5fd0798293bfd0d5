"""Which model to take for what, from the cells of a comparison."""

import math
from collections.abc import Mapping

import numpy as np
import pandas as pd

from .bootstrap import interval

_COLUMNS = {"image_AUROC": "image AUROC", "pixel_AUPRO": "AU-PRO", "openvino_ms": "OpenVINO, ms"}
_FEW = 0.05  # a wider interval of image AUROC than this on either side comes from few test images


def _means(frame: pd.DataFrame, names: list[str]) -> pd.DataFrame:
    """Each model's means over data sets of means over seeds."""
    return frame.groupby(["data", "model"], sort=False)[names].mean().groupby("model", sort=False).mean()


def choice(frame: pd.DataFrame) -> pd.DataFrame:
    """Each model's figures, means over data sets of means over seeds, as text."""
    costs = frame.assign(**{"MB": frame["megabytes"], "fit, minutes": frame["fit_seconds"] / 60}).rename(
        columns=_COLUMNS
    )
    names = [name for name in (*_COLUMNS.values(), "MB", "fit, minutes") if name in costs and costs[name].notna().any()]
    means = _means(costs, names)
    texts = {name: means[name].map(lambda x: f"{x:.3f}" if x <= 1 else f"{x:.1f}") for name in names}
    return pd.DataFrame(texts).reset_index()


def advice(frame: pd.DataFrame, resampled: Mapping[str, Mapping[str, np.ndarray]]) -> str:
    """What the figures say in a sentence or two.

    Args:
        frame: The cells.
        resampled: For every data set and model image AUROC on resampled test images, see :mod:`~.bootstrap`.
    """
    costs = ["image_AUROC", "openvino_ms", "megabytes"]
    means = _means(frame, costs)
    auroc, milliseconds, megabytes = (dict(zip(map(str, means.index), means[name], strict=True)) for name in costs)
    if len(auroc) < 2:
        return ""
    best, smallest = max(auroc, key=auroc.__getitem__), min(megabytes, key=megabytes.__getitem__)

    def ahead(other: str) -> np.ndarray:
        pairs = [(models[best], models[other]) for models in resampled.values() if {best, other} <= set(models)]
        return np.mean([ours.mean(axis=1) - theirs.mean(axis=1) for ours, theirs in pairs], axis=0)

    as_good = [other for other in auroc if other != best and interval(ahead(other))[0] <= 0]
    text = f"{best} detects best, with an image AUROC of {auroc[best]:.3f}"
    text += f"; on so many test images {' and '.join(as_good)} cannot be told from it" if as_good else ""
    text += f". {smallest} is the smallest, with {megabytes[smallest]:.1f} MB"
    if not any(map(math.isnan, milliseconds.values())):
        fastest = min(milliseconds, key=milliseconds.__getitem__)
        text += f"; {fastest} is the fastest, with {milliseconds[fastest]:.0f} ms an image in OpenVINO"
    if smallest in {best, *as_good}:
        text += f". Take {smallest}: it is the smallest, and these images do not show that any detects better."
    else:
        text += f". Take {best} where detection is what counts, {smallest} where size is."
    intervals = [interval(models[best].mean(axis=1)) for models in resampled.values() if best in models]
    if (widest := max(high - low for low, high in intervals) / 2) > _FEW:
        text += f" There are few test images: image AUROC is known to {100 * widest:.0f} points either way."
    return text
