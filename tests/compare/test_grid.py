import base64
import io
import json
from pathlib import Path
from unittest.mock import Mock

import pytest
import yaml
from PIL import Image, ImageChops

from anomalib_raad.cli import main
from anomalib_raad.compare import grid
from anomalib_raad.compare.grid import compare

SMALL = {
    "class_path": "anomalib.pre_processing.PreProcessor",
    "init_args": {"transform": {"class_path": "torchvision.transforms.v2.Resize", "init_args": {"size": [64, 64]}}},
}
RAAD = {
    "class_path": "anomalib_raad.Raad",
    "init_args": {
        "bits": 8,
        "calibration_images": 2,
        "closed_form": False,
        "pre_processor": SMALL,
    },
}
PATCHCORE = {
    "class_path": "anomalib_raad.compare.baselines.OfflinePatchcore",
    "init_args": {"pre_processor": SMALL},
    # Ends within the epoch, before Lightning validates; and keeps its bank in 16 bits.
    "trainer": {"max_steps": 2, "max_epochs": 1, "precision": "bf16-mixed"},
}


@pytest.fixture
def folders(cells: Path) -> dict:
    arguments = {
        "name": "cells", "root": str(cells), "normal_dir": "train", "normal_test_dir": "good", "abnormal_dir": "bad",
        "train_batch_size": 1, "num_workers": 0, "val_split_mode": "from_train", "val_split_ratio": 0.4, "seed": 0,
    }  # fmt: skip
    return {"cells": {"class_path": "anomalib.data.Folder", "init_args": arguments}}


def test_cells_are_kept_and_a_failed_one_is_tried_again(folders, tmp_path) -> None:
    options = {"trainer": {"max_steps": 4, "accelerator": "cpu", "logger": False}, "results": tmp_path / "comparison"}
    broken = RAAD | {"trainer": {"max_steps": 1}}  # leaves a stage without a step
    assert compare({"Raad": broken, "PatchCore": PATCHCORE}, folders, **options) == 1
    failed = json.loads((tmp_path / "comparison" / "cells-Raad-0.json").read_text())
    assert "leave a stage without a step" in failed["error"]
    patchcore = tmp_path / "comparison" / "cells-PatchCore-0.json"
    kept = json.loads(patchcore.read_text())
    assert kept["bytes"] > 1_000_000
    assert kept["image_F1Score"] > 0  # there is a threshold
    patchcore.write_text(json.dumps(kept | {"seed": 7}))

    assert compare({"Raad": RAAD, "PatchCore": PATCHCORE}, folders, **options) == 0
    assert json.loads(patchcore.read_text())["seed"] == 7
    cell = json.loads((tmp_path / "comparison" / "cells-Raad-0.json").read_text())
    assert cell["steps"] == 4
    assert 0 <= cell["image_AUROC"] <= 1
    assert cell["image_AUPR"] >= 0.3
    assert 4.5e6 < cell["bytes"] < 5e6
    assert cell["average_bits"] == 8
    assert cell["latency_ms"] > 1
    assert cell["step_seconds"] < cell["fit_seconds"]

    scores = {image["label"]: [] for image in cell["images"]}
    for image in cell["images"]:
        scores[image["label"]].append(image["score"])
    assert {image["image"].split("/")[0] for image in cell["images"]} == {"good", "bad"}
    wins = sum((bad > good) + (bad == good) / 2 for bad in scores[1] for good in scores[0])
    assert cell["image_AUROC"] == pytest.approx(wins / 4)
    pictures = [read_picture(cell["heatmaps"][name]) for name in ("worst normal", "best normal")]
    assert [picture.size for picture in pictures] == [(192, 96)] * 2  # image and heatmap; there are no masks
    assert ImageChops.difference(*pictures).getbbox()
    assert "| cells | PatchCore | 1 | 4 |" in (tmp_path / "comparison" / "comparison.md").read_text()

    (tmp_path / "comparison" / "comparison.md").unlink()
    folders["cells"]["init_args"]["root"] = str(tmp_path / "nowhere")
    assert compare({"Raad": RAAD}, folders, **options) == 0  # nothing is left to run, so no data are needed
    assert "| cells | Raad | 1 | 4 |" in (tmp_path / "comparison" / "comparison.md").read_text()


def test_the_command_line_passes_options_on_as_they_are(folders, tmp_path, monkeypatch) -> None:
    given = []

    def attempt(*arguments) -> dict:
        given.append(arguments[:2])
        return {"error": "nothing was fitted"}

    monkeypatch.setattr(grid, "attempt", attempt)
    file = tmp_path / "compare.yaml"
    options = {"models": {"Raad": RAAD}, "data": folders, "results": str(tmp_path / "comparison")}
    file.write_text(yaml.safe_dump(options))
    monkeypatch.setattr("sys.argv", ["anomalib-raad", "compare", "--config", str(file)])
    with pytest.raises(SystemExit, match="1"):
        main()
    assert given == [(RAAD, folders["cells"])]


def read_picture(url: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))


def test_cells_run_on_a_ray_cluster(folders, tmp_path, monkeypatch) -> None:
    pytest.importorskip("ray")
    monkeypatch.setenv("RAY_worker_niceness", "0")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    cluster.add_node(num_cpus=1)
    results = tmp_path / "comparison"
    broken = PATCHCORE | {"init_args": {"coreset_sampling_ratio": "none"}}
    options = {"trainer": {"accelerator": "cpu", "logger": False}, "results": results}
    try:
        assert compare({"PatchCore": PATCHCORE, "Broken": broken}, folders, ray=cluster.address, **options) == 1
    finally:
        cluster.shutdown()
    assert json.loads((results / "cells-PatchCore-0.json").read_text())["test_images"] == 4
    text = (results / "comparison.md").read_text()
    assert "1 of 2 cells are finished, 1 failed." in text
    assert "cells, Broken, seed 0: ValueError: anomalib does not accept" in text


def test_loco_has_its_own_metrics(cells, tmp_path) -> None:
    root = tmp_path / "LOCO" / "cells"
    sources = {"train/good": "train", "validation/good": "train", "test/good": "good"}
    sources |= {f"test/{kind}_anomalies": "bad" for kind in ("structural", "logical")}
    for target, source in sources.items():
        (root / target).mkdir(parents=True)
        for path in sorted(cells.glob(f"{source}/*"))[:3]:
            picture = Image.open(path).convert("RGB").resize((64, 64))
            picture.save(root / target / path.name)
            if "anomalies" in target:
                folder = root / target.replace("test", "ground_truth") / path.stem
                folder.mkdir(parents=True)
                mask = Image.new("L", (64, 64))
                mask.paste(255, (16, 16, 32, 32))
                mask.save(folder / "000.png")
    defect = {"defect_name": "", "pixel_value": 255, "saturation_threshold": 100, "relative_saturation": False}
    (root / "defects_config.json").write_text(json.dumps([defect]))
    arguments = {"root": str(root.parent), "category": "cells", "train_batch_size": 1, "num_workers": 0}
    data = {"loco-cells": {"class_path": "anomalib.data.MVTecLOCO", "init_args": arguments}}
    options = {"trainer": {"accelerator": "cpu", "logger": False}, "results": tmp_path / "comparison"}
    assert compare({"PatchCore": PATCHCORE}, data, **options) == 0
    cell = json.loads((tmp_path / "comparison" / "loco-cells-PatchCore-0.json").read_text())
    for name in ("AUROC", "AUsPRO"):
        kinds = [cell[f"{kind}_{name}"] for kind in ("structural", "logical")]
        assert kinds[0] == kinds[1] == cell[f"mean_{name}"]  # the same images are anomalous in both ways
    assert cell["mean_AUROC"] == pytest.approx(cell["image_AUROC"])
    assert 0 <= cell["mean_AUsPRO"] <= 1


def test_an_interrupted_comparison_has_a_report_and_goes_on(folders, tmp_path, monkeypatch) -> None:
    cell = {"test_images": 2, "steps": 0, "image_AUROC": 0.5, "bytes": 0, "heatmaps": {}, "fit_seconds": 1.0}
    cell["openvino_ms"] = 1.0
    cell["images"] = [{"image": "", "label": label, "score": 0.5} for label in (0, 1)]
    attempt = Mock(side_effect=[cell, {"error": "ValueError: second"}, KeyboardInterrupt, cell, cell])
    monkeypatch.setattr(grid, "attempt", attempt)
    arguments = {"models": {"PatchCore": PATCHCORE}, "data": folders, "seeds": (0, 1, 2), "results": tmp_path}
    with pytest.raises(KeyboardInterrupt):
        compare(**arguments)
    text = (tmp_path / "comparison.md").read_text()
    assert "1 of 3 cells are finished, 1 failed." in text
    assert "cells, PatchCore, seed 1: ValueError: second" in text
    assert compare(**arguments) == 0
    assert [call.args[2] for call in attempt.call_args_list] == [0, 1, 2, 1, 2]  # seeds
    assert "3 of 3 cells are finished, 0 failed." in (tmp_path / "comparison.md").read_text()


def test_no_threshold_may_come_from_test_images(folders, tmp_path) -> None:
    folders["cells"]["init_args"]["val_split_mode"] = "same_as_test"
    options = {"trainer": {"accelerator": "cpu", "logger": False}, "results": tmp_path / "comparison"}
    assert compare({"PatchCore": PATCHCORE}, folders, **options) == 1
    cell = json.loads((tmp_path / "comparison" / "cells-PatchCore-0.json").read_text())
    assert "val_split_mode is same_as_test" in cell["error"]
    assert "1 failed" in (tmp_path / "comparison" / "comparison.md").read_text()


def test_what_is_missing_is_said_before_anything_starts(folders, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folders["cells"]["init_args"]["root"] = str(tmp_path / "nowhere")
    efficientad = {"class_path": "anomalib.models.EfficientAd", "init_args": {"imagenet_dir": str(tmp_path / "photos")}}
    assert compare({"EfficientAd": efficientad}, folders, results=tmp_path / "comparison") == 3
    said = capsys.readouterr().err
    assert all(what in said for what in ("nowhere", "pretrained_teacher_small.pth", "photos"))
    assert not (tmp_path / "comparison").exists()
