import json
from copy import deepcopy
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from anomalib.data import Folder
from anomalib.engine import Engine
from anomalib.models import Raad
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import Callback, EarlyStopping, LambdaCallback, ModelCheckpoint
from PIL import Image
from torch import nn
from torchvision.transforms.v2 import Compose, Normalize, RandomHorizontalFlip, Resize

from anomalib_raad import RaadModel
from anomalib_raad.fit.images import NormalImages
from anomalib_raad.fit.time_budget import TimeBudget
from anomalib_raad.quantization.layers import quantizable_layers
from anomalib_raad.raad.plan import Pace, Pacer
from anomalib_raad.raad.schedule import Schedule, Stage
from anomalib_raad.raad.student_head import equalize_head_input_
from anomalib_raad.teacher.weights import load_teacher_

STEPS = 9  # 5 of stage 1, 4 of stage 3; an epoch over 4 kept images ends within each stage
OPTIONS = {
    "bits": {"conv2": 4},
    "reconstruction_iterations": 2,
    "closed_form": True,
    "finetune_lr": 1e-6,
}


class SaveEvery(ModelCheckpoint):
    """Keeps all its checkpoints, beside anomalib's own."""

    def __init__(self, folder: Path, **options) -> None:
        super().__init__(folder, "{step}", save_top_k=-1, auto_insert_metric_name=False, **options)


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}


@pytest.fixture(scope="module")
def uninterrupted(cells, tmp_path_factory):
    """Folder with a checkpoint after every step of a finished run, and its final weights."""
    folder = tmp_path_factory.mktemp("run")
    seed_everything(7)
    data = Folder(
        name="cells", root=cells, normal_dir="train", normal_test_dir="good", abnormal_dir="bad",
        train_batch_size=1, eval_batch_size=2, num_workers=0, val_split_mode="same_as_test", seed=0,
    )  # fmt: skip
    model = Raad(pre_processor=Raad.configure_pre_processor((64, 64)), visualizer=False, **OPTIONS)
    engine = Engine(
        max_steps=STEPS,
        default_root_dir=folder,
        accelerator="cpu",
        callbacks=[
            SaveEvery(folder / "steps", every_n_train_steps=1),
            SaveEvery(folder / "epochs", every_n_epochs=1),
        ],
        enable_progress_bar=False,
        logger=False,
    )
    engine.fit(model, datamodule=data)
    return folder, model


def test_all_stages_in_one_fit(uninterrupted) -> None:
    folder, model = uninterrupted
    report = json.loads(next(folder.rglob("quantization.json")).read_text())
    assert [(stage["stage"], stage["step"]) for stage in report["stages"]] == [
        ("trained", 5),
        ("quantized", 5),
        ("fine_tuned", STEPS),
    ]
    sizes = [stage["bytes"] for stage in report["stages"]]
    assert sizes[0] > 3.9 * sizes[1]
    assert sizes[1] == sizes[2]
    bits = {layer["layer"]: layer["bits"] for layer in report["layers"]}
    assert len(bits) == 22
    assert bits["teacher.conv1"] == bits["student.conv4"] == bits["autoencoder.decoder.deconv8"] == 8
    assert bits["teacher.conv2"] == bits["student.conv2"] == 4
    assert bits["teacher.conv3"] == bits["student.conv3"]
    assert all(0 < layer["score"] < 1 for layer in report["layers"] if not layer["layer"].startswith("autoencoder"))
    assert 2 < report["average_bits"] < 8
    blocks = {tuple(block["layers"]): block for block in report["reconstruction"]}
    assert list(blocks) == [("teacher.conv2", "teacher.conv3"), ("student.conv2", "student.conv3")]
    assert all(0 < block["learned"] <= block["nearest"] for block in blocks.values())
    assert model.model.quantized


def test_weights_lie_on_their_grids(uninterrupted) -> None:
    for layer in quantizable_layers(uninterrupted[1].model).values():
        quantized = layer.quantized_weight().detach() / layer.weight_quantizer.scale
        torch.testing.assert_close(quantized, quantized.round(), rtol=0, atol=1e-4)
        assert quantized.round().abs().max() <= 2 ** (layer.bits - 1)


def test_fine_tuning_leaves_the_grids_but_the_solved_layers(uninterrupted) -> None:
    folder, model = uninterrupted
    before = torch.load(next(folder.rglob("quantized.ckpt")), weights_only=True)["state_dict"]
    after = weights(model)
    grids = {name for name in after if "_quantizer." in name}
    moved = {name for name in grids if not torch.equal(after[name], before[name])}
    head = {f"model.student.conv4.{part}.scale" for part in ("weight_quantizer", "input_quantizer")}
    assert moved == head | {"model.student.conv3.weight_quantizer.scale"}  # equalized with what enters the head


def test_stage_3_goes_on_from_the_trained_last_layer_and_solves_it_in_the_end(uninterrupted) -> None:
    folder, _ = uninterrupted
    weight, bias = "model.student.conv4.weight", "model.student.conv4.bias"

    def state(path: Path) -> dict[str, torch.Tensor]:
        return torch.load(path, weights_only=True)["state_dict"]

    trained, first, last = (state(folder / "steps" / f"{step}.ckpt") for step in (5, 6, STEPS))
    solved = state(next(folder.rglob("trained.ckpt")))
    for name in (weight, bias):
        torch.testing.assert_close(first[name], trained[name], rtol=0, atol=2 * OPTIONS["finetune_lr"])
    for solution in (solved, last):
        assert solution[weight].abs().mean() > 2 * trained[weight].abs().mean()


def test_the_finished_student_is_the_solution_for_its_features(uninterrupted, cell_data) -> None:
    _, model = uninterrupted
    data = cell_data()
    data.setup()
    images = NormalImages(data, model.hparams["held_out"], int(model.run_seed))
    seen = [model.pre_processor.transform(image) for image in images.plain(images.kept)]
    expected = deepcopy(model.model).eval()
    with torch.no_grad():
        expected.student.head.set_weight_(torch.zeros_like(expected.student.conv4.weight))
        expected.solve_student_(seen, map(expected.teacher, seen), int(model.run_seed))
    torch.testing.assert_close(model.model.student.conv4.weight, expected.student.conv4.weight)


def test_stage_3_starts_from_channels_as_they_were_before_equalization(
    cell_data, small_raad, engine, monkeypatch
) -> None:
    students: dict[str, nn.Module] = {}

    def equalize(student: nn.Module, images: list[torch.Tensor]) -> torch.Tensor:
        students.setdefault("quantized", deepcopy(student))
        scale = equalize_head_input_(student, images)
        assert scale.std() > 0.1
        return scale

    def keep(trainer, model: Raad, *_arguments) -> None:
        if model.schedule.stage(trainer.global_step) is Stage.FINE_TUNED:
            students.setdefault("starts", deepcopy(model.model.student))

    monkeypatch.setattr("anomalib_raad.raad.student_head.equalize_head_input_", equalize)
    model = small_raad(bits=4, closed_form=True)
    callback = LambdaCallback(on_before_backward=keep)
    engine(max_steps=2, logger=False, callbacks=[callback]).fit(model, datamodule=cell_data())
    quantized, starts = students["quantized"], students["starts"]
    torch.testing.assert_close(starts.conv3.state_dict(), quantized.conv3.state_dict())
    assert torch.equal(starts.conv4.input_quantizer.scale, quantized.conv4.input_quantizer.scale)
    assert not torch.equal(model.model.student.conv4.input_quantizer.scale, quantized.conv4.input_quantizer.scale)


def test_the_last_checkpoint_holds_the_finished_model(uninterrupted, cell_data, engine) -> None:
    """Maps normalised, thresholds set, loaded into a fresh Raad() by the trainer's weights-only reader."""
    folder, model = uninterrupted
    path = folder / "steps" / f"{STEPS}.ckpt"
    loaded = Raad.load_from_checkpoint(path)
    expected = weights(model)
    for name, value in weights(loaded).items():
        if "post_processor" not in name:  # set by the validation that follows the last step
            torch.testing.assert_close(value, expected[name], rtol=0, atol=0, msg=name)
    assert loaded.record.seen == model.record.seen
    assert model.record.seen["channels"] == (1, 1)
    assert model.record.seen["width"] == (300, 300)
    fresh = Raad(pre_processor=Raad.configure_pre_processor((64, 64)), visualizer=False)
    metrics = engine(logger=False).test(fresh, datamodule=cell_data(), ckpt_path=path)
    assert 0 <= metrics[0]["image_AUROC"] <= 1
    assert fresh.model.quantized


@pytest.mark.parametrize("name", ["steps/2", "epochs/4", "steps/5", "steps/7"])
def test_resume_equals_the_uninterrupted_run(uninterrupted, cell_data, small_raad, engine, name: str) -> None:
    """In the middle of an epoch (2, 7), at the end of one (4), and just before quantization (5)."""
    folder, model = uninterrupted
    seed_everything(1000)  # another process has other random numbers
    resumed = small_raad(**OPTIONS)
    engine(max_steps=STEPS, logger=False).fit(resumed, datamodule=cell_data(), ckpt_path=folder / f"{name}.ckpt")
    assert_equal_weights(resumed, model)


@pytest.mark.parametrize("name", ["trained", "quantized"])
def test_resume_from_the_stage_checkpoints(cell_data, small_raad, engine, uninterrupted, name: str) -> None:
    folder, model = uninterrupted
    resumed = small_raad(**OPTIONS)
    path = next(folder.rglob(f"{name}.ckpt"))
    engine(max_steps=STEPS, logger=False).fit(resumed, datamodule=cell_data(), ckpt_path=path)
    assert_equal_weights(resumed, model)
    assert list(resumed.record.stages) == ["trained", "quantized", "fine_tuned"]


@pytest.mark.parametrize(("name", "train_steps"), [("trained", 9), ("model", 5)])
def test_training_a_run_on(cell_data, small_raad, engine, uninterrupted, name: str, train_steps: int) -> None:
    """With more steps than it was begun with, from the layer as it was trained; a quantized run only fine-tunes."""
    folder, model = uninterrupted
    sizes: list[float] = []
    callback = LambdaCallback(on_train_batch_end=lambda _, model, *__: sizes.append(size_of_last_layer(model)))
    longer = small_raad(**OPTIONS)
    path = next(folder.rglob(f"{name}.ckpt"))
    engine(max_steps=16, logger=False, callbacks=[callback]).fit(longer, datamodule=cell_data(), ckpt_path=path)
    assert longer.schedule.first == train_steps
    *trained, solved = sizes
    assert max(trained) < 0.5 * size_of_last_layer(model)
    assert solved == pytest.approx(size_of_last_layer(model), rel=0.5)
    assert longer.record.stages["fine_tuned"]["step"] == 16


def size_of_last_layer(model: Raad) -> float:
    return float(model.model.student.conv4.weight.detach().abs().mean())


def assert_equal_weights(actual: Raad, expected: Raad) -> None:
    expected_weights = weights(expected)
    for name, value in weights(actual).items():
        torch.testing.assert_close(value, expected_weights[name], rtol=0, atol=0, equal_nan=True, msg=name)


def test_teacher_is_never_trained(uninterrupted) -> None:
    folder, model = uninterrupted

    def teacher(name: str) -> dict[str, torch.Tensor]:
        return weights(Raad.load_from_checkpoint(next(folder.rglob(f"{name}.ckpt"))).model.teacher)

    bundled = RaadModel().teacher
    load_teacher_(bundled, "bundled", "small")
    for ours, theirs in ((teacher("trained"), weights(bundled)), (weights(model.model.teacher), teacher("quantized"))):
        own = [name for name in theirs if not name.startswith("conv4") or theirs[name].shape == ours[name].shape]
        assert len(own) >= 6
        assert all(torch.equal(ours[name], theirs[name]) for name in own)


def test_one_epoch_over_five_images_with_batch_size_two(cell_data, small_raad, engine) -> None:
    model = small_raad()
    engine(max_epochs=1, logger=False).fit(model, datamodule=cell_data(train_batch_size=2))
    assert list(model.record.stages) == ["trained", "quantized", "fine_tuned"]
    assert model.post_processor.image_threshold.isfinite()


def test_thresholds_are_set_when_the_last_step_ends_no_epoch(cell_data, small_raad, engine) -> None:
    model = small_raad()
    engine(max_steps=3, logger=False).fit(model, datamodule=cell_data())
    assert model.trainer.global_step == 3
    assert model.post_processor.image_threshold.isfinite()


def test_without_limits_the_run_has_the_models_length(cell_data, small_raad, engine) -> None:
    model = small_raad(train_steps=2, finetune_steps=1)
    engine(logger=False).fit(model, datamodule=cell_data())
    assert (model.schedule.first, model.schedule.second, model.trainer.global_step) == (2, 1, 3)


def test_learning_rate_of_each_stage_and_stage_in_the_logger(cell_data, small_raad, engine, tmp_path) -> None:
    from lightning.pytorch.callbacks import LearningRateMonitor
    from lightning.pytorch.loggers import CSVLogger

    logger = CSVLogger(tmp_path)
    model = small_raad(lr=1e-3, lr_decay=0.5, finetune_lr=1e-5)
    callbacks = [LearningRateMonitor("step")]
    engine(max_steps=4, logger=logger, log_every_n_steps=1, callbacks=callbacks).fit(model, datamodule=cell_data())
    rows = pd.read_csv(Path(logger.log_dir) / "metrics.csv")
    assert rows["stage"].dropna().tolist() == [1, 1, 3, 3]
    assert rows["lr-Adam"].dropna().tolist() == pytest.approx([1e-3, 1e-4, 1e-5, 1e-6])
    for stage in Stage:  # two of which have the same step
        assert rows[f"{stage.value}_held_out_map_st"].dropna().tolist() == [
            pytest.approx(model.record.stages[stage.value]["held_out_map_st"], rel=1e-5)
        ]


def test_penalty_and_plain_maps(cell_data, small_raad, engine, cells) -> None:
    model = small_raad(penalty_dir=cells, normalize_maps=False)
    engine(max_steps=2, logger=False).fit(model, datamodule=cell_data())
    assert model.trainer.callback_metrics["train_penalty"] > 0
    assert torch.equal(model.model.map_quantiles, torch.tensor([[0.0, 0.1], [0.0, 0.1]]))


def test_grey_rgba_and_rectangular_images(tmp_path, small_raad, engine) -> None:
    """Whatever anomalib's reader delivers trains and predicts, at an image size that is not square."""
    root = tmp_path / "images"
    root.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (90, 130, 4), dtype=np.uint8)
    Image.fromarray(pixels[..., 0]).save(root / "grey.png")
    Image.fromarray(pixels).save(root / "rgba.png")
    Image.fromarray(pixels[..., :3]).save(root / "rgb.png")
    Image.fromarray(pixels[..., 0]).convert("1").save(root / "one_bit.png")
    data = Folder(
        name="mixed", root=tmp_path, normal_dir="images", train_batch_size=2, eval_batch_size=1, num_workers=0,
        test_split_mode="none", val_split_mode="from_train", val_split_ratio=0.25, seed=0,
    )  # fmt: skip
    model = small_raad(pre_processor=Raad.configure_pre_processor((64, 96)))
    runner = engine(max_steps=2, logger=False)
    runner.fit(model, datamodule=data)
    predictions = runner.predict(model, data_path=root)
    assert len(predictions) == 4
    for batch in predictions:
        assert batch.anomaly_map.shape[-2:] == (64, 96)
        assert batch.pred_score.isfinite().all()


def test_the_datamodule_is_given_back(cell_data, small_raad, engine) -> None:
    data = cell_data()
    engine(max_steps=2, logger=False).fit(small_raad(), datamodule=data)
    assert len(data.train_dataloader()) == 5


@pytest.mark.parametrize(("augmentations", "passes"), [(None, 1), (RandomHorizontalFlip(), 2)])
def test_the_teacher_sees_an_unaugmented_image_once(cell_data, small_raad, engine, augmentations, passes) -> None:
    """For statistics, the autoencoder's first steps, the joint ones and the solution."""
    seen, model = [], small_raad(closed_form=True, train_steps=3, finetune_steps=1)
    model.model.teacher.register_forward_hook(lambda *arguments: seen.append(arguments))
    counts = []

    def solve_and_count(trainer, model, *_) -> None:
        model.solve_student()
        counts.append((trainer.global_step, len(seen)))

    callbacks = [LambdaCallback(on_train_batch_end=solve_and_count)]
    data = cell_data(train_augmentations=augmentations)
    engine(max_steps=4, logger=False, callbacks=callbacks).fit(model, datamodule=data)
    assert (3, 4 + 3 * passes) in counts


def test_the_maps_are_normalised_in_the_trainers_precision(cell_data, small_raad, engine, monkeypatch) -> None:
    precisions, maps = [], RaadModel.maps
    monkeypatch.setattr(
        RaadModel, "maps", lambda *args: precisions.append(torch.is_autocast_enabled("cpu")) or maps(*args)
    )
    engine(max_steps=2, logger=False, precision="bf16-mixed").fit(small_raad(), datamodule=cell_data())
    assert len(precisions) >= 3
    assert all(precisions)


class Watch(EarlyStopping):
    """Notes what it is told, and its own verdict."""

    def __init__(self, **options) -> None:
        super().__init__("held_out_loss", **options)
        self.told: list[tuple[int, float, bool]] = []

    def on_train_epoch_end(self, trainer, model) -> None:
        super().on_train_epoch_end(trainer, model)
        self.told.append((trainer.global_step, float(trainer.callback_metrics["held_out_loss"]), trainer.should_stop))


def test_early_stopping_ends_a_stage_and_the_model_is_finished_all_the_same(cell_data, small_raad, engine) -> None:
    model, watch = small_raad(bits=8), Watch(patience=1, min_delta=1e9)  # the second value never is an improvement
    engine(max_steps=1000, logger=False, callbacks=[watch]).fit(model, datamodule=cell_data())
    assert [(step, stop) for step, _, stop in watch.told] == [
        (4, False),
        (8, True),
        (12, False),
        (16, True),
        (17, True),
    ]
    assert all(np.isfinite(loss) for _, loss, _ in watch.told)
    assert [stage["step"] for stage in model.record.stages.values()] == [8, 8, 17]
    assert model.post_processor.image_threshold.isfinite()


def test_early_stopping_waits_for_min_steps(cell_data, small_raad, engine) -> None:
    model, watch = small_raad(bits=8), Watch(patience=1, min_delta=1e9)
    runner = engine(max_steps=1000, min_steps=11, logger=False, callbacks=[watch])
    runner.fit(model, datamodule=cell_data())
    assert model.record.step(Stage.TRAINED) == 11


def test_the_held_out_loss_is_the_same_for_the_same_weights(cell_data, small_raad, engine) -> None:
    model, watch = small_raad(lr=1e-12, weight_decay=0.0), Watch(patience=1000)
    engine(max_steps=20, logger=False, callbacks=[watch]).fit(model, datamodule=cell_data())
    first, second, *_ = [loss for _, loss, _ in watch.told]
    assert first > 0
    assert second == pytest.approx(first, rel=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.0}, "lr is 0.0; a positive number up to 1 is needed"),
        ({"lambdas": (1.0, -1.0, 1.0)}, r"lambdas\[1\] is -1.0; zero or a positive number is needed"),
        ({"finetune_steps": 0}, "finetune_steps is 0"),
        ({"calibration_images": 0}, "calibration_images is 0"),
        ({"channels": 0}, "channels is 0; a whole number from 1"),
        ({"channels": 385}, "channels is 385; a teacher has 384"),
        ({"held_out": 1.0}, "held_out is 1.0; a share between 0 and 1"),
        ({"lr_decay": 1.5}, "lr_decay is 1.5; a share from 0 to 1"),
        ({"bits": 5}, "bits is 5; RAAD quantizes to 2, 3, 4, 8 bits"),
        ({"bits": {"conv7": 4}}, r"unknown layers \['conv7'\]"),
        ({"average_bits": 3.0}, "average_bits is 3.0; with first_last_bits 8 at least 4"),
        ({"model_size": "large"}, "model_size is 'large'"),
    ],
)
def test_settings__error(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Raad(**options)


def test_normalize__error(cell_data, small_raad, engine) -> None:
    processor = Raad.configure_pre_processor()
    processor.transform = Compose([Resize((64, 64)), Normalize([0.5] * 3, [0.5] * 3)])
    with pytest.raises(ValueError, match="has a Normalize"):
        engine(max_steps=2, logger=False).fit(small_raad(pre_processor=processor), datamodule=cell_data())


def test_a_size_from_augmentations_alone__error(cell_data, small_raad, engine) -> None:
    data = cell_data(augmentations=Resize((64, 64)))
    with pytest.raises(ValueError, match="training augmentations resize"):
        engine(max_steps=2, logger=False).fit(small_raad(pre_processor=False), datamodule=data)


@pytest.mark.parametrize("size", [(32, 64), (64, 2048)])
def test_image_size__error(cell_data, small_raad, engine, size: tuple[int, int]) -> None:
    model = small_raad(pre_processor=Raad.configure_pre_processor(size))
    with pytest.raises(ValueError, match="sides of 64 to 1024 are needed"):
        engine(max_steps=2, logger=False).fit(model, datamodule=cell_data())


@pytest.mark.parametrize("number", [0, 1])
def test_too_few_images__error(cell_data, small_raad, engine, number: int) -> None:
    data = cell_data()
    setup = data.setup

    def shrink(stage=None) -> None:
        setup(stage)
        data.train_data = data.train_data.subsample(range(number))

    data.setup = shrink
    with pytest.raises(ValueError, match=rf"training set has {number} image\(s\)"):
        engine(max_steps=2, logger=False).fit(small_raad(), datamodule=data)


@pytest.mark.parametrize("split", [("none", 0.5), ("from_train", 0.1)])
def test_no_image_for_the_thresholds__error(cell_data, small_raad, engine, split: tuple[str, float]) -> None:
    """Of five images a tenth is none."""
    data = cell_data(val_split_mode=split[0], val_split_ratio=split[1])
    with pytest.raises(ValueError, match=r"validation set has no images.* above 0.20 takes at least one of the 5"):
        engine(max_steps=2, logger=False).fit(small_raad(), datamodule=data)


def test_a_model_that_gives_no_verdicts_needs_no_validation(cell_data, small_raad, engine) -> None:
    model = small_raad(post_processor=False)
    engine(max_steps=2, logger=False).fit(model, datamodule=cell_data(val_split_mode="from_train", val_split_ratio=0.1))
    assert model.model.quantized


def test_checkpoint_of_another_model__error(tmp_path) -> None:
    torch.save({"state_dict": {}, "pytorch-lightning_version": "2.6.0"}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="not a checkpoint of Raad"):
        Raad.load_from_checkpoint(tmp_path / "other.ckpt")


def test_loaders_without_datamodule__error(cell_data, small_raad, engine) -> None:
    data = cell_data()
    data.setup()
    with pytest.raises(ValueError, match="pass a datamodule to fit"):
        engine(max_steps=2, logger=False).fit(small_raad(), data.train_dataloader(), data.val_dataloader())


@pytest.mark.parametrize("teacher", ["wide_resnet", "no/such/file.pth"])
def test_unknown_teacher__error(cell_data, small_raad, engine, teacher: str) -> None:
    with pytest.raises(FileNotFoundError, match=f"unknown teacher '{teacher}': use 'bundled'"):
        engine(max_steps=2, logger=False).fit(small_raad(teacher=teacher), datamodule=cell_data())


def test_fit_again_begins_a_run_of_its_own(uninterrupted, cell_data, engine) -> None:
    """From the weights of student and autoencoder, with a fresh teacher, on whatever data, for any number of steps."""
    folder, _ = uninterrupted
    path = next(folder.rglob("model.ckpt"))
    old = Raad.load_from_checkpoint(path)
    model = Raad.load_from_checkpoint(path, visualizer=False)
    starts: dict[str, nn.Module] = {}
    keep = LambdaCallback(on_before_backward=lambda _, model, __: starts.setdefault("first", deepcopy(model.model)))
    seed_everything(11)
    engine(max_steps=5, logger=False, callbacks=[keep]).fit(model, datamodule=cell_data())  # 5: where it was quantized
    start = starts["first"]
    assert not start.quantized
    fresh = RaadModel().teacher
    load_teacher_(fresh, "bundled", "small")
    for name in ("conv1", "conv2", "conv3"):
        assert torch.equal(getattr(start.teacher, name).weight, getattr(fresh, name).weight), name
    old.model.student_head.restore_(old.model.student)
    torch.testing.assert_close(start.student.conv2.weight, old.model.student.conv2.quantized_weight())
    assert [(stage["stage"], stage["step"]) for stage in model.record.stages.values()] == [
        ("trained", 3),
        ("quantized", 3),
        ("fine_tuned", 5),
    ]
    assert int(model.run_seed) == 11
    assert model.model.quantized
    assert model.post_processor.image_threshold.isfinite()


@pytest.fixture(params=[3.0])
def time_left(request, monkeypatch) -> None:
    """Time that never passes, work beside the steps that takes none, and a clock that no other work slows down."""
    clock = count(step=0.1)
    monkeypatch.setattr(TimeBudget, "remaining", property(lambda _: request.param))
    monkeypatch.setattr("anomalib_raad.raad.lightning_model.measure_pace", lambda *_, **__: Pace(0, 0, 0))
    monkeypatch.setattr("anomalib_raad.raad.plan._FIXED", 0.0)
    monkeypatch.setattr("anomalib_raad.fit.time_budget.time", SimpleNamespace(monotonic=lambda: next(clock)))


@pytest.mark.usefixtures("time_left")
def test_a_fit_lays_out_the_steps_that_its_time_allows_and_resumes_them(
    cell_data, small_raad, engine, tmp_path
) -> None:
    schedules: list[Schedule] = []
    keep = LambdaCallback(on_train_batch_end=lambda _, model, *__: schedules.append(model.schedule))
    model = small_raad(bits=8)
    callbacks = [keep, SaveEvery(tmp_path / "steps", every_n_train_steps=1)]
    engine(max_time="00:00:01:00", logger=False, callbacks=callbacks).fit(model, datamodule=cell_data())
    first, second, *_ = dict.fromkeys(schedules)
    assert first.total == 130_000
    assert 9 <= second.first < 200
    assert list(model.record.stages) == ["trained", "quantized", "fine_tuned"]
    assert model.trainer.global_step == model.schedule.total == sum(model.record.steps)
    assert model.post_processor.image_threshold.isfinite()

    early = small_raad(bits=8)  # resumed before there was a plan for the steps
    engine(max_time="00:00:01:00", logger=False).fit(
        early, datamodule=cell_data(), ckpt_path=tmp_path / "steps" / "3.ckpt"
    )
    assert early.trainer.global_step == sum(early.record.steps)
    assert list(early.record.stages) == ["trained", "quantized", "fine_tuned"]

    resumed, path = small_raad(bits=8), tmp_path / "steps" / f"{model.schedule.total - 1}.ckpt"
    engine(max_time="00:00:01:00", logger=False).fit(resumed, datamodule=cell_data(), ckpt_path=path)
    assert resumed.schedule == model.schedule
    assert_equal_weights(resumed, model)

    longer, path = small_raad(bits=8), tmp_path / "steps" / f"{model.schedule.total}.ckpt"  # finished, and given more
    engine(max_time="00:00:01:00", logger=False).fit(longer, datamodule=cell_data(), ckpt_path=path)
    assert longer.trainer.global_step == longer.schedule.total > model.schedule.total
    assert longer.post_processor.image_threshold.isfinite()


@pytest.mark.usefixtures("time_left")
def test_the_pace_that_is_found_in_the_last_step_changes_nothing(
    cell_data, small_raad, engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lay_out(_pacer, _plan, _current, step: int, _quantized) -> Schedule:
        return Schedule(9, 8) if step <= 9 else Schedule(9, 20)

    monkeypatch.setattr(Pacer, "schedule", lay_out)
    model = small_raad(bits=8)
    engine(max_time="00:00:01:00", logger=False).fit(model, datamodule=cell_data())
    assert (model.trainer.global_step, model.record.steps) == (17, (9, 8))


def test_a_run_without_limits_keeps_its_length_when_it_is_resumed(uninterrupted, cell_data, small_raad, engine) -> None:
    folder, _ = uninterrupted
    resumed = small_raad(**OPTIONS, train_steps=5, finetune_steps=4)
    engine(logger=False).fit(resumed, datamodule=cell_data(), ckpt_path=folder / "steps" / "7.ckpt")
    assert (resumed.schedule.first, resumed.schedule.total) == (5, STEPS)


def test_a_finished_run_without_limits__error(uninterrupted, cell_data, small_raad, engine) -> None:
    folder, _ = uninterrupted
    resumed = small_raad(**OPTIONS, train_steps=5, finetune_steps=4)
    with pytest.raises(ValueError, match="the run is finished after 9 steps"):
        engine(logger=False).fit(resumed, datamodule=cell_data(), ckpt_path=folder / "steps" / f"{STEPS}.ckpt")


def test_an_engine_whose_limits_are_used_up__error(cell_data, small_raad, engine) -> None:
    model, runner = small_raad(bits=8), engine(max_steps=2, logger=False)
    runner.fit(model, datamodule=cell_data())
    with pytest.raises(ValueError, match="this engine has trained 2 steps already"):
        runner.fit(model, datamodule=cell_data())
    assert model.model.quantized


@pytest.mark.usefixtures("time_left")
@pytest.mark.parametrize("time_left", [1000.0], indirect=True)
def test_of_two_limits_the_shorter_one_counts(cell_data, small_raad, engine) -> None:
    model = small_raad(bits=8)
    engine(max_time="00:00:01:00", max_steps=12, logger=False).fit(model, datamodule=cell_data())
    assert model.trainer.global_step == 12


def test_too_little_time__error(cell_data, small_raad, engine) -> None:
    with pytest.raises(ValueError, match=r"max_time leaves .* need .* at least"):
        engine(max_time="00:00:00:01", logger=False).fit(small_raad(), datamodule=cell_data())


def test_one_batch_goes_through_all_stages(cell_data, small_raad, engine) -> None:
    model = small_raad()
    engine(fast_dev_run=True).fit(model, datamodule=cell_data())
    assert list(model.record.stages) == ["trained", "quantized", "fine_tuned"]


@pytest.mark.parametrize(
    "callback",
    [EarlyStopping("image_AUROC"), EarlyStopping("train_loss_epoch"), ModelCheckpoint(monitor="pixel_F1Score")],
)
def test_monitoring_what_training_does_not_log__error(cell_data, small_raad, engine, callback: Callback) -> None:
    with pytest.raises(ValueError, match=r"monitors '\w+', which does not exist during a fit"):
        engine(max_steps=4, logger=False, callbacks=[callback]).fit(small_raad(), datamodule=cell_data())


def test_a_stage_without_a_step__error(cell_data, small_raad, engine) -> None:
    with pytest.raises(ValueError, match="leave a stage without a step"):
        engine(max_steps=1, logger=False).fit(small_raad(), datamodule=cell_data())


def test_an_interrupted_fit_goes_on_in_the_same_engine(cell_data, small_raad, engine, tmp_path) -> None:
    class Interrupt(Callback):
        def on_train_batch_start(self, trainer, *_) -> None:
            if trainer.global_step == 2 and trainer.ckpt_path is None:
                raise KeyboardInterrupt

    callbacks = [SaveEvery(tmp_path / "steps", every_n_train_steps=1), Interrupt()]
    model, data, runner = small_raad(), cell_data(), engine(max_steps=6, logger=False, callbacks=callbacks)
    with pytest.raises(SystemExit):
        runner.fit(model, datamodule=data)
    assert len(data.train_dataloader()) == 5
    assert runner.trainer.limit_val_batches == 1.0
    with pytest.raises(ValueError, match="trained 2 steps already: give it the checkpoint to go on from"):
        runner.fit(model, datamodule=data)
    runner.fit(model, datamodule=data, ckpt_path=tmp_path / "steps" / "2.ckpt")
    assert model.record.stages["fine_tuned"]["step"] == 6
    assert model.post_processor.image_threshold.isfinite()


def test_bars_are_drawn_where_the_trainer_draws_one(cell_data, small_raad, engine, capsys) -> None:
    engine(max_steps=2, logger=False).fit(small_raad(closed_form=True), datamodule=cell_data())
    assert "it/s" not in capsys.readouterr().err
    engine(max_steps=2, logger=False, enable_progress_bar=True).fit(small_raad(), datamodule=cell_data())
    assert "Checking the images" in capsys.readouterr().err


def test_non_finite_loss_stops_with_good_weights(cell_data, small_raad, engine, tmp_path) -> None:
    class Poison(Callback):
        def on_train_batch_start(self, trainer, model, batch, batch_idx) -> None:
            if trainer.global_step == 2:
                batch.image[:] = torch.nan

    model = small_raad()
    callbacks = [SaveEvery(tmp_path / "steps", every_n_train_steps=1), Poison()]
    with pytest.raises(FloatingPointError, match=r"loss of step 2 is not finite"):
        engine(max_steps=9, logger=False, callbacks=callbacks).fit(model, datamodule=cell_data())
    saved = sorted((tmp_path / "steps").glob("*.ckpt"))
    assert saved
    for path in saved:
        assert all(
            value.isfinite().all()
            for name, value in weights(Raad.load_from_checkpoint(path)).items()
            if "post" not in name
        )
