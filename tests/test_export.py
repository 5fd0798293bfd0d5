"""anomalib's own export of a finished model: every format gives the scores of the checkpoint."""

from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.data.utils import read_image
from anomalib.deploy import CompressionType, OpenVINOInferencer
from anomalib.models import Raad
from lightning.pytorch import seed_everything
from torch import nn

onnxruntime = pytest.importorskip("onnxruntime")
openvino = pytest.importorskip("openvino")


@pytest.fixture(scope="module")
def images(cells) -> torch.Tensor:
    """Real cells, resized as Raad's pre-processor does it in training."""
    resize = Raad.configure_pre_processor((64, 64)).transform
    return torch.stack([resize(read_image(path, as_tensor=True)) for path in sorted(cells.glob("bad/*"))])


@pytest.fixture(scope="module")
def finished(cells, images, tmp_path_factory) -> Raad:
    """A model after three steps of a real run."""
    from anomalib.data import Folder
    from anomalib.engine import Engine

    data = Folder(
        name="cells", root=cells, normal_dir="train", normal_test_dir="good", abnormal_dir="bad",
        train_batch_size=1, eval_batch_size=2, num_workers=0, val_split_mode="same_as_test", seed=0,
    )  # fmt: skip
    seed_everything(0)
    model = Raad(
        pre_processor=Raad.configure_pre_processor((64, 64)),
        bits={"conv2": 2, "conv3": 4},
        reconstruction_iterations=2,
        visualizer=False,
        # Four images are far too few for the closed form: its huge weights would magnify every rounding error.
        closed_form=False,
    )
    root = tmp_path_factory.mktemp("finished")
    Engine(max_steps=4, default_root_dir=root, accelerator="cpu", logger=False).fit(model, datamodule=data)
    return model.eval()


def expected(model: Raad, images: torch.Tensor) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        return {name: value for name, value in model(images)._asdict().items() if value is not None}


def assert_close(actual: dict[str, torch.Tensor], model: Raad, images: torch.Tensor) -> None:
    for name, value in expected(model, images).items():
        if value.dtype == torch.bool:
            continue  # a score next to the threshold may fall on either side of it
        torch.testing.assert_close(
            torch.as_tensor(actual[name]), value, rtol=0, atol=1e-3, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_torch(finished: Raad, images: torch.Tensor, tmp_path) -> None:
    path = finished.to_torch(tmp_path)
    loaded = torch.load(path, weights_only=False)["model"].eval()
    assert_close(expected(loaded, images), finished, images)


@pytest.mark.parametrize("input_size", [(64, 64), None], ids=["fixed", "dynamic"])
def test_onnx(finished: Raad, images: torch.Tensor, tmp_path, input_size) -> None:
    path = finished.to_onnx(tmp_path, input_size=input_size)
    session = onnxruntime.InferenceSession(path)
    names = [output.name for output in session.get_outputs()]
    for batch in (images, images[:1]):
        if input_size and len(batch) > 1 and session.get_inputs()[0].shape[0] == 1:
            continue
        outputs = session.run(None, {session.get_inputs()[0].name: batch.numpy()})
        assert_close(dict(zip(names, outputs, strict=True)), finished, batch)


def compiled(path: Path, precision: str = "f32") -> openvino.CompiledModel:
    return openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": precision})


def run(model: openvino.CompiledModel, images: torch.Tensor) -> dict[str, np.ndarray]:
    return {output.get_any_name(): value for output, value in model(images.numpy()).items()}


@pytest.mark.parametrize("input_size", [(64, 64), None], ids=["fixed", "dynamic"])
def test_openvino(finished: Raad, images: torch.Tensor, tmp_path, input_size) -> None:
    model = compiled(finished.to_openvino(tmp_path, input_size=input_size))
    assert str(model.input(0).partial_shape) == ("[?,3,64,64]" if input_size else "[?,3,?,?]")
    for batch in (images, images[:1]):
        assert_close(run(model, batch), finished, batch)
    if input_size is None:
        larger = nn.functional.interpolate(images, (80, 96), mode="bilinear")
        assert_close(run(model, larger), finished, larger)


def test_openvino_with_activations_of_8_bits(finished: Raad, images: torch.Tensor, tmp_path) -> None:
    mixed = deepcopy(finished)
    for network in (mixed.model.teacher, mixed.model.student):
        network.conv3.quantize_weight_(2)
        network.conv3.quantize_input_(torch.linspace(0, 15 * float(network.conv3.input_quantizer.scale), 1000), 8)
    assert not torch.equal(expected(mixed, images)["anomaly_map"], expected(finished, images)["anomaly_map"])
    assert_close(run(compiled(mixed.to_openvino(tmp_path, input_size=(64, 64))), images), mixed, images)


def test_every_convolution_and_pooling_runs_in_integers(finished: Raad, tmp_path) -> None:
    runtime = compiled(finished.to_openvino(tmp_path, input_size=(64, 64))).get_runtime_model()
    info = [operation.get_rt_info() for operation in runtime.get_ordered_ops()]
    nodes = [(i["layerType"].astype(str), i["runtimePrecision"].astype(str)) for i in info]
    assert [precision for kind, precision in nodes if kind == "Convolution"] == ["u8"] * 22
    assert [precision for kind, precision in nodes if kind == "Pooling"] == ["u8"] * 4


def test_packed_weights_are_smaller_and_exact(finished: Raad, images: torch.Tensor, tmp_path) -> None:
    packed = finished.to_openvino(tmp_path, "packed", input_size=(64, 64))
    unpacked = finished.to_openvino(tmp_path, "unpacked", input_size=(64, 64), packed=False)
    for name, value in run(compiled(packed), images).items():
        np.testing.assert_array_equal(value, run(compiled(unpacked), images)[name])
    sizes = [path.with_suffix(".bin").stat().st_size for path in (packed, unpacked)]
    conv2, conv3 = (2 * layer.weight.numel() for layer in (finished.model.teacher.conv2, finished.model.teacher.conv3))
    assert sizes[1] - sizes[0] == pytest.approx(conv2 * 6 / 8 + conv3 * 4 / 8, abs=1000)


def test_openvino_inferencer(finished: Raad, cells, tmp_path, monkeypatch) -> None:
    """anomalib's own inferencer, on a file."""
    monkeypatch.chdir(tmp_path)  # it keeps compiled models in a folder of the working directory
    path = min(cells.glob("bad/*"))
    inferencer = OpenVINOInferencer(finished.to_openvino(tmp_path), config={"INFERENCE_PRECISION_HINT": "f32"})
    prediction = inferencer.predict(path)
    with torch.no_grad():
        expected = finished(read_image(path, as_tensor=True)[None]).pred_score
    assert prediction.pred_score.item() == pytest.approx(expected.item(), abs=1e-3)


@pytest.mark.parametrize(
    ("compression", "message"), [(CompressionType.INT8, "Quantizing it once more changes scores and verdicts")]
)
def test_compressing_a_finished_model_warns(finished: Raad, tmp_path, caplog, compression, message) -> None:
    path = finished.to_openvino(tmp_path, input_size=(64, 64), compression_type=compression)
    assert "quantized already, and exported without compression_type it runs in integers" in caplog.text
    assert message in caplog.text
    assert path.exists()


@pytest.mark.parametrize("kind", ["torch", "onnx", "openvino"])
def test_a_model_without_thresholds__error(tmp_path, kind: str) -> None:
    model = Raad(pre_processor=Raad.configure_pre_processor((64, 64)), visualizer=False)
    with pytest.raises(ValueError, match="not finished: it has no thresholds"):
        getattr(model, f"to_{kind}")(tmp_path)
    assert not list(tmp_path.rglob("*.*"))


def test_unfinished_model_exports_without_verdicts(images: torch.Tensor, tmp_path) -> None:
    model = Raad(pre_processor=Raad.configure_pre_processor((64, 64)), post_processor=False, visualizer=False)
    session = onnxruntime.InferenceSession(model.to_onnx(tmp_path, input_size=(64, 64)))
    outputs = session.run(None, {session.get_inputs()[0].name: images[:1].numpy()})
    names = [output.name for output in session.get_outputs()]
    assert_close(dict(zip(names, outputs, strict=True)), model.eval(), images[:1])
