from io import BytesIO
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from anomalib.models import Raad
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from anomalib_raad.raad.schedule import STAGE_CHECKPOINTS
from anomalib_raad.report import stages
from anomalib_raad.report.stages import checkpoint_paths, draw_figures

FIGURES = {"stages.png", "attention.png", "bias.png", "layers.png"}


def test_the_test_of_a_run_draws_the_figures_and_the_logger_gets_them(finished_run) -> None:
    assert {path.name for path in finished_run.glob("*.png")} == FIGURES | {"quantization.png"}
    events = EventAccumulator(str(next(finished_run.parents[2].rglob("logs")))).Reload()
    logged = {name: events.Images(name) for name in events.Tags()["images"]}
    assert set(logged) == FIGURES | {"quantization.png"}
    for name, (event,) in logged.items():
        expected = np.asarray(Image.open(finished_run / name).convert("RGB"))
        np.testing.assert_array_equal(np.asarray(Image.open(BytesIO(event.encoded_image_string))), expected)
        assert event.step == 2


def test_what_the_figures_show(cells, finished_run, cell_data, tmp_path, monkeypatch) -> None:
    """Each stage's column is what the networks of its own checkpoint compute."""
    for path in cells.glob("bad/*"):  # masks: the left half is defective
        half = np.zeros(Image.open(path).size, dtype=np.uint8)
        half[:, : len(half) // 2] = 255
        Image.fromarray(half).save(tmp_path / path.name)
    data, drawn = cell_data(mask_dir=tmp_path), {}
    data.setup()
    monkeypatch.setattr(stages, "draw_rows", lambda path, rows, scales: drawn.setdefault(path.name, rows))
    checkpoints = checkpoint_paths(finished_run, STAGE_CHECKPOINTS)
    draw_figures(finished_run, checkpoints, Raad(), data.test_data)
    assert set(drawn) == FIGURES

    examples = drawn["stages.png"]
    assert [kind for kind, _ in examples] == ["anomalous", "anomalous", "normal"]
    row = examples[0][1]
    assert list(row) == ["image", "mask", *STAGE_CHECKPOINTS.values()]
    assert row["image"].shape == (3, 64, 64)
    assert row["mask"].float().mean() == 0.5
    (name, anomalous_mean), (_, normal_mean) = drawn["attention.png"]
    assert name == "mean of 2 anomalous"
    layers, biases = dict(drawn["layers.png"]), dict(drawn["bias.png"])
    for stage, path in checkpoints.items():
        networks = Raad.load_from_checkpoint(path).model.eval()
        with torch.no_grad():
            heatmaps = [networks(row["image"][None]).anomaly_map[0, 0] for _, row in examples]
            teacher, student = networks.aligned_features(row["image"][None])[-1]
        torch.testing.assert_close([row[stage] for _, row in examples], heatmaps)
        torch.testing.assert_close(anomalous_mean[stage], (heatmaps[0] + heatmaps[1]) / 2)
        assert normal_mean[stage].shape == (64, 64)
        assert torch.equal(biases["student-autoencoder map"][stage], networks.recalibration.bias[0, 1])
        torch.testing.assert_close(layers[stage]["conv4"], (teacher - student)[0].square().mean(0))


def test_a_run_is_drawn_once_and_only_when_it_is_complete(finished_run, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(stages, "draw_figures", lambda *_: pytest.fail("drawn"))
    visualizer, data = Raad.configure_visualizer(), SimpleNamespace(test_data=None)
    trainer = SimpleNamespace(default_root_dir=finished_run, is_global_zero=True, datamodule=data, loggers=[])
    model = SimpleNamespace(global_step=2)
    visualizer.on_test_end(trainer, model)
    trainer.default_root_dir = tmp_path
    visualizer.on_test_end(trainer, model)
    monkeypatch.setattr(stages, "checkpoint_paths", lambda *_: {"": finished_run})
    trainer.datamodule = None
    visualizer.on_test_end(trainer, model)


def test_columns_that_are_named_together_share_a_scale(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(plt, "close", lambda figure: None)
    ramp, low, alone = torch.arange(1000.0).view(10, 100), -torch.ones(1, 1), torch.tensor([[3.0, 4.0]])
    rows = [("a", {"image": torch.rand(3, 4, 4), "first": ramp, "second": low, "third": alone})]
    rows.append(("b", {"image": torch.rand(3, 4, 4), "first": low, "second": low, "third": alone + 1}))
    stages.draw_rows(tmp_path / "figure.png", rows, [["first", "second"], ["third"]])
    scales = [axis.images[0].get_clim() for axis in plt.gcf().axes]
    plt.close("all")
    together = pytest.approx((-1, 993), abs=2)  # the 0.995-quantile of nearly a thousand numbers
    assert scales[1:4] == scales[5:8] == [together, together, (3, pytest.approx(4.985))]
