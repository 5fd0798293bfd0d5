from io import BytesIO

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from anomalib.loggers import AnomalibTensorBoardLogger
from anomalib.models import Raad
from lightning.pytorch.loggers import CSVLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from anomalib_raad import figures
from anomalib_raad.figures import STAGES, stage_checkpoints


@pytest.fixture
def masks(cells, tmp_path):
    """A folder with a mask for each defective cell: its left half is defective."""
    folder = tmp_path / "masks"
    folder.mkdir()
    for path in cells.glob("bad/*"):
        half = np.zeros(Image.open(path).size, dtype=np.uint8)
        half[:, : len(half) // 2] = 255
        Image.fromarray(half).save(folder / path.name)
    return folder


def test_the_first_test_of_a_run_draws_and_logs_every_stage(masks, cell_data, small_raad, engine, monkeypatch) -> None:
    draw, drawn = figures._draw, {}

    def record(path, rows, scales):
        drawn[path.name] = rows
        return draw(path, rows, scales)

    monkeypatch.setattr(figures, "_draw", record)
    logger = AnomalibTensorBoardLogger(str(masks.parent / "logs"))
    data, runner = cell_data(mask_dir=masks), engine(max_steps=2, logger=[logger, CSVLogger(masks.parent)])
    model = small_raad(visualizer=True, closed_form_start=False, restore_student=False)
    runner.fit(model, datamodule=data)
    assert not drawn
    runner.test(model, datamodule=data)
    results = next(masks.parent.rglob("stages.png")).parent
    assert list(drawn) == ["stages.png", "attention.png", "layers.png"]
    assert {path.name for path in results.glob("*.png")} == {"quantization.png", *drawn}

    examples = drawn["stages.png"]
    assert [kind for kind, _ in examples] == ["anomalous", "anomalous", "normal"]
    row = examples[0][1]
    assert list(row) == ["image", "mask", *STAGES.values()]
    assert row["mask"].float().mean() == 0.5
    (name, anomalous_mean), (_, normal_mean) = drawn["attention.png"]
    assert name == "mean of 2 anomalous"
    layers = dict(drawn["layers.png"])
    for stage, path in zip(STAGES.values(), stage_checkpoints(results), strict=True):
        networks = Raad.load_from_checkpoint(path).model.eval()
        with torch.no_grad():
            heatmaps = [networks(row["image"][None]).anomaly_map[0, 0] for _, row in examples]
            teacher, student = networks.aligned_features(row["image"][None])[-1]
        torch.testing.assert_close([row[stage] for _, row in examples], heatmaps)
        torch.testing.assert_close(anomalous_mean[stage], (heatmaps[0] + heatmaps[1]) / 2)
        assert normal_mean[stage].shape == (64, 64)
        torch.testing.assert_close(layers[stage]["conv4"], (teacher - student)[0].square().mean(0))

    logger.save()
    events = EventAccumulator(logger.log_dir).Reload()
    logged = {name: events.Images(name) for name in events.Tags()["images"]}
    assert set(logged) == {"quantization.png", *drawn}
    for name, (event,) in logged.items():
        expected = np.asarray(Image.open(results / name).convert("RGB"))
        np.testing.assert_array_equal(np.asarray(Image.open(BytesIO(event.encoded_image_string))), expected)
        assert event.step == 2

    drawn.clear()
    runner.test(model, datamodule=data)
    assert not drawn


def test_columns_that_are_named_together_share_a_scale(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(plt, "close", lambda figure: None)
    ramp, low, alone = torch.arange(1000.0).view(10, 100), -torch.ones(1, 1), torch.tensor([[3.0, 4.0]])
    rows = [("a", {"image": torch.rand(3, 4, 4), "first": ramp, "second": low, "third": alone})]
    rows.append(("b", {"image": torch.rand(3, 4, 4), "first": low, "second": low, "third": alone + 1}))
    figures._draw(tmp_path / "figure.png", rows, [["first", "second"], ["third"]])
    scales = [axis.images[0].get_clim() for axis in plt.gcf().axes]
    plt.close("all")
    together = pytest.approx((-1, 993), abs=2)  # the 0.995-quantile of nearly a thousand numbers
    assert scales[1:4] == scales[5:8] == [together, together, (3, pytest.approx(4.985))]
