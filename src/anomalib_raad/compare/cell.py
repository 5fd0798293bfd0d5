"""One model fitted and tested on one data set with one seed."""

import base64
import io
import time
import traceback
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any, cast

import pandas as pd
import torch
import yaml
from anomalib.data import MVTecLOCO
from anomalib.data.utils import ValSplitMode
from anomalib.engine import Engine
from anomalib.metrics import AUPR, AUPRO, AUROC, F1Score
from anomalib.models.components import AnomalibModule
from anomalib.visualization.image.item_visualizer import visualize_image_item
from lightning.pytorch import seed_everything
from PIL import Image
from torchmetrics.functional.classification import binary_auroc
from torchvision.transforms.v2.functional import resize

from anomalib_raad.evaluation import ProductEvaluator
from anomalib_raad.metrics import AUsPRO
from anomalib_raad.quantization.layers import quantizable_layers
from anomalib_raad.quantization.size import average_bits, model_bytes

from .scores import SquashingPostProcessor
from .timing import median_seconds

_LOCO_KINDS = ("structural", "logical")
_TIMED_PREDICTIONS = 5


class AUPRO5(AUPRO):
    """Area under the per-region overlap up to 5 % false positives."""


def attempt(*arguments: Any) -> dict[str, Any]:
    """The figures of a cell, or its error: whatever fails in one cell, the others are worth having."""
    try:
        return _run(*arguments)
    except Exception as error:  # noqa: BLE001
        return {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}


def _run(
    model_options: dict[str, Any],
    data_options: dict[str, Any],
    seed: int,
    limits: dict[str, Any],
    folder: Path,
) -> dict[str, Any]:
    seed_everything(seed)
    folder.mkdir(parents=True, exist_ok=True)
    configuration = folder / "config.yaml"  # what `anomalib train -c` takes
    arguments = data_options.get("init_args", {}) | model_options.get("data", {})
    model_and_data = {
        name: {key: options.get(key, {}) for key in ("class_path", "init_args")}
        for name, options in (("model", model_options), ("data", data_options | {"init_args": arguments}))
    }
    configuration.write_text(yaml.safe_dump(model_and_data | {"trainer": limits}))
    try:
        engine, model, datamodule = Engine.from_config(str(configuration), default_root_dir=str(folder))
    except SystemExit as error:  # of anomalib's command line; any other, as of Ctrl+C, ends the comparison
        msg = f"anomalib does not accept {configuration}; what is wrong with it was printed above"
        raise ValueError(msg) from error
    if datamodule.val_split_mode in {ValSplitMode.SAME_AS_TEST, ValSplitMode.FROM_TEST}:
        msg = f"val_split_mode is {datamodule.val_split_mode.value}: thresholds would see test images; take from_train"
        raise ValueError(msg)
    recorder = _Recorder(test_metrics=_metrics(loco=isinstance(datamodule, MVTecLOCO)))
    model.evaluator, model.post_processor, model.visualizer = recorder, SquashingPostProcessor(), None
    # anomalib 2.7 puts lists of masks into columns that pandas 3 takes for strings
    with pd.option_context("future.infer_string", False):  # noqa: FBT003
        start = time.monotonic(), time.process_time()
        engine.fit(model, datamodule=datamodule)
        seconds, processor_seconds = time.monotonic() - start[0], time.process_time() - start[1]
        # The finished model's thresholds and map quantiles: a fit that ends within an epoch has not validated.
        engine.validate(model, datamodule=datamodule, verbose=False)
        metrics = engine.test(model, datamodule=datamodule, verbose=False)[0]
    return {
        **metrics,
        **_loco_means(recorder.images, metrics),
        "test_images": len(recorder.images),
        "steps": engine.trainer.global_step,
        "fit_seconds": seconds,
        "fit_cpu_seconds": processor_seconds,
        "step_seconds": median(recorder.step_seconds),
        "latency_ms": 1000 * _latency(model, datamodule.test_data),
        "openvino_ms": 1000 * _openvino_latency(model, datamodule.test_data, folder),
        "bytes": _bytes(model),
        "average_bits": average_bits(quantizable_layers(model.model).values()),
        "images": recorder.images,
        "heatmaps": _heatmaps(model, datamodule.test_data, recorder.images),
    }


class _Recorder(ProductEvaluator):
    """Notes the time of each training step and the score of each test image as well."""

    def __init__(self, test_metrics: Sequence[Any]) -> None:
        super().__init__(test_metrics=test_metrics)
        self.images: list[dict[str, Any]] = []
        self.step_seconds: list[float] = []
        self._start = 0.0

    def on_train_batch_start(self, *_: Any) -> None:
        self._start = time.perf_counter()

    def on_train_batch_end(self, *_: Any) -> None:
        self.step_seconds.append(time.perf_counter() - self._start)

    def on_test_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, *rest: Any) -> None:  # noqa: ANN401
        super().on_test_batch_end(trainer, pl_module, outputs, batch, *rest)
        for path, label, score in zip(batch.image_path, batch.gt_label, batch.pred_score, strict=True):
            name = "/".join(Path(path).parts[-2:])
            self.images.append({"image": name, "label": int(label), "score": float(score)})


def _metrics(*, loco: bool) -> list[Any]:
    metrics = [
        AUROC(fields=["pred_score", "gt_label"], prefix="image_"),
        AUPR(fields=["pred_score", "gt_label"], prefix="image_"),
        F1Score(fields=["pred_label", "gt_label"], prefix="image_"),
        AUROC(fields=["anomaly_map", "gt_mask"], prefix="pixel_", strict=False),
        AUPRO(fields=["anomaly_map", "gt_mask"], prefix="pixel_", strict=False),
        AUPRO5(fields=["anomaly_map", "gt_mask"], prefix="pixel_", strict=False, fpr_limit=0.05),
    ]
    if loco:
        metrics += [AUsPRO(kind=f"{kind}_anomalies", prefix=f"{kind}_") for kind in _LOCO_KINDS]
    return metrics


def _loco_means(images: list[dict[str, Any]], metrics: Mapping[str, float]) -> dict[str, float]:
    """MVTec LOCO's AUROC for each kind of anomaly against the good images, and the means over both kinds."""
    if f"{_LOCO_KINDS[0]}_AUsPRO" not in metrics:
        return {}
    values = {}
    for kind in _LOCO_KINDS:
        part = [image for image in images if image["image"].startswith(("good/", f"{kind}_anomalies/"))]
        scores, labels = (torch.tensor([image[key] for image in part]) for key in ("score", "label"))
        values[f"{kind}_AUROC"] = float(binary_auroc(scores, labels))
    for name, figures in (("AUROC", values), ("AUsPRO", metrics)):
        values[f"mean_{name}"] = sum(figures[f"{kind}_{name}"] for kind in _LOCO_KINDS) / len(_LOCO_KINDS)
    return values


@torch.no_grad()
def _latency(model: Any, dataset: Any) -> float:  # noqa: ANN401  # anomalib types all parts as optional
    """Median seconds of the network for one image on the CPU in float32."""
    model.cpu().float().eval()  # PatchCore keeps its bank in the precision of its fit
    image = model.pre_processor.transform(dataset[0].image[None])
    (seconds,) = median_seconds([partial(model.model, image)], _TIMED_PREDICTIONS)
    return seconds


@torch.no_grad()
def _openvino_latency(model: Any, dataset: Any, folder: Path) -> float:  # noqa: ANN401
    """Median seconds of the exported model for one image on the CPU, in OpenVINO's own choice of precision."""
    if find_spec("openvino") is None:
        return float("nan")
    import openvino  # noqa: PLC0415  # optional

    image = resize(dataset[0].image[None], list(model.input_size or dataset[0].image.shape[-2:]))
    core = openvino.Core()
    graph = core.read_model(model.to_openvino(folder, input_size=tuple(image.shape[-2:])))
    number = graph.input(0).partial_shape[0]
    images = image.repeat(number.get_length() if number.is_static else 1, 1, 1, 1)  # anomalib fixes some models at two
    compiled = core.compile_model(graph, "CPU")
    compiled(images.numpy())
    (seconds,) = median_seconds([partial(compiled, images.numpy())], _TIMED_PREDICTIONS)
    return seconds / len(images)


@torch.no_grad()
def _heatmaps(model: Any, dataset: Any, images: list[dict[str, Any]]) -> dict[str, str]:  # noqa: ANN401
    """The most wrong and most right test images of either label: image, mask if any and heatmap, as data URLs."""
    ranked = sorted(range(len(images)), key=lambda index: images[index]["score"])
    normal = [index for index in ranked if not images[index]["label"]]
    anomalous = [index for index in ranked if images[index]["label"]]
    chosen = {
        "worst normal": normal[-1],
        "worst anomalous": anomalous[0],
        "best normal": normal[0],
        "best anomalous": anomalous[-1],
    }
    pictures = {}
    for name, index in chosen.items():
        item = dataset[index]
        predictions = model.post_processor(model.model(model.pre_processor.transform(item.image[None])))
        item.anomaly_map = predictions.anomaly_map[0]
        picture = visualize_image_item(
            item,
            fields=["image", "gt_mask"],
            overlay_fields=[("image", ["anomaly_map"])],
            field_size=(96, 96),
            text_config={"enable": False},
        )
        file = io.BytesIO()
        cast("Image.Image", picture).convert("RGB").save(file, "JPEG", quality=70)
        pictures[name] = "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
    return pictures


def _bytes(model: AnomalibModule) -> int:
    """Of everything the model needs to predict; quantized weights in their bits."""
    bank = getattr(model.model, "memory_bank", None)
    return model_bytes(model.model) + (bank.numel() * bank.element_size() if bank is not None else 0)
