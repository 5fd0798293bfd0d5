"""An anomalib model as an OpenVINO IR; that of a quantized one runs in integer kernels."""

from pathlib import Path
from tempfile import TemporaryDirectory

import openvino
import torch
from anomalib.models.components import AnomalibModule
from anomalib.models.components.base.export_mixin.utils import (
    get_default_dynamic_axes,
    get_dynamic_shapes_from_axes,
    get_example_input,
)

from .lowering import integer_kernels
from .packing import pack_weights_


def save_ir(model: openvino.Model, path: Path, half: bool) -> None:
    """Save a model as IR.

    Args:
        model: The model.
        path: Where the ``.xml`` goes; the ``.bin`` goes beside it. Both appear when they are complete.
        half: Store floating-point constants as float16.
    """
    with TemporaryDirectory(dir=path.parent) as unfinished:
        openvino.save_model(model, Path(unfinished) / path.name, compress_to_fp16=half)
        for suffix in (".bin", ".xml"):  # whoever sees an .xml finds its .bin
            (Path(unfinished) / path.name).with_suffix(suffix).replace(path.with_suffix(suffix))


def convert_integer(module: AnomalibModule, input_size: tuple[int, int] | None, packed: bool) -> openvino.Model:
    """Convert a quantized model so that its convolutions and poolings run in integer kernels; see :func:`convert`.

    Args:
        module: The model; teacher, student and autoencoder are quantized.
        input_size: Height and width of the images; ``None``: any.
        packed: Store 2-bit weights in 2 bits, 3- and 4-bit weights in 4; otherwise all in 8.
    """
    with integer_kernels(module):
        model = convert(module, input_size)
    if packed:
        pack_weights_(model)
    return model


@torch.no_grad()
def convert(module: AnomalibModule, input_size: tuple[int, int] | None) -> openvino.Model:
    """Convert a model with its pre- and post-processor.

    Args:
        module: The model, which is left in evaluation mode.
        input_size: Height and width of the images; ``None``: any. The batch size is always open.
    """
    module.eval()
    shapes = get_dynamic_shapes_from_axes(get_default_dynamic_axes(input_size, ["input"], []), ["input"], [])
    example = get_example_input(input_size, shapes).to(module.device)
    names = [name for name, value in module(example)._asdict().items() if value is not None]
    program = torch.export.export(module, (example,), dynamic_shapes=shapes, strict=False)
    model = openvino.convert_model(program)
    model.reshape([-1, 3, *(input_size or (-1, -1))])  # the conversion leaves every size of the input open
    model.inputs[0].get_tensor().set_names({"input"})
    for output, name in zip(model.outputs, names, strict=True):
        output.get_tensor().set_names({name})
    return model


def convolutions(model: openvino.CompiledModel) -> dict[str, int]:
    """How many convolutions of a compiled model run in which precision, for instance ``{"u8": 22}``."""
    counts: dict[str, int] = {}
    for operation in model.get_runtime_model().get_ordered_ops():
        info = operation.get_rt_info()
        if info["layerType"].astype(str) == "Convolution":
            precision = info["runtimePrecision"].astype(str)
            counts[precision] = counts.get(precision, 0) + 1
    return counts
