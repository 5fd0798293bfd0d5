import torch
from PIL import Image

from anomalib_raad.data.drift import ranges


def test_prediction_warns_once(small_raad, engine, tmp_path, caplog) -> None:
    torch.manual_seed(0)
    images = [0.25 + 0.5 * torch.rand(3, 60, 80), 0.3 + 0.5 * torch.rand(3, 90, 80)]
    for name in "ab":
        Image.new("RGB", (80, 60), "red").save(tmp_path / f"{name}.png")
    model = small_raad()
    engine(logger=False).predict(model, data_path=tmp_path)
    assert "unlike" not in caplog.text  # a model that knows of no training images
    model.record.seen = ranges(images)
    engine(logger=False).predict(model, data_path=tmp_path)
    assert caplog.text.count("a.png is unlike the training images: contrast 0.471 (training: ") == 1
    assert "b.png is unlike" not in caplog.text
