import shutil

import pytest
import torch
import yaml
from anomalib.data import Folder
from anomalib.engine import Engine
from anomalib.models import Aand, Agpnet
from torchvision.transforms.v2 import RandomHorizontalFlip

from anomalib_raad import Products


@pytest.fixture
def product(cells, tmp_path):
    """Makes datamodules of products: copies of the cells, with masks or without."""

    def make(name: str, masks: bool = False, **options) -> Folder:
        root = tmp_path / name
        shutil.copytree(cells, root)
        if masks:
            shutil.copytree(cells / "bad", root / "masks")
        return Folder(
            name=name, root=root, normal_dir="train", normal_test_dir="good", abnormal_dir="bad",
            mask_dir="masks" if masks else None, num_workers=0,
            **({"val_split_mode": "from_train", "val_split_ratio": 0.2, "seed": 0} | options),
        )  # fmt: skip

    return make


def make_products(product, **options) -> Products:
    parts = {"left": product("left"), "right": product("right")}
    return Products(parts, **({"train_batch_size": 2, "eval_batch_size": 3, "num_workers": 0} | options))


def test_every_product_is_split_as_its_datamodule_says(product) -> None:
    data = make_products(product)
    data.setup()
    for part, number in (("train", 4), ("val", 1), ("test", 4)):
        samples = getattr(data, f"{part}_data").samples
        assert samples["product"].value_counts().to_dict() == {"left": number, "right": number}
        assert all(f"/{name}/" in path for name, path in zip(samples["product"], samples.image_path, strict=True))
    batch = next(iter(data.train_dataloader()))
    assert batch.image.shape[:2] == (2, 3)
    assert data.val_split_mode == "from_train"


def test_one_that_sees_test_images_is_not_hidden(product) -> None:
    data = Products({"a": product("a"), "b": product("b", val_split_mode="same_as_test")})
    assert data.val_split_mode == "same_as_test"


def test_masks_serve_if_all_have_some(product) -> None:
    masked, plain, other = (product(name, masks=name != "plain") for name in ("masked", "plain", "other"))
    for parts, task in (
        ({"masked": masked, "plain": plain}, "classification"),
        ({"masked": masked, "other": other}, "segmentation"),
    ):
        data = Products(parts, num_workers=0)
        data.setup()
        assert data.task == task
        assert (data.test_data[0].gt_mask is None) == (task == "classification")


def test_augmentations_are_of_all(product) -> None:
    data = make_products(product, train_augmentations=RandomHorizontalFlip(p=1))
    data.setup()
    plain = make_products(lambda name: data.products[name])
    plain.setup()
    torch.testing.assert_close(data.train_data[0].image, plain.train_data[0].image.flip(-1))


def test_a_single_product__error(product) -> None:
    with pytest.raises(ValueError, match=r"products are \['left'\]; two at least are needed"):
        Products({"left": product("left")})


def test_a_dataset_that_reads_in_its_own_way__error(product, monkeypatch) -> None:
    data = make_products(product)
    data.products["right"].setup()
    monkeypatch.setattr(type(data.products["right"].train_data), "__getitem__", lambda self, index: None, raising=False)
    with pytest.raises(ValueError, match=r"the images of left, Folder, are read in a way that Products does not know"):
        data.setup()


@pytest.mark.parametrize("kind", [Agpnet, Aand])
def test_metrics_of_each_product_and_their_mean(product, engine, kind: type) -> None:
    data = make_products(product)
    model = kind(pre_processor=kind.configure_pre_processor((64, 64)), visualizer=False)
    trainer = engine(max_steps=3, logger=False)
    trainer.fit(model, datamodule=data)
    (metrics,) = trainer.test(model, datamodule=data)
    values = {name: metrics[f"{name}_image_AUROC"] for name in ("left", "right", "mean")}
    predictions = [item for batch in trainer.predict(model, datamodule=data) for item in batch]
    for name in ("left", "right"):
        own = [item for item in predictions if f"/{name}/" in item.image_path]
        normal, anomalous = ([float(i.pred_score) for i in own if bool(i.gt_label) is kind] for kind in (False, True))
        right = [float(a > n) + 0.5 * float(a == n) for a in anomalous for n in normal]
        assert values[name] == pytest.approx(sum(right) / 4)
    assert values["mean"] == pytest.approx((values["left"] + values["right"]) / 2)


def test_the_command_line_takes_products(cells, tmp_path) -> None:
    part = {
        "class_path": "Folder",
        "init_args": {
            "name": "cells", "root": str(cells), "normal_dir": "train", "normal_test_dir": "good",
            "abnormal_dir": "bad", "num_workers": 0, "val_split_mode": "from_train", "val_split_ratio": 0.2,
        },
    }  # fmt: skip
    config = {
        "model": {"class_path": "Agpnet"},
        "data": {"class_path": "anomalib_raad.Products", "init_args": {"products": {"a": part, "b": part}}},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    _, model, data = Engine.from_config(tmp_path / "config.yaml", default_root_dir=str(tmp_path))
    assert type(model) is Agpnet
    assert list(data.products) == ["a", "b"]
