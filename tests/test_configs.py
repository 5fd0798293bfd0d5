from itertools import cycle
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch
import yaml
from anomalib.engine import Engine
from anomalib.models import Aand, Agpnet, Raad

from anomalib_raad import RaadModel
from anomalib_raad.cli import main
from anomalib_raad.teacher.backbones import OFFLINE_BACKBONE
from anomalib_raad.teacher.weights import save_teacher

CONFIGS = sorted(Path(__file__).parents[1].glob("configs/raad*.yaml"))
COMPARISONS = sorted(Path(__file__).parents[1].glob("configs/compare*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_anomalib_reads_the_configuration(path: Path, tmp_path) -> None:
    engine, model, datamodule = Engine.from_config(str(path), default_root_dir=str(tmp_path))
    assert type(model) is Raad
    assert datamodule.train_batch_size == 1
    assert engine._cache.args["max_steps"] > 0
    total = engine._cache.args["max_steps"]
    assert model.schedule.scaled(model.hparams["train_steps"], model.hparams["finetune_steps"], total).total == total


@pytest.mark.usefixtures("coarse_grids")
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_configuration_runs(path: Path, cells, cell_data, tmp_path) -> None:
    """Two steps with narrow networks on a few small cells, with a teacher that needs no download, no closed form."""
    options = yaml.safe_load(path.read_text())["model"].get("init_args", {})
    save_teacher(RaadModel(options.get("model_size", "small")).teacher, tmp_path / "teacher.safetensors")
    overrides = {
        "model.channels": 8,
        "model.teacher": tmp_path / "teacher.safetensors",
        "model.reconstruction_iterations": 1,
        "model.closed_form": False,
        "model.visualizer": False,
        "trainer.accelerator": "cpu",
        "trainer.fast_dev_run": 2,
    }
    if options.get("penalty_dir"):
        overrides["model.penalty_dir"] = cells / "bad"
    engine, model, _ = Engine.from_config(str(path), default_root_dir=str(tmp_path), **overrides)
    model.pre_processor = Raad.configure_pre_processor((64, 64))
    engine.fit(model, datamodule=cell_data())
    assert model.model.quantized
    assert engine.trainer.global_step == 2


def test_the_papers_values_are_the_same_everywhere() -> None:
    configs = Path(__file__).parents[1] / "configs"
    alone = yaml.safe_load((configs / "raad_paper.yaml").read_text())["model"]["init_args"]
    compared = yaml.safe_load((configs / "compare_paper.yaml").read_text())["models"]["Raad"]["init_args"]
    assert compared == alone
    protocol = yaml.safe_load((configs / "raad_efficientad.yaml").read_text())["model"]["init_args"]
    # What the two protocols differ in; the paper of RAAD says it otherwise, or not at all.
    own = {"lr", "lr_decay", "penalty_dir", "normalize_maps", "activation_bits"}
    assert {k: v for k, v in protocol.items() if k not in own} == {k: v for k, v in alone.items() if k not in own}


def test_there_are_configurations() -> None:
    expected = {"raad", "raad_cpu", "raad_demo", "raad_efficientad", "raad_medium", "raad_paper"}
    assert {path.stem for path in CONFIGS} == expected


@pytest.mark.parametrize("path", COMPARISONS, ids=lambda path: path.stem)
def test_every_model_and_datamodule_of_a_comparison_can_be_built(path: Path, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("anomalib.models.image.patchcore.torch_model.TimmFeatureExtractor", MagicMock())  # a download
    config = yaml.safe_load(path.read_text())
    kinds_of_data = {options["class_path"]: options for options in config["data"].values()}
    for model, data in zip(config["models"].values(), cycle(kinds_of_data.values()), strict=False):
        parts = {"model": model, "data": data}
        run = {
            name: {"class_path": part["class_path"], "init_args": part.get("init_args", {})}
            for name, part in parts.items()
        }
        run["trainer"] = config["trainer"] | model.get("trainer", {})
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(run))
        engine, built, datamodule = Engine.from_config(tmp_path / "config.yaml", default_root_dir=str(tmp_path))
        assert type(built).__name__ == model["class_path"].rpartition(".")[2]
        assert engine._cache.args["max_steps"] == run["trainer"]["max_steps"]
        assert datamodule.val_split_mode == "from_train"
        assert datamodule.train_batch_size == 1


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("compare_quick", [], []),  # the README's, on a machine where nothing has been placed
        ("compare_local", [], [f"data of {name}" for name in ("cookies", "ksdd", "bottle", "casting")]),
        ("compare_paper", ["--download", "true"], []),
    ],
)
def test_the_comparison_says_what_it_needs(tmp_path, monkeypatch, capsys, name: str, options, expected) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    path = CONFIGS[0].with_name(f"{name}.yaml")
    monkeypatch.setattr("sys.argv", ["anomalib-raad", "compare", "--config", str(path), "--check", "true", *options])
    with pytest.raises(SystemExit):
        main()
    said = [line.split(":")[1].strip() for line in capsys.readouterr().err.splitlines() if "missing" in line]
    assert [what for what in said if not what.startswith(("data of mvtec", "data of loco", "data of visa"))] == expected


@pytest.mark.parametrize("path", sorted(CONFIGS[0].parent.glob("aand*.yaml")), ids=lambda path: path.stem)
def test_the_configuration_of_aand_runs(path: Path, cell_data, tmp_path) -> None:
    """Two steps on a backbone that needs no download."""
    overrides = {
        "model.backbone": OFFLINE_BACKBONE,
        "model.visualizer": False,
        "trainer.accelerator": "cpu",
        "trainer.fast_dev_run": 2,
    }
    engine, model, datamodule = Engine.from_config(str(path), default_root_dir=str(tmp_path), **overrides)
    assert datamodule.train_batch_size == 16
    model.pre_processor = Aand.configure_pre_processor((64, 64))
    engine.fit(model, datamodule=cell_data())
    assert list(model.record.stages) == (["amplified"] if path.stem == "aand" else []) + ["distilled"]


@pytest.mark.parametrize("path", sorted(CONFIGS[0].parent.glob("agpnet*.yaml")), ids=lambda path: path.stem)
def test_the_configuration_of_agpnet_runs(path: Path, cell_data, tmp_path) -> None:
    """Two steps, the transformer's weights being random."""
    overrides = {"model.visualizer": False, "trainer.accelerator": "cpu", "trainer.fast_dev_run": 2}
    engine, model, datamodule = Engine.from_config(str(path), default_root_dir=str(tmp_path), **overrides)
    paper = path.stem == "agpnet"
    assert datamodule.train_batch_size == (32 if paper else 4)
    assert model.input_size == ((224, 224) if paper else (256, 256))
    assert list(model.model.masks(torch.rand(1, 3, *model.input_size))) == (
        ["attention", "learned", "mask"] if paper else []
    )
    model.model.backbone_loaded.fill_(value=True)
    model.pre_processor = Agpnet.configure_pre_processor((64, 64))
    engine.fit(model, datamodule=cell_data())
    assert list(model.record.stages) == ["reconstructed"]
