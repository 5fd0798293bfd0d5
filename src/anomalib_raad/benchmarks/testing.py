"""What the measurements that test models share: part of a data set, and metrics that need no thresholds."""

from typing import Any

from anomalib.data import AnomalibDataModule
from anomalib.metrics import AUPRO, AUROC


def set_up_(data: AnomalibDataModule, every: int) -> str:
    """Set a datamodule up, keep every so-manieth test image only, and return the data set's name for files."""
    data.setup()
    data.test_data = data.test_data.subsample(range(0, len(data.test_data), every))
    return "-".join(filter(None, [data.name, getattr(data, "category", "")]))


def ranking_metrics() -> list[Any]:  # torchmetrics' and anomalib's, which no one type says
    """Image AUROC, and AU-PRO where there are masks."""
    return [
        AUROC(fields=["pred_score", "gt_label"], prefix="image_"),
        AUPRO(fields=["anomaly_map", "gt_mask"], prefix="pixel_", strict=False),
    ]
