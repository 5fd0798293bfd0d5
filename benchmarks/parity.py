"""Whether a finished model gives the same verdicts in torch, ONNX and OpenVINO.

    python -m benchmarks.parity --ckpt_path model.ckpt --data anomalib.data.Folder --data.name parts ... \
        --output parity.json

Every test image is resized as in training to every size and inferred in batches, in torch and in every exported form:
ONNX in onnxruntime, OpenVINO with the precision hint ``f32`` and once with the precision that it chooses by itself.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnxruntime
import openvino
import torch
from anomalib.data import AnomalibDataModule
from jsonargparse import auto_cli
from rich.console import Console
from rich.table import Table
from torchvision.transforms.v2 import Resize
from tqdm import tqdm, trange

from anomalib_raad import Raad

from .testing import set_up_

Inference = Callable[[np.ndarray], dict[str, np.ndarray]]


def main(
    ckpt_path: Path,
    data: AnomalibDataModule,
    sizes: tuple[int, ...] = (128, 256, 384),
    batches: tuple[int, ...] = (1, 3, 8),
    every: int = 1,
    output: Path | None = None,
) -> None:
    """Compare every exported form with torch on all test images and print a table.

    Args:
        ckpt_path: Checkpoint of a finished model.
        data: Data set whose test images are inferred.
        sizes: Sides of the square images that the networks see.
        batches: Batch sizes.
        every: Infer every n-th test image only.
        output: JSON file for the figures.
    """
    model = Raad.load_from_checkpoint(ckpt_path, visualizer=False).eval()
    set_up_(data, every)
    originals = [data.test_data[index].image for index in trange(len(data.test_data), desc="Images")]
    rows = []
    for size in sizes:
        model.pre_processor = Raad.configure_pre_processor((size, size))
        resize = Resize((size, size), antialias=True)
        images = torch.stack([resize(image) for image in tqdm(originals, f"{size}x{size}")])
        rows += [{"size": size, **row} for row in compare(model, images, batches)]
    columns = list(rows[0])
    table = Table(*columns)
    for row in rows:
        table.add_row(*(f"{row[name]:.1e}" if isinstance(row[name], float) else str(row[name]) for name in columns))
    Console().print(table)
    if output:
        output.write_text(json.dumps(rows, indent=1))


@torch.no_grad()
def compare(model: Raad, images: torch.Tensor, batches: Sequence[int]) -> list[dict[str, Any]]:
    """Infer images ``(N, 3, H, W)`` in every form and batch size.

    Returns:
        For each form and batch size the largest difference of ``pred_score`` and ``anomaly_map`` from torch's, the
        number of images, and how many got another ``pred_label``.
    """
    rows = []
    with TemporaryDirectory() as folder:
        packed = model.to_openvino(folder, "packed")
        forms = {
            "onnx": _onnx(model.to_onnx(Path(folder))),
            "openvino": _openvino(packed, "f32"),
            "openvino, unpacked": _openvino(model.to_openvino(folder, "unpacked", packed=False), "f32"),
            "openvino, its own precision": _openvino(packed),
        }
        for batch in batches:
            chunks = images.split(batch)
            expected = [{n: v.numpy() for n, v in model(chunk)._asdict().items() if v is not None} for chunk in chunks]
            for form, infer in forms.items():
                pairs = [(infer(chunk.numpy()), wanted) for chunk, wanted in zip(chunks, expected, strict=True)]
                rows.append(
                    {
                        "form": form,
                        "batch": batch,
                        "images": len(images),
                        "score": max(_difference(*pair, "pred_score") for pair in pairs),
                        "map": max(_difference(*pair, "anomaly_map") for pair in pairs),
                        "labels": sum(int((a["pred_label"] != w["pred_label"]).sum()) for a, w in pairs),
                    }
                )
    return rows


def _difference(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray], name: str) -> float:
    return float(np.abs(actual[name] - expected[name]).max())


def _onnx(path: Path) -> Inference:
    session = onnxruntime.InferenceSession(path)
    names = [output.name for output in session.get_outputs()]
    return lambda images: dict(zip(names, session.run(None, {session.get_inputs()[0].name: images}), strict=True))


def _openvino(path: Path, precision: str | None = None) -> Inference:
    config = {"INFERENCE_PRECISION_HINT": precision} if precision else {}
    model = openvino.Core().compile_model(path, "CPU", config)
    return lambda images: {output.get_any_name(): value for output, value in model(images).items()}


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
