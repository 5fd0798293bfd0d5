"""A page in the browser that shows what a deployed model says about images: ``anomalib-raad inspect --model FILE``."""

import json
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import gradio as gr
import numpy as np
import torch
from anomalib.data.utils import read_image
from anomalib.deploy import OpenVINOInferencer
from anomalib.visualization.image.functional import overlay_image, visualize_anomaly_map, visualize_image
from PIL import Image
from torchvision.transforms.v2.functional import resize

from .aand.lightning_model import Aand
from .agpnet.lightning_model import Agpnet
from .data.readable import unreadable
from .fit.checkpoints import check_archive
from .post_processing import check_thresholds
from .quantization.layers import quantizable_layers
from .raad.lightning_model import Raad

COLUMNS = ["image", "score (threshold 0.5)", "verdict", "milliseconds"]

Predict = Callable[[torch.Tensor], Any]  # from an image (1, 3, H, W) in [0, 1] to anomalib's batch of predictions


def load(path: Path) -> tuple[Predict, list[list[str | int]]]:
    """Load a model.

    Args:
        path: OpenVINO IR (``.xml``) or checkpoint (``.ckpt``).

    Returns:
        The function that predicts, and each layer's name and bits. Those of an IR stand in the ``quantization.json`` of
        its run, in the IR's folder or up to two folders above; without it there are none.

    Raises:
        ValueError: If it is another file, or a checkpoint without thresholds.
    """
    if path.suffix == ".xml":
        reports = [folder / "quantization.json" for folder in path.resolve().parents[:3]]
        layers: list[dict[str, Any]] = next(
            (json.loads(report.read_text())["layers"] for report in reports if report.exists()), []
        )
        return _load_ir(path), [[layer["layer"], layer["bits"]] for layer in layers]
    if path.suffix == ".ckpt":
        model = _model_of(path).load_from_checkpoint(path, map_location="cpu").eval()
        check_thresholds(model.post_processor)
        return model, [[name, layer.bits] for name, layer in quantizable_layers(model.model).items()]
    msg = (
        f"{path} is neither an OpenVINO IR (.xml) nor a checkpoint (.ckpt). A .pt is not opened, since it can run any "
        "code; `anomalib export --export_type openvino` makes an IR of a checkpoint"
    )
    raise ValueError(msg)


def _model_of(path: Path) -> type[Raad | Aand | Agpnet]:
    check_archive(path)
    content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    # Raad says what is wrong with any other.
    return next((model for model in (Aand, Agpnet) if model.__name__ in content), Raad)


def _load_ir(path: Path) -> Predict:
    inferencer = OpenVINOInferencer(path)
    shape = inferencer.input_blob.partial_shape
    if shape[2].is_dynamic:
        return inferencer.predict
    size = [shape[2].get_length(), shape[3].get_length()]
    return lambda image: inferencer.predict(resize(image, size, antialias=True))


def inspect_images(
    predict: Predict,
    paths: Sequence[str],
) -> tuple[list[tuple[Image.Image, str]], list[list[str | float]]]:
    """Predict images.

    Args:
        predict: The model.
        paths: Files, of which some may not be images.

    Returns:
        The images under their heatmaps, whose middle colour is the threshold, each with a caption; and for every file
        a row of :data:`COLUMNS`.
    """
    gallery: list[tuple[Image.Image, str]] = []
    rows: list[list[str | float]] = []
    faults = unreadable(paths)
    for path in paths:
        name = Path(path).name
        if path in faults:
            gr.Warning(f"{name} cannot be used: {faults[path]}")
            rows.append([name, "", "cannot be used", ""])
            continue
        image = cast("torch.Tensor", read_image(path, as_tensor=True))
        start = time.perf_counter()
        with torch.inference_mode():
            prediction = predict(image[None])
        milliseconds = 1000 * (time.perf_counter() - start)
        score, label = prediction.pred_score.item(), prediction.pred_label
        if not math.isfinite(score):
            gr.Warning(f"the score of {name} is not finite")
            rows.append([name, "", "no verdict: the score is not finite", ""])
            continue
        verdict = "no threshold" if label is None else "anomalous" if label.item() else "normal"
        heatmap = visualize_anomaly_map(np.asarray(prediction.anomaly_map).squeeze().clip(0, 1))
        gallery.append((overlay_image(visualize_image(image), heatmap), f"{name}: {verdict}, {score:.3f}"))
        rows.append([name, round(score, 3), verdict, round(milliseconds, 1)])
    return gallery, rows


def build_page(model: Path) -> gr.Blocks:
    """The page of a model; see :func:`load` for what it can be."""
    predict, bits = load(model)
    with gr.Blocks(analytics_enabled=False, title="anomalib-raad inspect") as page:
        gr.Markdown(f"## {model}")
        with gr.Row():
            files = gr.File(file_count="multiple", label="Images")
            folder = gr.File(file_count="directory", label="Folder of images")
        gallery = gr.Gallery(label="Heatmaps", columns=4, object_fit="contain")
        table = gr.Dataframe(headers=COLUMNS, label="Predictions")
        with gr.Accordion("Bits of the layers", open=False):
            gr.Dataframe(bits, headers=["layer", "bits"])
        for source in (files, folder):
            # One at a time: a compiled OpenVINO model has a single request.
            source.upload(partial(inspect_images, predict), source, [gallery, table], concurrency_id="model")
    return page


def inspect(model: Path, address: str = "127.0.0.1", port: int = 7860) -> None:
    """Serve a page that shows what a model says about images, until it is interrupted.

    Args:
        model: OpenVINO IR (``.xml``) or checkpoint (``.ckpt``).
        address: Address to listen at. The default is only reachable from this machine; nobody is asked for a password.
        port: Port to listen at.
    """
    build_page(model).launch(server_name=address, server_port=port, share=False)
