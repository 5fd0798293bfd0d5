import json

import pandas as pd
import torch
from anomalib.models import EfficientAd, Raad
from anomalib.utils.path import get_pretrained_weights_dir
from PIL import Image

from anomalib_raad.raad.torch_model import RaadModel
from anomalib_raad.teacher.weights import load_teacher_
from benchmarks.learning_curve import measure, plot

STEPS = [0, 2, 3]


def test_raads_first_stage_is_measured_once(cell_data, small_raad, tmp_path) -> None:
    measure(small_raad, cell_data(val_split_mode="from_train"), STEPS, "raad", seeds=[3], results=tmp_path / "curves")
    (path,) = (tmp_path / "curves").glob("*.json")
    run = json.loads(path.read_text())
    assert [point["step"] for point in run["points"]] == STEPS
    assert all(0 <= point["image_AUROC"] <= 1 and point["held_out_map_st"] > 0 for point in run["points"])
    seconds = [point["seconds"] for point in run["points"]]
    assert seconds == sorted(seconds)

    path.write_text(json.dumps(run | {"name": "kept"}))
    measure(small_raad, cell_data(), STEPS, "raad", seeds=[3], results=tmp_path / "curves")
    assert json.loads(path.read_text())["name"] == "kept"
    plot(tmp_path / "curves")
    table = pd.read_csv(tmp_path / "curves" / "curves.csv")
    assert table["step"].tolist() == STEPS
    assert (tmp_path / "curves" / "curves.png").stat().st_size > 10_000


def test_measuring_as_if_stage_1_ended_leaves_the_training_alone(cell_data, small_raad, tmp_path, monkeypatch) -> None:
    for place in ("anomalib_raad.raad.lightning_model", "benchmarks.learning_curve"):
        monkeypatch.setattr(f"{place}.AUTOENCODER_STEPS", 1)
    measured, models = [], []

    def student(model: Raad) -> dict[str, torch.Tensor]:
        return {name: value.clone() for name, value in model.model.student.named_parameters()}

    def note(module: Raad, _: object) -> dict[str, float]:
        measured.append(student(module))
        return {}

    def model() -> Raad:
        models.append(small_raad(closed_form=True))
        return models[-1]

    monkeypatch.setattr("benchmarks.learning_curve._test", note)
    for steps in ([1, 2], [2]):
        measure(model, cell_data(val_split_mode="from_train"), steps, f"{len(steps)}", results=tmp_path)
    often, once = (student(each) for each in models)
    assert all(torch.equal(often[name], value) for name, value in once.items())
    solved, trained = measured[-2:]
    for name, value in once.items():
        assert torch.equal(trained[name], value), name
        assert torch.equal(solved[name], value) != name.startswith("conv4"), name


def test_efficientad_trains_with_the_bundled_teacher(cell_data, tmp_path, monkeypatch) -> None:
    """The recipe of docs/teacher.md: anomalib's EfficientAd reads the bundled teacher and computes its features."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    bundled = RaadModel()
    load_teacher_(bundled.teacher, "bundled", "small")
    folder = get_pretrained_weights_dir() / "efficientad_pretrained_weights"
    folder.mkdir(parents=True)
    torch.save(dict(bundled.teacher.named_parameters()), folder / "pretrained_teacher_small.pth")
    photos = tmp_path / "photos" / "any"
    photos.mkdir(parents=True)
    Image.new("RGB", (300, 300), "gray").save(photos / "photo.png")

    models = []

    def model() -> EfficientAd:
        models.append(EfficientAd(photos.parent, visualizer=False))
        return models[0]

    measure(model, cell_data(val_split_mode="from_train"), [1], "efficientad", results=tmp_path / "curves")
    assert len(list((tmp_path / "curves").glob("*-efficientad-0.json"))) == 1
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        expected = bundled.normalized_teacher(image)
        torch.testing.assert_close(models[0].model.teacher(image), expected, rtol=1e-4, atol=1e-4)
