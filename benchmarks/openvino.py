"""What deployed Raad, Aand and Agpnet cost, against anomalib's EfficientAd: latency, throughput, size, memory.

    python -m benchmarks.openvino --output openvino.json

Weights do not matter for time and size, so the models are untrained; Raad's conv2 and conv3 get ``bits``, and it runs
with its defaults, with images as large as the others', and with all of the teacher's channels; PatchCore,
on EfficientNet-Lite0, a bank of anomalib's default for 200 images at 256x256: a tenth of their patches. All models
infer the same solar cell in turn in one process, so that whatever else the machine does slows all of them: quote the
ratios. The int8 peak is what OpenVINO reaches in convolutions that have nothing else to do, measured in the same turn;
a variant's share of it is its multiply-adds in that time. EfficientAd's INT8_PTQ is what anomalib's own export makes,
calibrated on the validation cells; Aand's and Agpnet's are made on training cells. Memory is what loading a model and
one inference add to a process of its own.
"""

import json
import logging
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import openvino
import torch
from anomalib.data.utils import read_image
from anomalib.deploy import CompressionType
from anomalib.models import EfficientAd
from anomalib.models.components import AnomalibModule
from jsonargparse import auto_cli
from openvino import opset13
from rich.console import Console
from rich.table import Table
from torchvision.transforms.v2 import Resize

from anomalib_raad import Aand, Agpnet, Raad
from anomalib_raad.compare.baselines import OfflinePatchcore
from anomalib_raad.compare.timing import median_seconds
from anomalib_raad.data.elpv import Elpv
from anomalib_raad.export.openvino import convolutions
from anomalib_raad.quantization.recipe import quantize_

from .memory import printed_by

_SIZE = (256, 256)
_RAADS = {  # sides of the images and compared channels
    "Raad": (128, 128),
    "Raad, 256x256": (256, 128),
    "Raad, 256x256, 384 channels": (256, 384),
}
_BANK_IMAGES = 200  # that PatchCore has seen
_REFERENCE = "EfficientAd INT8_PTQ"
_PEAK_CHANNELS, _PEAK_SIDE, _PEAK_LAYERS = 512, 32, 4  # of those tried, the shape with the most multiply-adds a second
# How many dimensions of the weights are not summed over.
_OUTER = {
    "Convolution": 1,
    "GroupConvolution": 2,
    "ConvolutionBackpropData": 1,
}
_REQUESTS = 8  # images in flight and waiting when throughput is taken


def main(rounds: int = 30, bits: int = 4, output: Path | None = None) -> None:
    """Export every variant, time them and print a table.

    Args:
        rounds: Timed inferences of each variant after two that are not counted; the median counts.
        bits: Bits of Raad's inner layers.
        output: JSON file for the figures.
    """
    logging.getLogger("nncf").setLevel(logging.ERROR)
    cells = Elpv(category="mono", num_workers=0, augmentations=Resize(_SIZE))  # INT8_PTQ feeds them as they are
    cells.setup()
    image = Resize(_SIZE)(read_image(cells.train_data.samples.image_path[0], as_tensor=True)[None])
    with TemporaryDirectory() as folder:
        rows = [_Variant(*variant) for variant in _export(Path(folder), image, bits, cells)]
        peak_graph = _peak_model()
        peak = openvino.Core().compile_model(peak_graph, "CPU")
        values = np.full(peak.input(0).shape, 100, dtype=np.float32)
        steps: list[Callable[[], object]] = [partial(peak, values), *(row.infer for row in rows)]
        median_seconds(steps, rounds=2)  # to warm up
        peak_seconds, *all_seconds = median_seconds(steps, rounds)
        per_second = multiply_adds(peak_graph) / peak_seconds
        for row, seconds in zip(rows, all_seconds, strict=True):
            row.figures["milliseconds"] = 1000 * seconds
            row.figures["share_of_int8_peak"] = row.figures["multiply_adds"] / seconds / per_second
        queues = [row.infer_many for row in rows]
        for row, seconds in zip(rows, median_seconds(queues, max(1, rounds // 5)), strict=True):
            row.figures["images_per_second"] = _REQUESTS / seconds
    figures: dict[str, dict[str, Any]] = {row.name: row.figures for row in rows}
    _print(figures)
    if output:
        output.write_text(json.dumps(figures, indent=1))


class _Variant:
    """An IR, compiled for latency and for throughput, and an image for it."""

    def __init__(self, name: str, path: Path, precision: str | None, image: torch.Tensor) -> None:
        self.name = name
        self.image = image.numpy()
        config: dict[str, Any] = {"INFERENCE_PRECISION_HINT": precision} if precision else {}
        core = openvino.Core()
        graph = core.read_model(path)
        graph.reshape(list(self.image.shape))
        start = time.perf_counter()
        self.model = core.compile_model(path, "CPU", config | {"PERFORMANCE_HINT": "LATENCY"})
        self.figures: dict[str, Any] = {
            "load_seconds": time.perf_counter() - start,
            "megabytes": sum(path.with_suffix(suffix).stat().st_size for suffix in (".xml", ".bin")) / 1e6,
            "memory_megabytes": printed_by("benchmarks.memory", str(path), *filter(None, [precision])),
            "convolutions": convolutions(self.model),
            "multiply_adds": multiply_adds(graph),
        }
        self.queue = openvino.AsyncInferQueue(
            core.compile_model(path, "CPU", config | {"PERFORMANCE_HINT": "THROUGHPUT"})
        )

    def infer(self) -> None:
        self.model(self.image)

    def infer_many(self) -> None:
        for _ in range(_REQUESTS):
            self.queue.start_async(self.image)
        self.queue.wait_all()


def _export(
    folder: Path, image: torch.Tensor, bits: int, cells: Elpv
) -> list[tuple[str, Path, str | None, torch.Tensor]]:
    """Names, IRs, inference precisions and images; precision ``None`` is OpenVINO's, bfloat16 where the CPU has it."""
    # Without post-processors, whose thresholds only training sets
    efficientad = EfficientAd(post_processor=False, evaluator=False, visualizer=False)

    def export(module: AnomalibModule, name: str, size: tuple[int, int] = _SIZE, **options: Any) -> Path:
        return module.to_openvino(folder, name, input_size=size, **options)

    full = export(efficientad, "efficientad")
    aand, agpnet = (kind(post_processor=False, evaluator=False, visualizer=False) for kind in (Aand, Agpnet))
    eight: dict[str, Any] = {"compression_type": CompressionType.INT8_PTQ, "datamodule": cells}
    models: list[tuple[str, Path, str | None]] = [
        ("EfficientAd f32", full, "f32"),
        ("EfficientAd", full, None),
        ("EfficientAd FP16", export(efficientad, "fp16", compression_type=CompressionType.FP16), None),
        (_REFERENCE, export(efficientad, "ptq", **eight), None),
        ("PatchCore", _export_patchcore(folder / "patchcore.xml"), None),
        ("Aand", export(aand, "aand"), None),
        ("Aand INT8_PTQ", export(aand, "aandptq", **eight), None),
        ("Agpnet", export(agpnet, "agpnet"), None),
        ("Agpnet INT8_PTQ", export(agpnet, "agpptq", **eight), None),
    ]
    variants = [(*model, image) for model in models]
    for name, (side, channels) in _RAADS.items():
        raad, small = _quantized_raad(side, channels, bits, image)
        path = export(raad, f"raad-{side}-{channels}", (side, side))
        variants += [(name, path, None, small), (f"{name}, f32", path, "f32", small)]
    return variants


@torch.no_grad()
def _quantized_raad(side: int, channels: int, bits: int, image: torch.Tensor) -> tuple[Raad, torch.Tensor]:
    """A quantized model for images of a size, and the image in it."""
    options: dict[str, Any] = {"post_processor": False, "evaluator": False, "visualizer": False}
    raad = Raad(bits=bits, channels=channels, pre_processor=Raad.configure_pre_processor((side, side)), **options)
    small = Resize((side, side), antialias=True)(image)
    quantize_(raad.model.eval(), [small], [small], raad.allocation)
    return raad, small


@torch.no_grad()
def _export_patchcore(path: Path) -> Path:
    """Converted here, since anomalib 2.7 exports it for batches of two images only."""
    network = OfflinePatchcore(post_processor=False, evaluator=False, visualizer=False).model
    image = torch.rand(1, 3, *_SIZE)
    patches = network.train()(image)  # in training it gives the patches' features
    network.memory_bank = torch.rand(_BANK_IMAGES * len(patches) // 10, patches.shape[1])
    model = openvino.convert_model(torch.export.export(network.eval(), (image,), strict=False))
    model.reshape(image.shape)  # the conversion leaves every size of the input open
    openvino.save_model(model, path)
    return path


def _peak_model() -> openvino.Model:
    """Convolutions of 3x3 in integers, one after another."""
    shape = (_PEAK_CHANNELS, _PEAK_CHANNELS, 3, 3)
    kernel = np.random.default_rng(0).integers(-127, 128, shape, dtype=np.int8)
    x = y = opset13.parameter([1, _PEAK_CHANNELS, _PEAK_SIDE, _PEAK_SIDE], np.float32)
    low, high, scale = (np.float32(value) for value in (0, 255, 1e-4))
    for _ in range(_PEAK_LAYERS):
        integers = opset13.fake_quantize(y, low, high, low, high, 256)
        weights = opset13.multiply(opset13.convert(opset13.constant(kernel), "f32"), scale)
        y = opset13.convolution(integers, weights, [1, 1], [1, 1], [1, 1], [1, 1])
    return openvino.Model([y], [x], "peak")


def multiply_adds(model: openvino.Model) -> int:
    """Of the convolutions of a graph with fixed shapes, for one inference."""
    total = 0
    for operation in model.get_ordered_ops():
        kind = operation.get_type_name()
        if kind in _OUTER:  # a transposed convolution's weights meet each value that enters it
            places = operation.input(0).get_shape() if kind == "ConvolutionBackpropData" else operation.output(0).shape
            total += int(np.prod(places) * np.prod(operation.input(1).get_shape()[_OUTER[kind] :]))
    return total


def _print(figures: dict[str, dict[str, Any]]) -> None:
    reference = figures[_REFERENCE]
    table = Table(
        "Variant", "ms / image", "ratio", "images / s", "MB", "load s", "memory MB", "of int8 peak", "convolutions"
    )
    for name, row in figures.items():
        table.add_row(
            name,
            f"{row['milliseconds']:.1f}",
            f"{row['milliseconds'] / reference['milliseconds']:.2f}",
            f"{row['images_per_second']:.1f}",
            f"{row['megabytes']:.1f}",
            f"{row['load_seconds']:.1f}",
            f"{row['memory_megabytes']:.0f}",
            f"{row['share_of_int8_peak']:.0%}",
            ", ".join(f"{count} {precision}" for precision, count in row["convolutions"].items()),
        )
    Console().print(table)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
