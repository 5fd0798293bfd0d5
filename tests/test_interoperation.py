"""Raad with the parts of anomalib that no other test touches: inferencer, datamodules, tiled ensemble."""

from argparse import Namespace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from anomalib.data import Kolektor, MVTecAD, MVTecLOCO, Visa
from anomalib.data.utils import read_image
from anomalib.deploy import TorchInferencer
from anomalib.models import Raad
from anomalib.pipelines.tiled_ensemble import TrainTiledEnsemble
from PIL import Image

from anomalib_raad import RaadModel

LOADING = {"train_batch_size": 1, "eval_batch_size": 1, "num_workers": 0}


def write_images(root: Path, *names: str) -> None:
    for seed, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(seed).integers(0, 256, (80, 80, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / name)


def write_mask(path: Path, value: int = 255) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.zeros((80, 80), dtype=np.uint8)
    pixels[8:24, 8:24] = value
    Image.fromarray(pixels).save(path)


def mvtec_ad(root: Path) -> MVTecAD:
    write_images(root / "part", "train/good/0.png", "train/good/1.png", "test/good/0.png", "test/cut/0.png")
    write_mask(root / "part/ground_truth/cut/0_mask.png")
    return MVTecAD(root, "part", **LOADING)


def visa(root: Path) -> Visa:
    part = root / "visa_pytorch/candle"
    write_images(part, "train/good/0.JPG", "train/good/1.JPG", "test/good/0.JPG", "test/bad/0.JPG")
    write_mask(part / "ground_truth/bad/0.png")
    return Visa(root, "candle", **LOADING)


def mvtec_loco(root: Path) -> MVTecLOCO:
    write_images(root / "part", "train/good/0.png", "train/good/1.png", "validation/good/0.png", "test/good/0.png")
    write_images(root / "part", "test/logical_anomalies/0.png")
    write_mask(root / "part/ground_truth/logical_anomalies/0/000.png")
    return MVTecLOCO(root, "part", **LOADING)


def kolektor(root: Path) -> Kolektor:
    for part in range(6):
        write_images(root, f"kos0{part}/Part0.jpg")
        write_mask(root / f"kos0{part}/Part0_label.bmp", value=255 if part == 5 else 0)
    return Kolektor(root, **LOADING)


@pytest.mark.parametrize("make", [mvtec_ad, visa, mvtec_loco, kolektor])
def test_datamodules(make, small_raad, engine, tmp_path) -> None:
    data, model = make(tmp_path / "data"), small_raad()
    runner = engine(max_steps=2, logger=False)
    # anomalib 2.7's MVTecLOCO puts lists into a column of strings, which pandas 3 refuses otherwise.
    with pd.option_context("future.infer_string", False):
        runner.fit(model, datamodule=data)
        metrics = runner.test(model, datamodule=data)[0]
    assert model.global_step == 2
    assert set(metrics) == {"image_AUROC", "image_F1Score", "pixel_AUROC", "pixel_F1Score"}


def test_torch_inferencer(finished_run, cells, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TRUST_REMOTE_CODE", "1")  # anomalib unpickles the model, this one we have just written
    model = Raad.load_from_checkpoint(finished_run / "weights/lightning/model.ckpt").eval()
    inferencer = TorchInferencer(model.to_torch(tmp_path), device="cpu")
    path = min(cells.glob("bad/*"))
    with torch.no_grad():
        expected = model(read_image(path, as_tensor=True)[None])
    prediction = inferencer.predict(path)
    torch.testing.assert_close(prediction.pred_score.flatten(), expected.pred_score.flatten())
    torch.testing.assert_close(prediction.anomaly_map.squeeze(), expected.anomaly_map.squeeze())


def test_tiled_ensemble(tmp_path, monkeypatch) -> None:
    """Two tiles, two models, statistics of the merged maps; each model has seen and scored its own tile only."""
    monkeypatch.chdir(tmp_path)
    mvtec_ad(tmp_path / "data")
    # anomalib 2.7 cannot pass a pre-processor to a model that has init_args, so settings come another way here.
    quick = partial(Raad, reconstruction_iterations=0, closed_form=False)
    monkeypatch.setattr("anomalib.models.Raad", quick)
    config = {
        "seed": 0,
        "accelerator": "cpu",
        "default_root_dir": str(tmp_path),
        "normalization_stage": "image",
        "tiling": {"tile_size": [64, 64], "stride": [64, 64], "image_size": [64, 128]},
        "data": {
            "class_path": "anomalib.data.MVTecAD",
            "init_args": {"root": str(tmp_path / "data"), "category": "part", "val_split_mode": "same_as_test"}
            | LOADING,
        },
        "SeamSmoothing": {"apply": False},
        "TrainModels": {
            "model": {"class_path": "Raad"},
            "trainer": {"max_steps": 2, "logger": False, "enable_progress_bar": False},
        },
    }
    (tmp_path / "ensemble.yaml").write_text(yaml.safe_dump(config))
    sizes = []
    maps = RaadModel.maps
    monkeypatch.setattr(RaadModel, "maps", lambda self, image: sizes.append(image.shape[-2:]) or maps(self, image))
    TrainTiledEnsemble().run(Namespace(config=tmp_path / "ensemble.yaml"))
    for name in ("model", "trained", "quantized"):
        assert [path.stem for path in sorted(tmp_path.rglob(f"{name}*.ckpt"))] == [f"{name}0_0", f"{name}0_1"]
    assert {path.parent.name for path in tmp_path.rglob("quantization.json")} == {"0_0", "0_1"}
    assert next(tmp_path.rglob("stats.json")).stat().st_size
    assert set(sizes) == {(64, 64)}
