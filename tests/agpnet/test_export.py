"""Exported models against the model that they come from."""

from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.data import Folder
from anomalib.data.utils import read_image
from anomalib.deploy import CompressionType, ExportType, OpenVINOInferencer
from anomalib.engine import Engine
from anomalib.models import Agpnet
from lightning.pytorch import seed_everything

from anomalib_raad.agpnet.encoders import VitEncoder

onnxruntime = pytest.importorskip("onnxruntime")
openvino = pytest.importorskip("openvino")

SMALL = {"guided": True, "decoder_width": 64, "decoder_depth": 2, "decoder_heads": 4, "visualizer": False}


@pytest.fixture(scope="module")
def data(cells) -> Folder:
    return Folder(
        name="cells", root=cells, normal_dir="train", normal_test_dir="good", abnormal_dir="bad",
        train_batch_size=2, eval_batch_size=2, num_workers=0, val_split_mode="same_as_test", seed=0,
    )  # fmt: skip


def finish(model: Agpnet, data: Folder, root: Path) -> Agpnet:
    Engine(max_steps=10, default_root_dir=root, accelerator="cpu", logger=False).fit(model, datamodule=data)
    return model.eval()


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory) -> Agpnet:
    """A model after some steps of a real run."""
    seed_everything(0)
    model = Agpnet(pre_processor=Agpnet.configure_pre_processor((96, 64)), **SMALL)
    return finish(model, data, tmp_path_factory.mktemp("finished"))


@pytest.fixture(scope="module")
def transformer(data, tmp_path_factory) -> Agpnet:
    """The same on a vision transformer, whose weights are random."""
    seed_everything(0)
    pre_processor = Agpnet.configure_pre_processor((96, 64))
    model = Agpnet(backbone="vit_tiny_patch16_224", layers=(1, 3), pre_processor=pre_processor, **SMALL)
    model.model.backbone_loaded.fill_(value=True)
    return finish(model, data, tmp_path_factory.mktemp("transformer"))


@pytest.fixture(scope="module")
def images(cells) -> torch.Tensor:
    return torch.stack([read_image(path, as_tensor=True) for path in sorted(cells.glob("bad/*"))])


def predict(model: Agpnet, images: torch.Tensor) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        return {name: value for name, value in model(images)._asdict().items() if value is not None}


def assert_close(found: dict[str, np.ndarray], expected: dict[str, torch.Tensor]) -> None:
    for name in ("pred_score", "anomaly_map"):
        torch.testing.assert_close(torch.as_tensor(found[name]), expected[name], rtol=0, atol=2e-4)


def run(path: Path, images: torch.Tensor) -> dict[str, np.ndarray]:
    model = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return {output.get_any_name(): value for output, value in model(images.numpy()).items()}


@pytest.mark.parametrize("kind", ["finished", "transformer"])
@pytest.mark.parametrize("input_size", [None, (90, 120)])
def test_openvino(request, images, tmp_path, kind: str, input_size) -> None:
    model = request.getfixturevalue(kind)
    path = model.to_openvino(tmp_path, input_size=input_size)
    images = torch.nn.functional.interpolate(images, input_size) if input_size else images
    assert_close(run(path, images), predict(model, images))


@pytest.mark.parametrize("kind", ["finished", "transformer"])
def test_onnx(request, images, tmp_path, kind: str) -> None:
    model = request.getfixturevalue(kind)
    session = onnxruntime.InferenceSession(str(model.to_onnx(tmp_path)))
    names = [output.name for output in session.get_outputs()]
    for batch in (images[:1], images):
        found = dict(zip(names, session.run(None, {"input": batch.numpy()}), strict=True))
        assert_close(found, predict(model, batch))


def test_torch(finished, images, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TRUST_REMOTE_CODE", "1")
    path = finished.to_torch(tmp_path)
    loaded = torch.load(path, weights_only=False)["model"].eval()
    with torch.no_grad():
        assert_close(loaded(images)._asdict(), predict(finished, images))


def test_the_copy_of_the_decoder_is_not_exported(finished, tmp_path) -> None:
    path = finished.to_openvino(tmp_path)
    weights = sum(p.numel() for part in ("encoder", "decoder") for p in getattr(finished.model, part).parameters())
    copy = sum(p.numel() for p in finished.model.momentum.parameters())
    assert path.with_suffix(".bin").stat().st_size < 4 * (weights + copy / 2)


def test_eight_bits(finished, data, images, tmp_path) -> None:
    plain = finished.to_openvino(tmp_path)
    path = finished.to_openvino(tmp_path, "small", compression_type=CompressionType.INT8_PTQ, datamodule=data)
    sizes = [p.with_suffix(".bin").stat().st_size for p in (path, plain)]
    # A byte for each weight of the decoder's linear layers instead of four; biases and norms stay as they are.
    weights = sum(p.numel() for p in finished.model.decoder.parameters() if p.ndim == 2)
    assert sizes[1] - sizes[0] == pytest.approx(3 * weights, rel=0.05)
    found, expected = run(path, images), predict(finished, images)
    difference = torch.as_tensor(found["anomaly_map"]) - expected["anomaly_map"]
    assert difference.abs().mean() < 0.05
    assert difference.mean().abs() < 0.02
    openvino.Core().compile_model(path, "CPU")  # also in the processor's own precision


def test_anomalibs_inferencer_and_export_command(finished, images, tmp_path) -> None:
    engine = Engine(default_root_dir=tmp_path)
    path = engine.export(finished, ExportType.OPENVINO, export_root=tmp_path)
    prediction = OpenVINOInferencer(path, config={"INFERENCE_PRECISION_HINT": "f32"}).predict(
        images[0].permute(1, 2, 0).numpy()
    )
    expected = predict(finished, images[:1])
    assert float(prediction.pred_score.item()) == pytest.approx(float(expected["pred_score"]), abs=2e-4)


def test_a_model_without_thresholds__error(tmp_path) -> None:
    with pytest.raises(ValueError, match="it has no thresholds"):
        Agpnet(**SMALL).to_openvino(tmp_path)


def test_the_transformers_positions_are_not_resampled_in_the_graph(transformer, tmp_path) -> None:
    assert isinstance(transformer.model.encoder, VitEncoder)
    graph = openvino.Core().read_model(transformer.to_openvino(tmp_path))
    assert sum(op.get_type_name() == "Interpolate" for op in graph.get_ops()) == 1  # the map's
