"""AU-sPRO, the localisation metric of MVTec LOCO, which anomalib does not have."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from anomalib.data.utils import read_mask
from anomalib.metrics import AnomalibMetric
from PIL import Image
from torch.nn.functional import interpolate
from torchmetrics import Metric

_THRESHOLDS = 10_000


class _AUsPRO(Metric):
    full_state_update = False
    maps: list[torch.Tensor]
    regions: list[torch.Tensor]
    saturations: list[torch.Tensor]

    def __init__(self, kind: str, fpr_limit: float = 0.05) -> None:
        super().__init__()
        self.kind = kind
        self.fpr_limit = fpr_limit
        for state in ("maps", "regions", "saturations"):
            self.add_state(state, default=[], dist_reduce_fx=None)

    def update(self, anomaly_maps: torch.Tensor, image_paths: Sequence[str]) -> None:
        """Take the anomaly maps, ``(N, H, W)`` or ``(N, 1, H, W)``, of the images at ``image_paths``."""
        for anomaly_map, path in zip(anomaly_maps.float(), map(Path, image_paths), strict=True):
            if path.parent.name in {"good", self.kind}:
                regions, saturations = loco_regions(path)
                self.maps.append(anomaly_map.reshape(anomaly_map.shape[-2:]))
                self.regions.append(regions.to(anomaly_map.device))
                self.saturations.append(saturations.to(anomaly_map.device))

    def compute(self) -> torch.Tensor:
        """Integrate the mean overlap of all regions over the false positive rate."""
        values = torch.cat([anomaly_map.flatten() for anomaly_map in self.maps]).unique()
        thresholds = values[:: -(-len(values) // _THRESHOLDS)].contiguous()
        false_positives = torch.zeros(len(thresholds) + 1, dtype=torch.float64, device=values.device)
        overlaps = []
        for anomaly_map, regions, saturations in zip(self.maps, self.regions, self.saturations, strict=True):
            size = regions.shape[-2:]
            scores = interpolate(anomaly_map[None, None], size, mode="bilinear")[0, 0]
            passed = torch.bucketize(scores, thresholds, right=True)
            false_positives += _counts(passed[~regions.any(dim=0)], len(thresholds))
            overlaps += [
                (_counts(passed[region], len(thresholds)) / saturation).clamp(max=1)
                for region, saturation in zip(regions, saturations, strict=True)
            ]
        if not overlaps:
            msg = f"no image of {self.kind} with regions in ground_truth was tested; AU-sPRO needs one"
            raise ValueError(msg)
        return _area(false_positives / false_positives[-1], torch.stack(overlaps).mean(dim=0), self.fpr_limit)


class AUsPRO(AnomalibMetric, _AUsPRO):  # type: ignore[misc]  # as anomalib writes its own
    """Area under the saturated per-region overlap (sPRO) up to a false positive rate, as MVTec LOCO defines it.

    Every channel of the ground truth is a region with a saturation area: a region counts as found to the share of that
    area that is predicted, at most wholly. The overlaps of all regions are averaged at each threshold. The false
    positive rate is taken over the pixels outside all regions. Maps are resized to the ground truth's size. At most
    10,000 thresholds are taken, evenly from the sorted values of the maps. Only for one process.

    Bergmann et al., Beyond Dents and Scratches, IJCV 2022, https://doi.org/10.1007/s11263-022-01578-9

    Args:
        kind: ``structural_anomalies`` or ``logical_anomalies``: these and the good images are evaluated.
        fpr_limit: False positive rate up to which is integrated; the area is divided by it.
        fields: Fields of a batch: the anomaly map and the image's path.
        prefix: Prefix of the metric's name.
        strict: Raise an error when a batch lacks a field.

    Raises:
        ValueError: If no region of this kind was seen.
    """

    default_fields = ("anomaly_map", "image_path")


def loco_regions(image_path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Read the ground truth of a test image of MVTec LOCO, which anomalib merges into one mask.

    Args:
        image_path: ``CATEGORY/test/KIND/NAME.png``; ``CATEGORY`` holds ``defects_config.json`` and ``ground_truth``.

    Returns:
        Regions, boolean, ``(R, H, W)``, and the saturation area of each in pixels, ``(R,)``. A good image has none.
    """
    category, kind = image_path.parents[2], image_path.parent.name
    if kind == "good":
        width, height = Image.open(image_path).size
        return torch.zeros(0, height, width, dtype=torch.bool), torch.zeros(0)
    defects = {defect["pixel_value"]: defect for defect in json.loads((category / "defects_config.json").read_text())}
    regions, saturations = [], []
    for path in sorted((category / "ground_truth" / kind / image_path.stem).glob("*.png")):
        channel = read_mask(path)
        defect, area = defects[int(channel.max())], int((channel > 0).sum())
        threshold = defect["saturation_threshold"]
        saturations.append(int(threshold * area) if defect["relative_saturation"] else min(threshold, area))
        regions.append(torch.from_numpy(channel > 0))
    return torch.stack(regions), torch.tensor(saturations, dtype=torch.float32)


def _counts(passed: torch.Tensor, thresholds: int) -> torch.Tensor:
    """Pixels that reach each threshold, from the highest on; last, all pixels."""
    return torch.bincount(passed, minlength=thresholds + 1).flip(0).cumsum(0).double()


def _area(rates: torch.Tensor, overlaps: torch.Tensor, limit: float) -> torch.Tensor:
    """Area under the curve up to the limit, between points linear, divided by the limit."""
    zero = rates.new_zeros(1)
    rates, overlaps = torch.cat([zero, rates]), torch.cat([zero, overlaps])
    within = rates <= limit
    last = int(within.sum()) - 1
    end = overlaps[last]
    if last + 1 < len(rates):
        share = (limit - rates[last]) / (rates[last + 1] - rates[last])
        end = torch.lerp(end, overlaps[last + 1], share)
    edge = torch.full_like(zero, limit)
    return torch.trapezoid(torch.cat([overlaps[within], end[None]]), torch.cat([rates[within], edge])) / limit
