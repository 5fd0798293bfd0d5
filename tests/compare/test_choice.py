import numpy as np
import pandas as pd
import pytest

from anomalib_raad.compare.choice import advice, choice


@pytest.fixture
def frame() -> pd.DataFrame:
    rows = [
        ("a", "Raad", 0, 0.90, 0.50, 20.0, 5.0),
        ("a", "Raad", 1, 0.92, 0.50, 20.0, 5.0),
        ("b", "Raad", 0, 0.71, np.nan, 20.0, 5.0),
        ("a", "PatchCore", 0, 0.95, 0.70, 30.0, 12.0),
        ("b", "PatchCore", 0, 0.75, np.nan, 30.0, 12.0),
    ]
    columns = ["data", "model", "seed", "image_AUROC", "pixel_AUPRO", "openvino_ms", "megabytes"]
    return pd.DataFrame(rows, columns=columns).assign(fit_seconds=90.0)


def resampled(raad: float, width: float) -> dict:
    noise = np.linspace(-width, width, 1000)[:, None]
    return {name: {"Raad": raad + noise, "PatchCore": 0.85 + 0 * noise} for name in "ab"}


def test_the_table_has_means_over_data_sets_of_means_over_seeds(frame) -> None:
    raad, patchcore = choice(frame).to_dict("records")
    costs = {"OpenVINO, ms": "20.0", "MB": "5.0", "fit, minutes": "1.5"}
    assert raad == {"model": "Raad", "image AUROC": "0.810", "AU-PRO": "0.500"} | costs
    assert patchcore["image AUROC"] == "0.850"
    assert "AU-PRO" not in choice(frame.drop(columns="pixel_AUPRO"))


def test_a_model_that_is_as_good_and_smaller_is_the_one_to_take(frame) -> None:
    text = advice(frame, resampled(raad=0.81, width=0.05))
    assert text.startswith(
        "PatchCore detects best, with an image AUROC of 0.850; on so many test images Raad cannot be"
    )
    assert "Raad is the smallest, with 5.0 MB; Raad is the fastest, with 20 ms" in text
    assert text.endswith("Take Raad: it is the smallest, and these images do not show that any detects better.")


def test_a_better_and_larger_model_is_for_detection(frame) -> None:
    text = advice(frame, resampled(raad=0.81, width=0.01))
    assert text.endswith("Take PatchCore where detection is what counts, Raad where size is.")


def test_few_test_images_are_named(frame) -> None:
    figures = resampled(raad=0.81, width=0.01)
    figures["b"]["PatchCore"] = 0.85 + np.linspace(-0.2, 0.2, 1000)[:, None]
    assert advice(frame, figures).endswith("There are few test images: image AUROC is known to 19 points either way.")


def test_one_model_needs_no_advice(frame) -> None:
    assert advice(frame[frame["model"] == "Raad"], {}) == ""


def test_without_openvino_there_is_no_fastest(frame) -> None:
    assert "fastest" not in advice(frame.assign(openvino_ms=np.nan), resampled(0.81, 0.05))
