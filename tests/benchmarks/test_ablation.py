import json

import pandas as pd
import pytest
import torch
from anomalib.models import Raad

from benchmarks import ablation


def test_rows_share_the_first_stage_and_the_steps(cell_data, small_raad, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(ablation, "Raad", small_raad)
    results = tmp_path / "ablation"
    rows = ["longer baseline", "HQS", "uniform 4"]

    def measure() -> None:
        options = {"calibration_images": 2, "image_size": (96, 64), "results": results}
        ablation.measure(cell_data(), 4, seeds=[3], rows=rows, **options)

    measure()
    cells = {path: json.loads(path.read_text()) for path in results.glob("*.json")}
    assert {cell["row"] for cell in cells.values()} == {"uniform 8", *rows}
    tested = {cell["row"]: list(cell)[3:] for cell in cells.values()}
    assert tested["uniform 8"] == ["model", "quantized", "trained"]
    assert tested["HQS"] == ["model", "quantized"]

    def checkpoint(row: str, stage: str) -> dict:
        return torch.load(results / "runs" / f"cells-{row}-3" / f"{stage}.ckpt", weights_only=True)

    first = checkpoint("uniform_8", "trained")
    assert first["global_step"] == 2
    shared = checkpoint("uniform_4", "trained")["state_dict"]
    weights = {name: value for name, value in first["state_dict"].items() if name.endswith(("weight", "bias"))}
    assert len(weights) > 40
    assert all(torch.equal(shared[name], value) for name, value in weights.items())
    assert checkpoint("longer_baseline", "trained")["global_step"] == 3
    assert Raad.load_from_checkpoint(results / "runs" / "cells-HQS-3" / "trained.ckpt").input_size == (96, 64)

    kept = next(iter(cells))
    kept.write_text(json.dumps(cells[kept] | {"seed": 7}))
    measure()
    assert json.loads(kept.read_text())["seed"] == 7

    ablation.table(results)
    assert (results / "ablation.png").stat().st_size > 5_000
    table = pd.read_csv(results / "ablation.csv")
    assert table["image_AUROC"].between(0, 1).all()
    fine_tuned = [f"{row}{end}" for row in ("HQS", "uniform 4", "uniform 8") for end in ("", ", fine-tuned")]
    assert sorted(table["row"]) == sorted(["baseline", "longer baseline", *fine_tuned])
    lines = (results / "ablation.md").read_text().splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:4]] == ["baseline", "longer baseline"]


def test_the_table_holds_every_row_against_the_longer_baseline(tmp_path) -> None:
    """Over the cells that both have: parts lack a seed of the longer baseline."""
    scores = {
        "bolts": {"uniform 8": (0.5, 0.75), "longer baseline": (0.625, 0.875)},
        "parts": {"uniform 8": (0.25, 1.0), "longer baseline": (0.5,)},
    }
    for name, rows in scores.items():
        for row, values in rows.items():
            for seed, value in enumerate(values):
                tested = {stage: {"image_AUROC": value} for stage in ablation.ROWS[row].tested}
                path = tmp_path / f"{name}-{row}-{seed}.json"
                path.write_text(json.dumps({"data": name, "row": row, "seed": seed} | tested))
    ablation.table(tmp_path)
    baseline, longer, quantized, _ = (tmp_path / "ablation.md").read_text().splitlines()[2:]
    figures = "0.625 (0.500 to 0.750) | 0.625 (0.250 to 1.000) | 0.625 | -0.188 |"
    assert baseline == f"| baseline | {figures}"
    assert longer == "| longer baseline | 0.750 (0.625 to 0.875) | 0.500 | 0.625 | +0.000 |"
    assert quantized == f"| uniform 8 | {figures}"


def test_unknown_rows__error(cell_data, tmp_path) -> None:
    with pytest.raises(ValueError, match=r"unknown rows \['nothing'\]; the rows are \['uniform 8'"):
        ablation.measure(cell_data(), 4, rows=["nothing"], results=tmp_path)
