from pathlib import Path

import pytest
from anomalib.engine import Engine
from anomalib.models import Raad

from anomalib_raad.cli import main

CONFIGS = sorted(Path(__file__).parents[1].glob("configs/raad*.yaml"))


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
