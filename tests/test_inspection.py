"""The page's functions, and the page itself in a browser where Debian's chromium and Playwright are installed."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.data.utils import read_image
from anomalib.models import Aand, Agpnet, Raad
from PIL import Image
from torchvision.transforms.v2.functional import resize

openvino = pytest.importorskip("openvino")
gradio = pytest.importorskip("gradio")
from openvino import opset13  # noqa: E402

from anomalib_raad.cli import main  # noqa: E402
from anomalib_raad.inspection import build_page, inspect_images, load  # noqa: E402


@pytest.fixture(scope="module")
def checkpoint(finished_run) -> Path:
    return finished_run / "weights" / "lightning" / "model.ckpt"


@pytest.fixture
def ir(tmp_path) -> Path:
    """A tiny IR with anomalib's inputs and outputs, for 64x64 images: the anomaly map is the mean of the channels."""
    image = opset13.parameter([-1, 3, 64, 64], np.float32)
    anomaly_map = opset13.reduce_mean(image, [1], keep_dims=True)
    score = opset13.reduce_max(anomaly_map, [1, 2, 3])
    outputs = {"pred_score": score, "anomaly_map": anomaly_map, "pred_label": opset13.greater(score, np.float32(0.5))}
    model = openvino.Model(list(outputs.values()), [image])
    for tensor, name in zip([*model.inputs, *model.outputs], ["input", *outputs], strict=True):
        tensor.get_tensor().set_names({name})
    path = tmp_path / "weights" / "openvino" / "model.xml"
    openvino.save_model(model, path, compress_to_fp16=False)
    report = {"layers": [{"layer": "teacher.conv1", "bits": 8}, {"layer": "teacher.conv2", "bits": 4}]}
    (tmp_path / "quantization.json").write_text(json.dumps(report))
    return path


@pytest.fixture
def unreadable(tmp_path) -> Path:
    path = tmp_path / "unreadable.png"
    path.write_text("no image")
    return path


def test_an_image_of_16_bits_is_not_shown_in_white(tmp_path, monkeypatch) -> None:
    warnings = []
    monkeypatch.setattr(gradio, "Warning", warnings.append)
    Image.fromarray(np.full((64, 64), 1000, dtype=np.uint16)).save(tmp_path / "grey.png")
    gallery, rows = inspect_images(pytest.fail, [str(tmp_path / "grey.png")])
    assert (gallery, rows) == ([], [["grey.png", "", "cannot be used", ""]])
    assert "convert it to 8 bits" in warnings[0]


def test_ir(ir, cells, unreadable, monkeypatch) -> None:
    """Images are resized for it, and a file that is none gets a warning and a row."""
    monkeypatch.chdir(ir.parent)  # anomalib's inferencer keeps compiled models in a folder of the working directory
    warnings = []
    monkeypatch.setattr(gradio, "Warning", warnings.append)
    predict, bits = load(ir)
    assert bits == [["teacher.conv1", 8], ["teacher.conv2", 4]]
    cell = min(cells.glob("bad/*"))
    gallery, (failed, (name, score, verdict, milliseconds)) = inspect_images(predict, [str(unreadable), str(cell)])
    assert [warning.partition(": ")[0] for warning in warnings] == ["unreadable.png cannot be used"]
    assert failed == ["unreadable.png", "", "cannot be used", ""]
    expected = resize(read_image(cell, as_tensor=True), [64, 64]).mean(0).max().item()
    assert score == pytest.approx(expected, abs=5e-3)  # bfloat16 on processors that have it
    assert (name, verdict) == (cell.name, "anomalous" if score > 0.5 else "normal")
    assert milliseconds > 0
    ((picture, caption),) = gallery
    assert picture.size == (300, 300)
    assert caption == f"{cell.name}: {verdict}, {score:.3f}"


def test_checkpoint(checkpoint, cells) -> None:
    predict, bits = load(checkpoint)
    assert len(bits) == 22
    assert bits[0] == ["teacher.conv1", 8]
    cell = min(cells.glob("bad/*"))
    _, ((_, score, verdict, _),) = inspect_images(predict, [str(cell)])
    with torch.no_grad():
        expected = Raad.load_from_checkpoint(checkpoint).eval()(read_image(cell, as_tensor=True)[None])
    assert score == round(expected.pred_score.item(), 3)
    assert verdict == ("anomalous" if expected.pred_label.item() else "normal")


def test_a_model_without_post_processor_gives_no_verdict(cells) -> None:
    model = Raad(post_processor=False, pre_processor=Raad.configure_pre_processor((64, 64))).eval()
    with torch.no_grad():
        _, (row,) = inspect_images(model, [str(min(cells.glob("bad/*")))])
    assert row[2] == "no threshold"


def test_load__error(finished_run) -> None:
    with pytest.raises(ValueError, match=r"model.pt is neither an OpenVINO IR \(.xml\) nor a checkpoint"):
        load(Path("model.pt"))
    with pytest.raises(ValueError, match="not finished: it has no thresholds"):
        load(finished_run / "weights" / "lightning" / "quantized.ckpt")


def test_only_this_machine_reaches_the_page(checkpoint, monkeypatch) -> None:
    launched = {}
    monkeypatch.setattr(gradio.Blocks, "launch", lambda page, **options: launched.update(options))
    monkeypatch.setattr("sys.argv", ["anomalib-raad", "inspect", "--model", str(checkpoint)])
    main()
    assert launched == {"server_name": "127.0.0.1", "server_port": 7860, "share": False}


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_in_a_browser(checkpoint, cells, unreadable, tmp_path) -> None:
    """A file that is no image gives a message, and the page goes on with one that is."""
    playwright = pytest.importorskip("playwright.sync_api")
    playwright.expect.set_options(timeout=60_000)
    page = build_page(checkpoint)
    _, url, _ = page.launch(server_name="127.0.0.1", prevent_thread_lock=True, quiet=True)
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        view = browser.new_page()
        view.goto(url)
        images = view.locator("input[type=file]").first
        images.set_input_files(unreadable)
        playwright.expect(view.get_by_text(re.compile("^unreadable.png cannot be used"))).to_be_visible()
        view.get_by_label("Clear").first.click()
        cell = min(cells.glob("bad/*"))
        images.set_input_files(cell)
        playwright.expect(
            view.get_by_alt_text(re.compile(rf"{cell.name}: (normal|anomalous), \d\.\d+"))
        ).to_be_visible()
        playwright.expect(view.get_by_text("cannot be used", exact=True)).to_have_count(0)
        browser.close()
    page.close()


@pytest.mark.parametrize("kind", [Aand, Agpnet])
def test_a_checkpoint_of_another_model_is_shown(cell_data, engine, cells, tmp_path, kind: type) -> None:
    model = kind(pre_processor=kind.configure_pre_processor((64, 64)), visualizer=False)
    engine(max_steps=3, logger=False).fit(model, datamodule=cell_data())
    predict, bits = load(next(tmp_path.rglob("model.ckpt")))
    paths = [str(path) for path in cells.glob("bad/*")]
    _, rows = inspect_images(predict, paths)
    assert bits == []
    assert len(rows) == len(paths)
    assert all(row[2] in {"normal", "anomalous"} and 0 < row[1] < 1 for row in rows)
