import json

import pandas as pd
import pytest
import timm
import torch
from PIL import Image
from skimage import data

from anomalib_raad.cli import distill
from anomalib_raad.teacher.backbones import OFFLINE_BACKBONE
from anomalib_raad.teacher.distillation import Distillation, PhotoFolder, Photos

SMALL = {"backbone": OFFLINE_BACKBONE, "layers": (1, 2, 3), "crop_size": 64, "crops": 4, "normalization_images": 4}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Real photos that scikit-image carries."""
    root = tmp_path_factory.mktemp("photos")
    for name in ("astronaut", "chelsea", "coffee", "rocket"):
        Image.fromarray(getattr(data, name)()).save(root / f"{name}.png")
    return root


@pytest.fixture(scope="module")
def model() -> Distillation:
    torch.manual_seed(0)
    return Distillation(**SMALL)


def test_a_crop_and_its_features_show_the_same_place(model: Distillation) -> None:
    """Features whose values are their own coordinates must come back as those of the crop."""
    rows = torch.arange(64.0).view(1, 64, 1).expand(1, 64, 64)
    columns = rows.transpose(1, 2)
    image = torch.stack([rows[0], columns[0], rows[0]]).repeat_interleave(4, 1).repeat_interleave(4, 2)
    model._pool = [(image, torch.cat([rows, columns]))]
    for _ in range(20):
        crop, target = model._random_crop()
        assert crop.shape == (3, 64, 64)
        assert torch.equal(target, crop[:2, 16:-16:4, 16:-16:4])


def test_teacher_and_target_align(model: Distillation) -> None:
    """An impulse in the image moves the teacher's output most at the cell that lies over it."""
    image = torch.zeros(1, 3, 64, 64)
    impulse = image.clone()
    impulse[..., 32:36, 32:36] = 1  # cell 8 of 16; the output lacks 4 cells on each side
    with torch.no_grad():
        moved = (model.teacher(impulse) - model.teacher(image)).square().sum(1)[0]
    row, column = divmod(int(moved.argmax()), moved.shape[1])
    assert abs(row - 4) <= 1
    assert abs(column - 4) <= 1


def test_explained_variance_is_one_minus_the_error_over_the_variance(model: Distillation) -> None:
    photo = torch.rand(2, 3, 512, 512)
    model.feature_std.fill_(1.0)
    model.log = lambda *args, **kwargs: None
    model.on_validation_epoch_start()
    with torch.no_grad():
        model.validation_step(photo, 0)
        target = model._normalized_features(photo)[:, :, 4:-4, 4:-4].double()
        small = torch.nn.functional.interpolate(photo, size=(256, 256), mode="bilinear", antialias=True)
        error = (model.teacher(small) - target).square().mean((0, 2, 3))
    expected = 1 - error / target.var((0, 2, 3), correction=0)
    torch.testing.assert_close(model.explained_variance(), expected, rtol=1e-3, atol=1e-3)


def test_command_distils_and_resumes(photos, tmp_path) -> None:
    """A scaled-down teacher from real photos: the loss falls, and an interrupted run goes on."""
    arguments = [
        "--config=configs/distill_cpu.yaml", f"--data.root={photos}", "--data.held_out=1", "--data.num_workers=0",
        "--model.crop_size=64", "--model.crops=4", "--model.normalization_images=4", "--trainer.precision=32-true",
        "--trainer.val_check_interval=4", f"--trainer.default_root_dir={tmp_path}", "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false", "--trainer.logger=CSVLogger",
        f"--trainer.logger.save_dir={tmp_path}", "--trainer.log_every_n_steps=1",
    ]  # fmt: skip
    output = tmp_path / "teacher.safetensors"
    distill([*arguments, "--trainer.max_steps=12", f"--output={output}"])
    assert output.stat().st_size < 5.5e6
    record = json.loads(output.with_suffix(".json").read_text())
    assert record["steps"] == 12
    assert len(record["explained_variance_by_channel"]) == 384
    losses = pd.read_csv(next(tmp_path.rglob("metrics.csv")))["train_loss"].dropna()
    assert losses.iloc[-3:].mean() < losses.iloc[:3].mean()

    checkpoint = next(tmp_path.rglob("*.ckpt"))
    distill([*arguments, "--trainer.max_steps=14", f"--output={output}", f"--ckpt_path={checkpoint}"])
    assert json.loads(output.with_suffix(".json").read_text())["steps"] == 14


def test_the_papers_configuration_takes_a_step(photos, tmp_path, monkeypatch) -> None:
    """With its own backbone and layers, but random weights, which need no download."""
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *args, **options: create(*args, **options | {"pretrained": False}))
    output = tmp_path / "teacher.safetensors"
    distill([
        "--config=configs/distill.yaml", f"--data.root={photos}", "--data.held_out=1", "--data.num_workers=0",
        "--data.batch_size=1", "--model.crops=1", "--model.normalization_images=1", "--trainer.max_steps=1",
        "--trainer.precision=32-true", "--trainer.val_check_interval=1", "--trainer.accelerator=cpu",
        f"--trainer.default_root_dir={tmp_path}", "--trainer.enable_progress_bar=false", "--trainer.logger=false",
        f"--output={output}",
    ])  # fmt: skip
    assert json.loads(output.with_suffix(".json").read_text())["steps"] == 1


def test_unreadable_photos_are_named_and_skipped_up_to_a_limit(photos, tmp_path, caplog) -> None:
    broken = [tmp_path / f"{number}.png" for number in range(21)]
    for path in broken:
        path.write_text("not an image")
    dataset = Photos([broken[0], photos / "chelsea.png"], lambda image: image)
    assert torch.equal(dataset[0], dataset[1])
    assert f"skipping {broken[0]}, which cannot be read" in caplog.text
    with pytest.raises(RuntimeError, match="more than 20 photos cannot be read; the last is"):
        Photos(broken, lambda image: image)[0]


def test_too_few_photos__error(photos) -> None:
    with pytest.raises(ValueError, match="has 4 images; distillation needs more than the 9 held out"):
        PhotoFolder(photos, held_out=9).setup()


@pytest.mark.parametrize("size", [30, 130, 512])
def test_crop_size__error(size: int) -> None:
    with pytest.raises(ValueError, match=f"crop_size is {size}; a multiple of 4 from 36 to 256"):
        Distillation(**{**SMALL, "crop_size": size})
