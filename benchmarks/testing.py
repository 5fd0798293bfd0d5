"""What the measurements that test models share: part of a data set, and metrics that need no thresholds."""

from typing import Any

from anomalib.data import AnomalibDataModule
from anomalib.metrics import AUPRO, AUROC
from lightning.pytorch.trainer.states import TrainerFn


def set_up_(data: AnomalibDataModule, every: int) -> str:
    """Set a datamodule up, keep every n-th test image only, and return the data set's name for files."""
    data.setup(TrainerFn.TESTING)  # as the trainer: anomalib makes every other set-up anew when the trainer comes
    data.test_data = data.test_data.subsample(range(0, len(data.test_data), every))
    return "-".join(filter(None, [data.name, getattr(data, "category", "")]))


def ranking_metrics() -> list[Any]:  # torchmetrics' and anomalib's, which no one type says
    """Image AUROC, and AU-PRO where there are masks."""
    return [
        AUROC(fields=["pred_score", "gt_label"], prefix="image_"),
        AUPRO(fields=["anomaly_map", "gt_mask"], prefix="pixel_", strict=False),
    ]
