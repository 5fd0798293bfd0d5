import json
import shutil

import pytest
import yaml

from anomalib_raad.cli import USAGE, main


def run(monkeypatch, *arguments: object) -> None:
    monkeypatch.setattr("sys.argv", ["anomalib-raad", *map(str, arguments)])
    main()


def test_figures_draws_the_stages_and_looks_at_the_layers(finished_run, cells, tmp_path, monkeypatch, capsys) -> None:
    results = shutil.copytree(finished_run, tmp_path / "results")
    data = {
        "name": "cells", "root": str(cells), "normal_dir": "train", "normal_test_dir": "good", "abnormal_dir": "bad",
        "num_workers": 0, "val_split_mode": "same_as_test", "seed": 0,
    }  # fmt: skip
    config = {"model": {"class_path": "Raad"}, "data": {"class_path": "anomalib.data.Folder", "init_args": data}}
    (results / "config.yaml").write_text(yaml.safe_dump(config))
    pictures = [results / f"{name}.png" for name in ("stages", "attention", "bias", "layers")]
    for picture in pictures:
        picture.unlink()
    monkeypatch.chdir(tmp_path)
    run(monkeypatch, "figures", "--results", results)
    written = capsys.readouterr().out.splitlines()[-5:]
    assert written == [str(path) for path in (*pictures, results / "diagnostics.png")]
    assert all(path.stat().st_size > 10_000 for path in pictures)
    found = json.loads((results / "diagnostics.json").read_text())
    assert list(found["misalignment"]) == ["conv1", "conv2", "conv3", "conv4"]
    assert len(found["sqnr_db"]) == 22


@pytest.mark.parametrize(("command", "code"), [("--help", 0), ("nonsense", 2)])
def test_usage(monkeypatch, capsys, command: str, code: int) -> None:
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, command)
    assert stop.value.code == code
    assert capsys.readouterr().out == USAGE
