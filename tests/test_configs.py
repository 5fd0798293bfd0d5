from itertools import cycle
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import yaml
from anomalib.engine import Engine
from anomalib.models import Raad

from anomalib_raad.cli import main

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


def test_there_are_configurations() -> None:
    assert {"raad", "raad_demo", "raad_paper", "raad_efficientad"} <= {path.stem for path in CONFIGS}


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


def test_the_comparison_says_what_it_needs(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    path = CONFIGS[0].with_name("compare_quick.yaml")
    monkeypatch.setattr("sys.argv", ["anomalib-raad", "compare", "--config", str(path), "--check", "true"])
    with pytest.raises(SystemExit, match="1"):
        main()
    assert [line.split(":")[1].strip() for line in capsys.readouterr().err.splitlines() if "missing" in line] == [
        "teacher of EfficientAd",
        "photos for the penalty of EfficientAd",
    ]
