"""Metrics of each product and their means, where a test set has images of several."""

from copy import deepcopy
from typing import Any, cast

import torch
from anomalib.data import ImageBatch
from anomalib.metrics import Evaluator
from lightning.pytorch import LightningModule, Trainer

from anomalib_raad.fit.trainer import datamodule_of


class ProductEvaluator(Evaluator):
    """anomalib's evaluator, which also logs ``PRODUCT_METRIC`` of each product and ``mean_METRIC`` of all.

    A product is what the column ``product`` of a test set's samples names, see :class:`anomalib_raad.Products`.
    """

    product_of: dict[str, str]
    metrics_of: dict[str, list[Any]]

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find out which products there are."""
        del pl_module
        datamodule = datamodule_of(trainer)
        self.product_of = {}
        if datamodule is not None and "product" in (samples := datamodule.test_data.samples):
            self.product_of = dict(zip(samples["image_path"], samples["product"], strict=True))
        products = sorted(set(self.product_of.values()))
        self.metrics_of = {name: [deepcopy(metric) for metric in self.test_metrics] for name in products}

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,  # noqa: ANN401
        batch: ImageBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Update the metrics with a batch, and those of each product with its images."""
        super().on_test_batch_end(trainer, pl_module, outputs, batch, batch_idx, dataloader_idx)
        if self.product_of:
            for item in batch.items:
                for metric in self.metrics_of[self.product_of[cast("str", item.image_path)]]:
                    metric.update(ImageBatch.collate([item]))

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compute and log all metrics."""
        super().on_test_epoch_end(trainer, pl_module)
        values: dict[str, list[torch.Tensor]] = {}
        for product, metrics in self.metrics_of.items():
            for metric in metrics:
                if metric.update_called:
                    values.setdefault(metric.name, []).append(metric.compute())
                    pl_module.log(f"{product}_{metric.name}", values[metric.name][-1])
        for name, found in values.items():
            pl_module.log(f"mean_{name}", torch.stack(found).mean())
        self.metrics_of = {}  # which keep all maps
