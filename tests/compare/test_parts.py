from pathlib import Path

import pytest

from anomalib_raad.cli import main
from anomalib_raad.compare import parts
from anomalib_raad.compare.parts import compare_parts

DATA = ["--data", "Folder", "--data.name", "cells", "--data.root", "parts", "--data.normal_dir", "train"]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch) -> dict:
    """What :func:`compare` is called with."""
    seen: dict = {}

    def compare(models: dict, data: dict, **options) -> int:
        seen.update(options, models=models, data=data)
        return 0

    monkeypatch.setattr(parts, "compare", compare)
    return seen


def test_four_models_get_ten_minutes_each_and_thresholds_without_test_images(call) -> None:
    assert compare_parts(DATA) == 0
    assert list(call["models"]) == ["Raad", "Aand", "Agpnet", "EfficientAd", "PatchCore"]
    assert call["trainer"]["max_time"] == "00:00:10:00"
    assert call["data"]["cells"]["class_path"] == "anomalib.data.Folder"
    arguments = call["data"]["cells"]["init_args"]
    assert arguments["normal_dir"] == "train"
    assert (arguments["val_split_mode"], arguments["train_batch_size"]) == ("from_train", 1)


def test_what_the_user_says_counts(call) -> None:
    compare_parts(
        [*DATA, "--data.train_batch_size", "4", "--models", "[PatchCore]", "--steps", "50", "--seeds", "[3,4]"]
    )
    assert call["data"]["cells"]["init_args"]["train_batch_size"] == 4
    assert list(call["models"]) == ["PatchCore"]
    assert call["trainer"]["max_steps"] == 50
    assert "max_time" not in call["trainer"]
    assert call["seeds"] == [3, 4]


@pytest.mark.usefixtures("call")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "data"),
        (["--data", "Fodler"], "Fodler"),
        (
            [*DATA, "--models", "[Rad]"],
            "unknown models ['Rad']; there are ['Raad', 'Aand', 'Agpnet', 'EfficientAd', 'PatchCore']",
        ),
        ([*DATA, "--max_time", "ten minutes"], "max_time"),
    ],
)
def test_bad_arguments__error(arguments, message: str, capsys) -> None:
    with pytest.raises(SystemExit) as error:
        compare_parts(arguments)
    assert message in f"{error.value}{capsys.readouterr().err}"


def test_a_comparison_of_a_folder_ends_with_what_to_take(cells: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    results = tmp_path / "results"
    folder = ["--data.root", str(cells), "--data.normal_test_dir", "good", "--data.abnormal_dir", "bad"]
    command = ["anomalib-raad", "compare", *DATA, *folder, "--models", "[PatchCore]", "--results", str(results)]
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 0
    assert "## Which to take" in capsys.readouterr().out
    assert "openvino_ms" in (results / "comparison.csv").read_text()
