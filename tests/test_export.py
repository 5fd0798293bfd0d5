"""anomalib's own export of a finished model: every format gives the scores of the checkpoint."""

import pytest
import torch
from anomalib.data.utils import read_image
from anomalib.models import Raad
from lightning.pytorch import seed_everything

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
    # Four images are far too few for the closed-form start: its huge weights would magnify every rounding error.
    model = Raad(pre_processor=Raad.configure_pre_processor((64, 64)), closed_form_start=False, visualizer=False)
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
        torch.testing.assert_close(torch.as_tensor(actual[name]), value, rtol=0, atol=1e-3, msg=name)


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


@pytest.mark.parametrize("input_size", [(64, 64), None], ids=["fixed", "dynamic"])
def test_openvino(finished: Raad, images: torch.Tensor, tmp_path, input_size) -> None:
    path = finished.to_openvino(tmp_path, input_size=input_size)
    model = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    outputs = model(images[:1].numpy())
    actual = {output.get_any_name(): value for output, value in outputs.items()}
    assert_close(actual, finished, images[:1])


def test_unfinished_model_exports_too(images: torch.Tensor, tmp_path) -> None:
    model = Raad(pre_processor=Raad.configure_pre_processor((64, 64)), visualizer=False)
    session = onnxruntime.InferenceSession(model.to_onnx(tmp_path, input_size=(64, 64)))
    outputs = session.run(None, {session.get_inputs()[0].name: images[:1].numpy()})
    names = [output.name for output in session.get_outputs()]
    assert_close(dict(zip(names, outputs, strict=True)), model.eval(), images[:1])
