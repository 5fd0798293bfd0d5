"""Exported models against the model that they come from."""

from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.data import Folder
from anomalib.data.utils import read_image
from anomalib.deploy import CompressionType, ExportType, OpenVINOInferencer
from anomalib.engine import Engine
from anomalib.models import Aand
from lightning.pytorch import seed_everything

from anomalib_raad.export.openvino import convolutions

onnxruntime = pytest.importorskip("onnxruntime")
openvino = pytest.importorskip("openvino")


@pytest.fixture(scope="module")
def data(cells) -> Folder:
    return Folder(
        name="cells", root=cells, normal_dir="train", normal_test_dir="good", abnormal_dir="bad",
        train_batch_size=2, eval_batch_size=2, num_workers=0, val_split_mode="same_as_test", seed=0,
    )  # fmt: skip


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory) -> Aand:
    """A model after some steps of a real run."""
    seed_everything(0)
    model = Aand(pre_processor=Aand.configure_pre_processor((96, 64)), visualizer=False, amplify=True)
    root = tmp_path_factory.mktemp("finished")
    Engine(max_steps=20, default_root_dir=root, accelerator="cpu", logger=False).fit(model, datamodule=data)
    return model.eval()


@pytest.fixture(scope="module")
def images(cells) -> torch.Tensor:
    return torch.stack([read_image(path, as_tensor=True) for path in sorted(cells.glob("bad/*"))])


def predict(model: Aand, images: torch.Tensor) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        return {name: value for name, value in model(images)._asdict().items() if value is not None}


def assert_close(found: dict[str, np.ndarray], expected: dict[str, torch.Tensor]) -> None:
    for name, tolerance in (("pred_score", 1e-4), ("anomaly_map", 1e-4)):
        torch.testing.assert_close(torch.as_tensor(found[name]), expected[name], rtol=0, atol=tolerance)


def compiled(path: Path) -> openvino.CompiledModel:
    return openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})


def run(model: openvino.CompiledModel, images: torch.Tensor) -> dict[str, np.ndarray]:
    return {output.get_any_name(): value for output, value in model(images.numpy()).items()}


def test_torch(finished: Aand, images, tmp_path) -> None:
    loaded = torch.load(finished.to_torch(tmp_path), weights_only=False)["model"].eval()
    assert_close(predict(loaded, images), predict(finished, images))


def test_onnx(finished: Aand, images, tmp_path) -> None:
    session = onnxruntime.InferenceSession(finished.to_onnx(tmp_path))
    names = [output.name for output in session.get_outputs()]
    for batch in (images, images[:1], images[..., :200, :230]):
        found = session.run(None, {session.get_inputs()[0].name: batch.numpy()})
        assert_close(dict(zip(names, found, strict=True)), predict(finished, batch))


@pytest.fixture(scope="module")
def dynamic(finished, tmp_path_factory) -> Path:
    return finished.to_openvino(tmp_path_factory.mktemp("dynamic"))


def test_openvino(finished: Aand, images, dynamic) -> None:
    model = compiled(dynamic)
    for batch in (images, images[:1], images[..., :200, :230]):
        assert_close(run(model, batch), predict(finished, batch))


def test_openvino_inferencer(finished: Aand, cells, dynamic) -> None:
    path = next(cells.glob("bad/*"))
    expected = predict(finished, read_image(path, as_tensor=True)[None])
    found = OpenVINOInferencer(dynamic, device="CPU").predict(path)
    assert found.pred_score.item() == pytest.approx(float(expected["pred_score"]), abs=2e-2)


def test_post_training_quantization_sees_training_images_only(
    finished: Aand, images, data, dynamic, tmp_path, monkeypatch
) -> None:
    for name in ("val_dataloader", "test_dataloader"):
        monkeypatch.setattr(data, name, lambda: pytest.fail("images that are not for training"))
    path = Engine(default_root_dir=tmp_path).export(
        finished, ExportType.OPENVINO, compression_type=CompressionType.INT8_PTQ, datamodule=data, input_size=(300, 300)
    )
    small, large = (p.with_suffix(".bin").stat().st_size for p in (path, dynamic))
    assert small < 0.45 * large
    model = compiled(path)
    counts = convolutions(model)
    assert sum(counts.values()) - counts["f32"] == 75
    assert counts["f32"] == 2  # the blur's
    found, expected = run(model, images), predict(finished, images)
    difference = torch.as_tensor(found["anomaly_map"]) - expected["anomaly_map"]
    assert difference.abs().mean() < 0.02
    assert difference.mean().abs() < 0.01
    with pytest.raises(ValueError, match="INT8_PTQ needs normal images"):
        finished.to_openvino(tmp_path, compression_type=CompressionType.INT8_PTQ)


def test_a_model_without_thresholds__error(tmp_path) -> None:
    with pytest.raises(ValueError, match="it has no thresholds"):
        Aand().to_openvino(tmp_path)
