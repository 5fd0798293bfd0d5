"""Images as they lie on real disks: each kind trains and predicts, or is refused by name."""

import os
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
from anomalib.data import Folder
from PIL import Image

from anomalib_raad.data.readable import unreadable

RAMP = np.linspace(0, 255, 96 * 80).reshape(96, 80)
RGB = Image.fromarray(np.stack([RAMP, RAMP.T.reshape(96, 80), 255 - RAMP], axis=-1).astype(np.uint8))
EXIF = Image.Exif()
EXIF[274] = 6  # rotated


def encoded(image: Image.Image, form: str, **options) -> bytes:
    file = BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def tiff(pixels: np.ndarray, **options) -> bytes:
    file = BytesIO()
    tifffile.imwrite(file, pixels, **options)
    return file.getvalue()


def deep_png(pixels: np.ndarray) -> bytes:
    return cv2.imencode(".png", pixels)[1].tobytes()


def cut(form: str, share: float) -> bytes:
    content = encoded(RGB, form)
    return content[: int(len(content) * share)]


def several(form: str) -> bytes:
    return encoded(RGB, form, save_all=True, append_images=[RGB.rotate(90), RGB.rotate(180)])


def with_nan() -> np.ndarray:
    pixels = RAMP.astype(np.float32)
    pixels[3] = np.nan
    return pixels


GREY = Image.fromarray(RAMP.astype(np.uint8))
GOOD: dict[str, bytes] = {
    "rgb.png": encoded(RGB, "PNG"),
    "rgb.jpg": encoded(RGB, "JPEG"),
    "rgb.JPEG": encoded(RGB, "JPEG"),
    "progressive.jpg": encoded(RGB, "JPEG", progressive=True),
    "rgb.bmp": encoded(RGB, "BMP"),
    "rgb.tif": encoded(RGB, "TIFF"),
    "lzw.tiff": encoded(RGB, "TIFF", compression="tiff_lzw"),
    "rgb.webp": encoded(RGB, "WEBP"),
    "rgb.ppm": encoded(RGB, "PPM"),
    "grey.png": encoded(GREY, "PNG"),
    "grey.jpg": encoded(GREY, "JPEG"),
    "grey.pgm": encoded(GREY, "PPM"),
    "one_bit.png": encoded(RGB.convert("1"), "PNG"),
    "palette.png": encoded(RGB.convert("P"), "PNG"),
    "transparent_palette.png": encoded(RGB.convert("P"), "PNG", transparency=3),
    "grey_alpha.png": encoded(RGB.convert("LA"), "PNG"),
    "rgba.png": encoded(RGB.convert("RGBA"), "PNG"),
    "rgba.webp": encoded(RGB.convert("RGBA"), "WEBP"),
    "cmyk.jpg": encoded(RGB.convert("CMYK"), "JPEG"),
    "cmyk.tif": encoded(RGB.convert("CMYK"), "TIFF"),
    "lab.tif": encoded(RGB.convert("LAB"), "TIFF"),
    "rgb_16_bit.png": deep_png(np.stack([RAMP] * 3, axis=-1).astype(np.uint16) * 257),
    "rgb_16_bit.tif": tiff(np.stack([RAMP] * 3, axis=-1).astype(np.uint16) * 257),
    "pages.tif": tiff(np.stack([RAMP] * 3).astype(np.uint8), photometric="minisblack"),
    "exif_rotated.jpg": encoded(RGB, "JPEG", exif=EXIF),
    "animated.png": several("PNG"),
    "animated.webp": several("WEBP"),
    "gif_named.png": several("GIF"),
    "jpeg_named.png": encoded(RGB, "JPEG"),
    "one_pixel.png": encoded(RGB.resize((1, 1)), "PNG"),
    "line.png": encoded(RGB.resize((16000, 10)), "PNG"),
    "black.png": encoded(Image.new("RGB", (64, 64)), "PNG"),
    "trailing_bytes.jpg": encoded(RGB, "JPEG") + bytes(100),
    "Stück €漢字🔩 #1%.png": encoded(RGB, "PNG"),
    "n" * 240 + ".png": encoded(RGB, "PNG"),
    "same_name.png": encoded(RGB, "PNG"),
    "again/same_name.png": encoded(RGB.rotate(90), "PNG"),
}
BAD: dict[str, bytes] = {
    "empty.png": b"",
    "empty.jpg": b"",
    "zeros.bmp": bytes(1000),
    "text.png": b"not an image",
    "page.jpg": b"<html><body>404</body></html>",
    "cut_early.jpg": cut("JPEG", 0.1),
    "cut.jpg": cut("JPEG", 0.7),
    "cut_early.png": cut("PNG", 0.1),
    "cut.png": cut("PNG", 0.7),
    "cut.bmp": cut("BMP", 0.7),
    "cut.tif": cut("TIFF", 0.7),
    "cut.webp": cut("WEBP", 0.7),
    "flipped.png": bytes(b ^ (i == 400) for i, b in enumerate(encoded(RGB, "PNG"))),
    "huge.png": encoded(Image.new("1", (20000, 20000)), "PNG"),
    "grey_16_bit.png": deep_png(RAMP.astype(np.uint16) * 257),
    "grey_16_bit.tif": tiff(RAMP.astype(np.uint16) * 257),
    "grey_32_bit.tif": tiff((RAMP * 1e6).astype(np.int32)),
    "float.tif": tiff((RAMP / 255).astype(np.float32)),
    "nan.tif": tiff(with_nan()),
    "double.tif": tiff(RAMP),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("disk")
    for name, content in (GOOD | BAD).items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(content)
    (root / "folder.png").mkdir()
    (root / "link.png").symlink_to(root / "rgb.png")
    (root / "again" / "up").symlink_to(root)
    return root


def test_there_are_fifty_kinds(folder: Path) -> None:
    assert len(GOOD) + len(BAD) >= 50


@pytest.mark.parametrize("name", [*GOOD, "link.png"])
def test_good_images(folder: Path, name: str) -> None:
    assert unreadable([folder / name]) == {}


@pytest.mark.parametrize("name", [*BAD, "folder.png"])
def test_bad_images(folder: Path, name: str) -> None:
    assert list(unreadable([folder / name])) == [str(folder / name)]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_forbidden_image(tmp_path) -> None:
    (tmp_path / "a.png").write_bytes(GOOD["rgb.png"])
    (tmp_path / "a.png").chmod(0)
    assert "PermissionError" in unreadable([tmp_path / "a.png"])[str(tmp_path / "a.png")]


@pytest.fixture
def trained(folder: Path, tmp_path, small_raad, engine) -> Callable:
    """A model after two steps on a folder."""

    def train(root: Path):
        data = Folder(
            name="disk", normal_dir=root, train_batch_size=1, eval_batch_size=1, num_workers=0,
            test_split_mode="none", val_split_mode="from_train", val_split_ratio=0.2, seed=0,
        )  # fmt: skip
        model = small_raad(bits=8, calibration_images=1)
        runner = engine(max_steps=2, logger=False)
        runner.fit(model, datamodule=data)
        return model, runner

    return train


def test_training_names_every_bad_file(folder: Path, trained) -> None:
    with pytest.raises(ValueError, match="cannot be used") as error:
        trained(folder)
    assert all(f"{folder / name}: " in str(error.value) for name in BAD)
    assert not any(f"{folder / name}: " in str(error.value) for name in GOOD)


def test_training_and_prediction_with_all_good_files(folder: Path, trained, tmp_path, caplog) -> None:
    good = tmp_path / "good"
    for name in GOOD:
        (good / name).parent.mkdir(parents=True, exist_ok=True)
        (good / name).symlink_to(folder / name)
    model, runner = trained(good)
    predictions = runner.predict(model, data_path=folder)
    scores = {
        path: score for batch in predictions for path, score in zip(batch.image_path, batch.pred_score, strict=True)
    }
    assert {Path(path).relative_to(folder).as_posix() for path in scores} == {*GOOD, "link.png"}
    assert all(score.isfinite() for score in scores.values())
    assert all(f"{folder / name}: " in caplog.text for name in [*BAD, "folder.png"])


def test_nothing_to_predict__error(small_raad, engine, tmp_path) -> None:
    (tmp_path / "text.png").write_text("not an image")
    with pytest.raises(ValueError, match=r"1 of 1 file\(s\) to predict cannot be used:\n.*text.png: Unidentified"):
        engine(logger=False).predict(small_raad(), data_path=tmp_path / "text.png")


@pytest.mark.parametrize("goal", ["loop.png", "nowhere.png"])
def test_link_to_nothing__error(small_raad, engine, tmp_path, goal: str) -> None:
    """anomalib lists a folder before any model can have a say."""
    (tmp_path / "loop.png").symlink_to(tmp_path / goal)
    with pytest.raises(FileNotFoundError, match=r"loop\.png"):
        engine(logger=False).predict(small_raad(), data_path=tmp_path)
