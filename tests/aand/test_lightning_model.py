import json

import pytest
import torch
from anomalib.data import Folder
from anomalib.engine import Engine
from anomalib.models import Aand
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import EarlyStopping, LambdaCallback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from PIL import Image
from torchvision.transforms.v2 import RandomHorizontalFlip

from anomalib_raad.aand.schedule import Schedule, Stage

STEPS = 9  # 4 of stage 1, 5 of stage 2; an epoch over 4 kept images ends within each stage
OPTIONS = {"visualizer": False, "lr": 1e-3, "amplify": True}


def make_aand(**options) -> Aand:
    return Aand(**({"pre_processor": Aand.configure_pre_processor((64, 64))} | OPTIONS | options))


def weights(model: Aand) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same_weights(model: Aand, other: Aand) -> None:
    found, expected = weights(model), weights(other)
    assert found.keys() == expected.keys()
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@pytest.fixture(scope="module")
def uninterrupted(cells, tmp_path_factory):
    """Folder with a checkpoint after every step of a finished run, and its model."""
    folder = tmp_path_factory.mktemp("run")
    seed_everything(7)
    data = Folder(
        name="cells", root=cells, normal_dir="train", normal_test_dir="good", abnormal_dir="bad",
        train_batch_size=1, eval_batch_size=2, num_workers=0, val_split_mode="same_as_test", seed=0,
    )  # fmt: skip
    model = make_aand(visualizer=True)
    keep = {"save_top_k": -1, "auto_insert_metric_name": False}
    callbacks = [ModelCheckpoint(folder / "steps", "{step}", every_n_train_steps=1, **keep)]
    engine = Engine(
        max_steps=STEPS, default_root_dir=folder, accelerator="cpu", callbacks=callbacks, enable_progress_bar=False,
        logger=CSVLogger(folder), log_every_n_steps=1,
    )  # fmt: skip
    engine.train(model, datamodule=data)
    return folder, model


def test_both_stages_in_one_fit(uninterrupted) -> None:
    folder, model = uninterrupted
    assert model.schedule == Schedule(4, 5)
    report = json.loads(next(folder.rglob("aand.json")).read_text())
    amplified, distilled = report["stages"]
    assert (amplified["stage"], amplified["step"]) == ("amplified", 4)
    assert (distilled["stage"], distilled["step"]) == ("distilled", STEPS)
    assert report["textures"] == "Perlin noise"
    assert 0 < amplified["gate_clean"] < 1
    assert amplified["gate_clean"] == distilled["gate_clean"]  # nothing moves the gate in stage 2
    assert distilled["held_out_distance_1"] == pytest.approx(float(model.model.level_means[0]))
    assert 0 < distilled["held_out_distance_3"] < 2
    logged = next(folder.rglob("metrics.csv")).read_text().splitlines()[0].split(",")
    assert {"amplified_gate_recall", "distilled_held_out_distance_3", "train_focal", "train_hkd"} <= set(logged)
    for name in ("synthesis_amplified.png", "synthesis_distilled.png", "maps.png"):
        assert next(folder.rglob(name)).stat().st_size > 10_000


def test_each_stage_moves_its_own_part(uninterrupted) -> None:
    folder, model = uninterrupted
    states = [torch.load(folder / "steps" / f"{n}.ckpt", weights_only=True)["state_dict"] for n in (1, 4, 5, STEPS)]
    moved = [
        {
            name.split(".")[1]
            for name, value in first.items()
            if not torch.equal(value, last[name]) and value.isfinite().all()
        }
        for first, last in ((states[0], states[1]), (states[2], states[3]))
    ]
    assert moved == [{"amplifiers"}, {"student", "level_means"}]
    for name, value in model.model.state_dict().items():
        torch.testing.assert_close(states[3][f"model.{name}"], value, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", ["steps/2.ckpt", "amplified.ckpt", "steps/7.ckpt"])
def test_resume_equals_the_uninterrupted_run(uninterrupted, cell_data, engine, name: str) -> None:
    folder, expected = uninterrupted
    checkpoint = next(folder.rglob(name))
    seed_everything(99)
    model = make_aand()
    engine(max_steps=STEPS, logger=False).fit(model, datamodule=cell_data(), ckpt_path=checkpoint)
    assert_same_weights(model, expected)


def test_a_checkpoint_needs_neither_network_nor_package(uninterrupted, offline_score) -> None:
    folder, expected = uninterrupted
    found = offline_score("Aand", next(folder.rglob("model.ckpt")))
    torch.manual_seed(0)
    with torch.no_grad():
        score = float(expected.model.eval()(torch.rand(1, 3, 64, 64)).pred_score)
    assert found == pytest.approx(score, abs=1e-5)


def test_reverse_distillation_alone(cell_data, engine) -> None:
    model = make_aand(amplify=False, hard_cells=0)
    engine(max_steps=3, logger=False).fit(model, datamodule=cell_data())
    assert model.schedule == Schedule(0, 3)
    assert list(model.record.stages) == ["distilled"]
    assert not list(model.model.amplifiers)


def test_without_limits_the_run_has_the_models_epochs(cell_data, engine) -> None:
    model = make_aand(amplify_epochs=1, distill_epochs=2)
    engine(logger=False).fit(model, datamodule=cell_data(train_batch_size=2))
    assert model.schedule == Schedule(2, 4)
    assert model.trainer.global_step == 6
    assert model.post_processor.image_threshold.isfinite()


def test_the_learning_rate_of_each_stage() -> None:
    rates = [Schedule(10, 20).rate(step) for step in (0, 7, 8, 9, 10, 25, 26, 28, 29)]
    assert rates == [1, 1, 0.2, 0.04, 1, 1, 0.2, 0.04, 0.04]


@pytest.mark.parametrize(("augmentations", "cached"), [(None, True), (RandomHorizontalFlip(), False)])
def test_amplified_levels_of_unaugmented_images_are_computed_once(cell_data, engine, augmentations, cached) -> None:
    model, calls = make_aand(amplify=False), []
    features = model.model.features
    model.model.features = lambda image: calls.append(model.model.training) or features(image)
    data = cell_data(train_augmentations=augmentations)
    engine(max_steps=12, logger=False).fit(model, datamodule=data)
    assert sum(calls) == (4 if cached else 12)  # four kept images


def test_grey_and_rectangular_images(tmp_path, engine) -> None:
    for folder, number in {"train": 3, "good": 1, "bad": 1}.items():
        (tmp_path / folder).mkdir()
        for index in range(number):
            Image.effect_noise((90, 70), 40).save(tmp_path / folder / f"{index}.png")
    data = Folder(
        name="grey", root=tmp_path, normal_dir="train", normal_test_dir="good", abnormal_dir="bad",
        train_batch_size=2, num_workers=0, val_split_mode="same_as_test", seed=0,
    )  # fmt: skip
    model = make_aand(pre_processor=Aand.configure_pre_processor((70, 90)))
    engine(max_steps=2, logger=False).fit(model, datamodule=data)
    assert model.post_processor.image_threshold.isfinite()


@pytest.mark.usefixtures("time_left")
@pytest.mark.parametrize("time_left", [20.0], indirect=True)
def test_a_fit_lays_out_the_steps_that_its_time_allows(cell_data, engine) -> None:
    schedules: list[Schedule] = []
    keep = LambdaCallback(on_train_batch_end=lambda _, model, *__: schedules.append(model.schedule))
    model = make_aand(amplify_epochs=1000, distill_epochs=1000)
    engine(max_time="00:00:01:00", logger=False, callbacks=[keep]).fit(model, datamodule=cell_data())
    first, second, *later = dict.fromkeys(schedules)
    assert first == Schedule(4000, 4000)
    assert 20 < second.first < 200
    assert {schedule.first for schedule in later} == {second.first}
    assert model.trainer.global_step == later[-1].total == sum(model.record.steps)
    assert list(model.record.stages) == ["amplified", "distilled"]


def test_too_little_time__error(cell_data, engine) -> None:
    with pytest.raises(ValueError, match=r"max_time leaves \d s; on this machine these images need"):
        engine(max_time={"seconds": 2}, logger=False).fit(make_aand(), datamodule=cell_data())


def test_early_stopping_ends_a_stage_and_the_model_is_finished_all_the_same(cell_data, engine) -> None:
    model = make_aand(lr=1e-8)
    stop = EarlyStopping("held_out_loss", patience=0, min_delta=100)
    engine(max_epochs=8, logger=False, callbacks=[stop]).fit(model, datamodule=cell_data())
    assert list(model.record.stages) == ["amplified", "distilled"]
    assert model.trainer.global_step == model.schedule.total < 32


@pytest.mark.parametrize(
    ("share", "said"), [(0.004, "is 0.4 % of the images only"), (0.3, ""), (1.0, "no foreground was found")]
)
def test_a_foreground_of_nothing_or_everything_is_said(cell_data, engine, caplog, monkeypatch, share, said) -> None:
    model = make_aand()
    monkeypatch.setattr(model.model.foreground, "find_", lambda images: share)
    engine(max_steps=2, logger=False).fit(model, datamodule=cell_data())
    assert said in caplog.text
    assert ("foreground" in caplog.text) is bool(said)


def test_a_finished_run_without_limits__error(cell_data, engine, tmp_path) -> None:
    first = make_aand(amplify=False, distill_epochs=1)
    engine(logger=False).fit(first, datamodule=cell_data())
    path = next(tmp_path.rglob("model.ckpt"))
    with pytest.raises(ValueError, match="the run is finished after 4 steps"):
        engine(logger=False).fit(make_aand(amplify=False, distill_epochs=1), datamodule=cell_data(), ckpt_path=path)
    longer = make_aand(amplify=False)
    engine(max_steps=7, logger=False).fit(longer, datamodule=cell_data(), ckpt_path=path)
    assert (longer.schedule, longer.trainer.global_step) == (Schedule(0, 7), 7)


@pytest.mark.usefixtures("time_left")
@pytest.mark.parametrize("time_left", [1e6], indirect=True)
def test_enough_time_leaves_the_run_as_long_as_its_limits(cell_data, engine) -> None:
    model = make_aand()
    engine(max_steps=60, max_time="00:00:01:00", logger=False).fit(model, datamodule=cell_data())
    assert (model.trainer.global_step, model.schedule) == (60, Schedule.scaled(100, 120, 60))


def test_a_finished_run_with_a_time_that_is_resumed_without__error(cell_data, engine, tmp_path) -> None:
    engine(max_time={"seconds": 20}, max_steps=30, logger=False).fit(make_aand(), datamodule=cell_data())
    path = next(tmp_path.rglob("model.ckpt"))
    assert torch.load(path, weights_only=True)["Aand"]["steps"]
    with pytest.raises(ValueError, match="the run is finished after 30 steps"):
        engine(logger=False).fit(make_aand(), datamodule=cell_data(), ckpt_path=path)


def test_a_stage_checkpoint_resumes_without_the_patience_of_its_stage(cell_data, engine, tmp_path) -> None:
    def callbacks() -> list[EarlyStopping]:
        return [EarlyStopping("held_out_loss", patience=2)]

    engine(max_steps=40, logger=False, callbacks=callbacks()).fit(make_aand(), datamodule=cell_data())
    saved = torch.load(next(tmp_path.rglob("amplified.ckpt")), weights_only=True)
    (stopping,) = (state for name, state in saved["callbacks"].items() if name.startswith("EarlyStopping"))
    assert stopping["wait_count"] == 0
    assert stopping["best_score"] == torch.inf


def test_thresholds_are_set_whatever_the_rhythm_of_validation(cell_data, engine) -> None:
    model = make_aand()
    engine(max_steps=6, check_val_every_n_epoch=5, logger=False).fit(model, datamodule=cell_data())
    assert model.post_processor.image_threshold.isfinite()


def test_no_validation__error(cell_data, engine) -> None:
    with pytest.raises(ValueError, match="limit_val_batches is 0, and the thresholds come from"):
        engine(max_steps=2, limit_val_batches=0, logger=False).fit(make_aand(), datamodule=cell_data())


def test_a_blur_wider_than_the_image__error(cell_data, engine) -> None:
    with pytest.raises(ValueError, match=r"blur is 20, too wide for images of \(64, 64\): take at most 15"):
        engine(max_steps=2, logger=False).fit(make_aand(blur=20), datamodule=cell_data())


@pytest.mark.parametrize(("name", "amplify"), [("train_kd", True), ("train_focal", False)])
def test_monitoring_what_a_stage_does_not_log__error(cell_data, engine, name: str, amplify: bool) -> None:
    with pytest.raises(ValueError, match=f"monitors '{name}', which does not exist during a fit"):
        engine(max_steps=2, logger=False, callbacks=[EarlyStopping(name)]).fit(
            make_aand(amplify=amplify), datamodule=cell_data()
        )


def test_one_batch(cell_data, engine) -> None:
    model = make_aand()
    engine(fast_dev_run=True, logger=False).fit(model, datamodule=cell_data())
    assert list(model.record.stages) == ["amplified", "distilled"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0}, "lr is 0; a positive number up to 1 is needed"),
        ({"hard_cells": -1}, "hard_cells is -1; a whole number from 0 is needed"),
        ({"temperature": 0}, "temperature is 0; a positive number is needed"),
        ({"texture_dir": "photos"}, "which serve the amplifiers only: set amplify"),
        ({"foreground": "disc"}, "foreground is 'disc'; otsu or none is needed"),
        ({"distill_epochs": 0}, "distill_epochs is 0; a whole number from 1 is needed"),
    ],
)
def test_settings__error(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Aand(**options)


def test_image_size__error(cell_data, engine) -> None:
    model = make_aand(pre_processor=Aand.configure_pre_processor((48, 64)))
    with pytest.raises(ValueError, match=r"the image size is \(48, 64\); sides of 64 to 1024 are needed"):
        engine(max_steps=2, logger=False).fit(model, datamodule=cell_data())


def test_texture_folder__error(cell_data, engine, tmp_path) -> None:
    with pytest.raises(ValueError, match=r"texture_dir .* has 0 images"):
        engine(max_steps=2, logger=False).fit(make_aand(texture_dir=tmp_path), datamodule=cell_data())


def test_checkpoint_of_another_model__error(finished_run) -> None:
    with pytest.raises(ValueError, match="this is not a checkpoint of Aand"):
        Aand.load_from_checkpoint(next(finished_run.rglob("model.ckpt")))


def test_non_finite_loss_stops_with_good_weights(cell_data, engine) -> None:
    model = make_aand()
    poison = LambdaCallback(
        on_train_batch_start=lambda trainer, module, *_: (
            module.model.amplifiers[0].normal_items.data.fill_(torch.nan) if trainer.global_step == 1 else None
        )
    )
    with pytest.raises(
        FloatingPointError, match=r"loss of step 1 is not finite: focal=nan.*Lower lr or amplification_weight"
    ):
        engine(max_steps=4, logger=False, callbacks=[poison]).fit(model, datamodule=cell_data())


def test_stages_are_counted_as_in_the_paper() -> None:
    assert [stage.number for stage in Stage] == [1, 2]
