import pytest
import torch
from anomalib.data import ImageBatch
from anomalib.data.utils import read_image
from anomalib.pre_processing import PreProcessor
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset
from torchvision.transforms.v2 import CenterCrop, Compose, Resize

from anomalib_raad.data.drift import ranges
from anomalib_raad.fit.prediction_guard import check_scores
from anomalib_raad.pre_processing import RaadPreProcessor


@pytest.fixture
def with_thresholds(small_raad):
    """An untrained model that gives verdicts all the same."""
    model = small_raad()
    model.post_processor._image_threshold.fill_(0.5)
    return model


def test_prediction_warns_once(with_thresholds, engine, tmp_path, caplog) -> None:
    torch.manual_seed(0)
    images = [0.25 + 0.5 * torch.rand(3, 60, 80), 0.3 + 0.5 * torch.rand(3, 90, 80)]
    for name in "ab":
        Image.new("RGB", (80, 60), "red").save(tmp_path / f"{name}.png")
    engine(logger=False).predict(with_thresholds, data_path=tmp_path)
    assert "unlike" not in caplog.text  # a model that knows of no training images
    with_thresholds.record.seen = ranges(images)
    engine(logger=False).predict(with_thresholds, data_path=tmp_path)
    assert caplog.text.count("a.png is unlike the training images: contrast 0.471 (training: ") == 1
    assert "b.png is unlike" not in caplog.text


def test_the_second_image_of_a_batch_is_named(with_thresholds, engine, cells, caplog) -> None:
    paths = sorted(cells.glob("train/*"))[:2]
    first, second = (read_image(path, as_tensor=True) for path in paths)
    with_thresholds.record.seen = ranges([first])
    batch = ImageBatch(image=torch.stack([first, second / 255]), image_path=[str(path) for path in paths])
    engine(logger=False).predict(with_thresholds, dataloaders=DataLoader([0], collate_fn=lambda _: batch))
    assert f"{paths[1]} is unlike" in caplog.text
    assert f"{paths[0]} is unlike" not in caplog.text


@pytest.mark.parametrize("in_a_list", [False, True])
def test_images_without_files_are_predicted(with_thresholds, engine, caplog, in_a_list: bool) -> None:
    torch.manual_seed(0)
    images = torch.rand(3, 3, 64, 64)
    with_thresholds.record.seen = ranges(images / 255)
    loader = DataLoader(TensorDataset(images) if in_a_list else images, batch_size=2)
    predictions = engine(logger=False).predict(with_thresholds, dataloaders=loader)
    assert [len(batch.pred_score) for batch in predictions] == [2, 1]
    assert "image 0 of the batch is unlike the training images" in caplog.text
    with torch.no_grad():
        expected = with_thresholds.eval()(images).pred_score.flatten()
    torch.testing.assert_close(torch.cat([batch.pred_score.flatten() for batch in predictions]), expected)


def test_a_model_without_thresholds__error(small_raad, engine, cells) -> None:
    with pytest.raises(ValueError, match="not finished: it has no thresholds"):
        engine(logger=False).predict(small_raad(), data_path=cells / "bad")


def test_a_model_that_gives_no_verdicts_needs_no_thresholds(small_raad, engine, cells) -> None:
    predictions = engine(logger=False).predict(small_raad(post_processor=False), data_path=cells / "bad")
    assert all(batch.pred_label is None for batch in predictions)


@pytest.mark.parametrize("way", ["predict", "test", "validate"])
def test_a_score_that_is_not_finite__error(with_thresholds, engine, cells, cell_data, way: str) -> None:
    with_thresholds.model.map_quantiles.fill_(torch.nan)
    data = {"data_path": cells / "bad"} if way == "predict" else {"datamodule": cell_data()}
    with pytest.raises(FloatingPointError, match=r"the score of .*\.png.* is not finite"):
        getattr(engine(logger=False), way)(with_thresholds, **data)


def test_only_the_broken_image_is_named() -> None:
    batch = ImageBatch(image=torch.rand(3, 3, 8, 8), image_path=["a.png", "b.png", "c.png"])
    batch.pred_score = torch.tensor([0.1, torch.inf, 0.3])
    with pytest.raises(FloatingPointError, match=r"the score of b\.png is not finite"):
        check_scores(batch)


def test_a_checkpoint_of_another_image_size_warns(finished_run, small_raad, engine, cell_data, caplog) -> None:
    """The datamodule resizes as the model that it is given."""
    path = finished_run / "weights" / "lightning" / "model.ckpt"
    other = small_raad(pre_processor=small_raad.configure_pre_processor((96, 96)))
    engine(logger=False).test(other, datamodule=cell_data(), ckpt_path=path)
    assert "resizes images to (96, 96), and the checkpoint's model then to (64, 64)" in caplog.text


def test_a_crop_is_no_second_size(small_raad, engine, cell_data, caplog) -> None:
    model = small_raad(pre_processor=PreProcessor(transform=Compose([Resize((80, 80)), CenterCrop(64)])))
    engine(logger=False).test(model, datamodule=cell_data())
    assert isinstance(model.pre_processor, RaadPreProcessor)  # which resizes in exported models as here
    assert "resizes images" not in caplog.text
