"""What the number of test images leaves open: image AUROC on resampled test images."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import rankdata

RESAMPLES = 1000
_INSIDE = (2.5, 97.5)  # per cent: the interval holds 95 % of the resamples


def resampled_auroc(
    cells: Mapping[str, Sequence[Mapping[str, Any]]], resamples: int = RESAMPLES
) -> dict[str, np.ndarray]:
    """Image AUROC of several models on the same resampled test images.

    Normal and anomalous images are resampled apart, so that there are always as many of either as in the data set.

    Args:
        cells: For each model its cells of one data set, with the label and score of every test image.
        resamples: Number of resamples.

    Returns:
        For each model ``(resamples, cells)`` values.
    """
    first = next(iter(cells.values()))[0]["images"]
    labels = np.array([image["label"] for image in first], dtype=bool)
    scores = [np.array([image["score"] for image in cell["images"]]) for group in cells.values() for cell in group]
    generator = np.random.default_rng(0)
    parts = [np.flatnonzero(labels == label) for label in (False, True)]
    found = np.empty((resamples, len(scores)))
    for row in found:
        normal, anomalous = (generator.choice(part, len(part)) for part in parts)
        row[:] = [_auroc(values[normal], values[anomalous]) for values in scores]
    models = np.array([model for model, group in cells.items() for _ in group])
    return {model: found[:, models == model] for model in cells}


def _auroc(normal: np.ndarray, anomalous: np.ndarray) -> float:
    """Share of the pairs of a normal and an anomalous image that are ranked right; ties count half (Mann-Whitney)."""
    ranks = rankdata(np.concatenate([normal, anomalous]))[len(normal) :]
    return float((ranks.sum() - len(anomalous) * (len(anomalous) + 1) / 2) / (len(normal) * len(anomalous)))


def interval(values: np.ndarray) -> tuple[float, float]:
    """Where 95 % of resampled values lie."""
    low, high = np.percentile(values, _INSIDE)
    return float(low), float(high)
