"""The notebooks' code runs, at settings far smaller than those their outputs come from."""

import json
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
SMALL = """
STEPS, IMAGE_SIZE, ROUNDS = 3, (64, 64), 2
SETTINGS = {
    "calibration_images": 4,
    "reconstruction_iterations": 2,
    "held_out": 0.01,
    "closed_form": False,
}
"""


def test_there_are_notebooks() -> None:
    assert [path.stem for path in NOTEBOOKS] == ["deployment", "quantization", "quickstart"]


@pytest.mark.usefixtures("coarse_grids")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_notebook_runs(path: Path, tmp_path, monkeypatch) -> None:
    if path.stem == "deployment":
        pytest.importorskip("openvino")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for cell in json.loads(path.read_text())["cells"]:
        if cell["cell_type"] == "code":
            is_settings = "parameters" in cell["metadata"].get("tags", [])
            exec(SMALL if is_settings else "".join(cell["source"]), names)  # noqa: S102
    plt.close("all")
    assert names["model"].model.quantized


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_notebook_has_been_run_is_small_and_names_no_place(path: Path) -> None:
    cells = json.loads(path.read_text())["cells"]
    assert any("text/html" in output.get("data", {}) for cell in cells for output in cell.get("outputs", []))
    assert path.stat().st_size < 1e6
    assert not any(place in path.read_text() for place in (str(Path.home()), "site-packages", "results/Raad"))
