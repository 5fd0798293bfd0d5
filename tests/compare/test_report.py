import json
import re
from pathlib import Path

import pandas as pd
import pytest
import yaml

from anomalib_raad.compare import report
from anomalib_raad.compare.report import write_report

PUBLISHED = json.loads(Path(report.__file__).with_name("published_results.json").read_text())
CELL = {
    "test_images": 2, "steps": 100, "fit_seconds": 60.0, "fit_cpu_seconds": 90.0, "step_seconds": 0.5,
    "latency_ms": 300.0, "openvino_ms": 30.0, "bytes": 8_000_000, "average_bits": 32.0,
    "heatmaps": {"worst normal": "data:image/jpeg;base64,AA=="},
}  # fmt: skip


def images(auroc: float) -> list[dict]:
    """A normal test image and two hundred anomalous ones, of which a share has a higher score."""
    higher = round(200 * auroc)
    scores = [0.7] * higher + [0.3] * (200 - higher)
    anomalous = [{"image": f"bad/{number}.png", "label": 1, "score": score} for number, score in enumerate(scores)]
    return [{"image": "good/0.png", "label": 0, "score": 0.5}, *anomalous]


@pytest.fixture
def report(tmp_path):
    """Writes cells, given as data set, model and one metric for each seed, and the report; returns its text."""

    def write(rows: list[tuple[str, str, list[float]]], apart: tuple[str, ...] = ()) -> str:
        paths = []
        for data, model, values in rows:
            for seed, value in enumerate(values):
                paths.append(tmp_path / f"{data}-{model}-{seed}.json")
                cell = {"data": data, "model": model, "seed": seed, "image_AUROC": value, "images": images(value)}
                cell |= CELL
                paths[-1].write_text(json.dumps(cell))
        write_report(paths, tmp_path, apart)
        return (tmp_path / "comparison.md").read_text()

    return write


def line(text: str, *start: str) -> list[str]:
    """The cells of the first row that starts so."""
    row = next(line for line in text.splitlines() if line.startswith("| " + " | ".join(start) + " |"))
    return [cell.strip() for cell in row.strip("|").split("|")]


def test_a_difference_within_the_spread_is_no_win(report) -> None:
    text = report(
        [
            ("a", "Raad", [0.90, 0.94, 0.92]),
            ("a", "EfficientAd", [0.88, 0.90, 0.89]),
            ("b", "Raad", [0.80, 0.80]),
            ("b", "EfficientAd", [0.90, 0.89]),
            ("c", "Raad", [0.99]),
            ("c", "EfficientAd", [0.5, 0.5]),
        ],
        apart=("c",),
    )
    pair = "Raad - EfficientAd"
    assert line(text, "a", pair)[:5] == ["a", pair, "3", "2", "100"]
    found = re.compile(r"([+-][.\d]+)( over 2 data sets)?, test images ([+-][.\d]+) to ([+-][.\d]+), (.*)")
    rows = {name: found.fullmatch(line(text, name, pair)[-1]).groups() for name in ("a", "b", "c", "mean")}
    assert {name: (row[0], row[4]) for name, row in rows.items()} == {
        "a": ("+0.030", "spread 0.040: no difference"),
        "b": ("-0.095", "spread 0.010: worse"),
        "c": ("+0.490", "one seed"),
        # seeds 0 and 1 of a and b: 0.85 and 0.87 against 0.89 and 0.895
        "mean": ("-0.032", "spread 0.020: worse"),
    }
    assert all(float(low) < float(difference) < float(high) for difference, _, low, high, _ in rows.values())
    assert line(text, "a", "Raad", "3")[-2] == "0.920 (0.900 to 0.940)"
    assert line(text, "b", "Raad", "2")[-2] == "0.800"


def test_the_interval_is_of_the_seeds_that_both_have(report) -> None:
    text = report([("a", "Raad", [0.9, 0.2, 0.2]), ("a", "EfficientAd", [0.8])])
    difference, low, high = map(float, re.findall(r"[+-]0\.\d+", line(text, "a", "Raad - EfficientAd")[-1]))
    assert 0 < low < difference < high


def test_a_difference_that_the_test_images_leave_open_is_no_win(report) -> None:
    text = report([("a", "Raad", [0.91, 0.91]), ("a", "EfficientAd", [0.905, 0.905])])
    assert line(text, "a", "Raad - EfficientAd")[-1].endswith(", spread 0.000: no difference")


def test_published_rows_stand_beside_the_means_and_never_in_them(report, tmp_path) -> None:
    text = report([("mvtec-cable", "RAAD", [0.9]), ("cookies", "RAAD", [0.8])])
    assert line(text, "mvtec-cable", "RAAD", "1")[-2] == "0.900"
    assert line(text, "mvtec-cable", "RAAD, published")[2:] == ["published", "", "", "97.71 %", ""]
    assert not [row for row in text.splitlines() if row.startswith("| cookies") and "published" in row]
    assert line(text, "mvtec", "RAAD, published")[-2] == "98.9 %"
    assert pd.read_csv(tmp_path / "comparison.csv")["image_AUROC"].tolist() == [0.9, 0.8]
    page = (tmp_path / "comparison.html").read_text()
    assert "97.71 %" in page
    assert "Suspect: mvtec-cable, EfficientAD, reproduced by RAAD, pixel_AUPRO: copied from bottle" in page


def test_local_data_have_nothing_published(report, tmp_path) -> None:
    report([("cookies", "Raad", [0.9])])
    assert "ublished" not in (tmp_path / "comparison.html").read_text()


def test_published_scenarios_are_those_of_the_configuration() -> None:
    rows = pd.DataFrame(PUBLISHED["rows"])
    config = yaml.safe_load((Path(__file__).parents[2] / "configs" / "compare_paper.yaml").read_text())
    scenarios = rows[rows["data"].str.contains("-")]
    assert set(scenarios["data"]) == set(config["data"])
    assert len(scenarios) == 4 * 32
    assert set(rows["source"]) == set(PUBLISHED["sources"])
    means = scenarios.groupby([scenarios["data"].str.split("-").str[0], "model"])["image_AUROC"].mean()
    printed = rows.set_index(["data", "model"])["image_AUROC"]
    for key in [("mvtec", "RAAD"), ("visa", "RAAD"), ("loco", "RAAD")]:
        assert means[key] == pytest.approx(printed[key], abs=0.01)


def test_the_page_is_self_contained(report, tmp_path) -> None:
    report([("cookies", "Raad", [0.9, 0.8]), ("cookies", "Patch<Core>", [0.7])])
    page = (tmp_path / "comparison.html").read_text()
    assert page.count("<svg") == 1
    assert page.count("<img") == page.count('src="data:image/jpeg;base64,') == 2  # of the first seed
    assert "Patch&lt;Core&gt;, seed 0" in page
    assert "Patch<Core>" not in page
    assert "<link" not in page
    assert (tmp_path / "comparison.png").stat().st_size > 5_000


def test_only_failed_cells(tmp_path) -> None:
    path = tmp_path / "a-Raad-0.json"
    path.write_text(json.dumps({"data": "a", "model": "Raad", "seed": 0, "error": "ValueError: no <images>"}))
    write_report([path, tmp_path / "a-Raad-1.json"], tmp_path)
    text = (tmp_path / "comparison.md").read_text()
    assert "0 of 2 cells are finished, 1 failed." in text
    assert "a, Raad, seed 0: ValueError: no <images>" in text
    assert "ValueError: no &lt;images&gt;" in (tmp_path / "comparison.html").read_text()
    assert not (tmp_path / "comparison.csv").exists()
