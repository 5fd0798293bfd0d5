"""The report of a comparison, written from its stored cells alone."""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from jinja2 import Template
from rich.console import Console
from torchmetrics.functional.classification import binary_roc

from .bootstrap import interval, resampled_auroc
from .choice import advice, choice
from .tables import markdown, mean_and_range

QUALITY = (
    "image_AUROC",
    "image_AUPR",
    "image_F1Score",
    "pixel_AUROC",
    "pixel_AUPRO",
    "pixel_AUPRO5",
    "structural_AUROC",
    "logical_AUROC",
    "mean_AUROC",
    "structural_AUsPRO",
    "logical_AUsPRO",
    "mean_AUsPRO",
)
COST = ("fit_seconds", "fit_cpu_seconds", "step_seconds", "latency_ms", "openvino_ms", "megabytes", "average_bits")
_COMPARED = ("image_AUROC", "pixel_AUPRO", "mean_AUsPRO")
_INTERVAL = "image_AUROC on resampled test images, 95 %"
_PUBLISHED = json.loads(Path(__file__).with_name("published_results.json").read_text())


def write_report(paths: Sequence[Path], results: Path, apart: Sequence[str] = ()) -> None:
    """Write ``comparison.html``, ``.md``, ``.csv`` and ``.png``, and print the Markdown.

    Args:
        paths: The files of the cells in the order of the report; those that do not exist yet are left out.
        results: Folder to write to.
        apart: Data sets that do not count in the means over data sets.
    """
    cells = [json.loads(path.read_text()) for path in paths if path.exists()]
    failed = [
        f"{cell['data']}, {cell['model']}, seed {cell['seed']}: {cell['error']}" for cell in cells if "error" in cell
    ]
    first = next((cell["model"] for cell in cells), "")
    cells = [cell for cell in cells if "error" not in cell]
    state = f"{len(cells)} of {len(paths)} cells are finished, {len(failed)} failed."
    tables, sentence = _tables(cells, results, first, apart) if cells else ({}, "")
    texts = (f"## {name}\n\n{markdown(table)}" for name, table in tables.items())
    text = "\n\n".join([state, *failed, *texts, sentence])
    (results / "comparison.md").write_text(text + "\n")
    Console().print(text, markup=False, soft_wrap=True)
    names = list(dict.fromkeys(cell["data"] for cell in cells))
    template = Template(Path(__file__).with_name("report.html").read_text(), autoescape=True)
    page = template.render(
        state=state,
        failed=failed,
        tables={name: table.to_html(index=False, border=0) for name, table in tables.items()},
        advice=sentence,
        published=_published(names),
        about=_PUBLISHED,
        data={name: [cell for cell in cells if cell["data"] == name] for name in names},
        curves=_curves,
    )
    (results / "comparison.html").write_text(page)


def _tables(
    cells: list[dict[str, Any]], results: Path, first: str, apart: Sequence[str]
) -> tuple[dict[str, pd.DataFrame], str]:
    """The tables and the advice as they are printed; also writes the figures as CSV and draws image AUROC."""
    frame = pd.DataFrame(cells).drop(columns=["images", "heatmaps"])
    frame["megabytes"] = frame.pop("bytes") / 1e6
    frame.to_csv(results / "comparison.csv", index=False)
    mean, low, high = (
        frame.pivot_table(index="data", columns="model", values="image_AUROC", aggfunc=how, sort=False)
        for how in ("mean", "min", "max")
    )
    spread = np.stack([(mean - low).T, (high - mean).T], axis=1)  # for each model below and above the bars
    axis = mean.plot.bar(rot=0, figsize=(8, 4), ylabel="image AUROC, mean and range over seeds", yerr=spread, capsize=3)
    axis.legend(loc="upper left", bbox_to_anchor=(1, 1))
    axis.figure.savefig(results / "comparison.png", dpi=120, bbox_inches="tight")
    plt.close(axis.figure)
    resampled, counted = _resampled(cells), frame[~frame["data"].isin(apart)]
    detection = _summary(frame, QUALITY)
    low_high = [
        interval(resampled[data][model].mean(axis=1))
        for data, model in zip(detection["data"], detection["model"], strict=True)
    ]
    detection[_INTERVAL] = [f"{low:.3f} to {high:.3f}" for low, high in low_high]
    published = pd.DataFrame([_published_row(row) for row in _published(list(frame["data"].unique()))])
    detection = pd.concat([detection, published.reindex(columns=detection.columns)]).fillna("")
    order = dict.fromkeys(detection["data"])
    detection = detection.sort_values("data", key=lambda names: names.map(list(order).index), kind="stable")
    tables = {
        "Detection": detection,
        "Differences": _differences(frame, resampled, first, apart),
        "Cost": _summary(frame, COST),
        "Which to take": choice(counted),
    }
    counted_resampled = {name: models for name, models in resampled.items() if name not in apart}
    return {name: table for name, table in tables.items() if not table.empty}, advice(counted, counted_resampled)


def _resampled(cells: Sequence[dict[str, Any]]) -> dict[str, dict[str, np.ndarray]]:
    """For every data set and model image AUROC on resampled test images, the same for all models of a data set."""
    groups: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for cell in cells:
        groups.setdefault(cell["data"], {}).setdefault(cell["model"], []).append(cell)
    return {data: resampled_auroc(models) for data, models in groups.items()}


def _summary(frame: pd.DataFrame, names: Sequence[str]) -> pd.DataFrame:
    """Mean and range over the seeds of every data set and model, as text."""
    rows = []
    for (data, model), group in frame.groupby(["data", "model"], sort=False):
        row = {"data": data, "model": model} | _extent(group)
        rows.append(row | {name: mean_and_range(group[name]) for name in names if name in frame})
    return pd.DataFrame(rows)


def _extent(group: pd.DataFrame) -> dict[str, str]:
    """What every table says: how much was measured."""
    numbers = {"test images": group["test_images"], "steps": group["steps"]}
    counts = {name: " / ".join(map(str, values.unique())) for name, values in numbers.items()}
    return {"seeds": str(group["seed"].nunique())} | counts


def _differences(
    frame: pd.DataFrame,
    resampled: dict[str, dict[str, np.ndarray]],
    first: str,
    apart: Sequence[str],
) -> pd.DataFrame:
    """The first model minus each of the others, for every data set and for the mean over those not apart."""
    counted = [name for name in frame["data"].unique() if name not in apart]
    groups = {name: frame[frame["data"] == name] for name in frame["data"].unique()}
    if len(counted) > 1:
        groups["mean"] = frame[frame["data"].isin(counted)]
    rows = []
    for name, group in groups.items():
        for other in frame["model"].unique():
            pair = group[group["model"].isin([first, other])]
            pair = pair.groupby(["data", "seed"]).filter(lambda both: len(both) == 2)
            if not pair.empty:
                row = {"data": name, "difference": f"{first} - {other}"} | _extent(pair)
                moved = _moved(pair, frame, resampled, first, other)
                metrics = [metric for metric in _COMPARED if metric in pair]
                extents = {"image_AUROC": interval(moved)}
                rows.append(row | {m: _difference(pair, m, first, other, extents.get(m)) for m in metrics})
    return pd.DataFrame(rows)


def _moved(
    pair: pd.DataFrame,
    frame: pd.DataFrame,
    resampled: dict[str, dict[str, np.ndarray]],
    first: str,
    other: str,
) -> np.ndarray:
    """The difference of two models on resampled test images, over the seeds that both have on every data set."""
    names = pair["data"].unique()
    seeds = pair.groupby("seed")["data"].nunique()
    seeds = seeds.index[seeds == seeds.max()]

    def mean(data: str, model: str) -> np.ndarray:
        own = frame[(frame["data"] == data) & (frame["model"] == model)]["seed"].isin(seeds).to_numpy()
        return resampled[data][model][:, own].mean(axis=1)

    common = [data for data in names if set(seeds) <= set(pair[pair["data"] == data]["seed"])]
    return np.mean([mean(data, first) - mean(data, other) for data in common], axis=0)


def _difference(
    pair: pd.DataFrame,
    metric: str,
    first: str,
    other: str,
    extent: tuple[float, float] | None,
) -> str:
    """Mean difference of two models over the seeds both have.

    It is held against how far either moves with the seed, and against the interval, where there is one, in which it
    lies on resampled test images.
    """
    values = pair.pivot_table(index=["data", "seed"], columns="model", values=metric, dropna=False).dropna()
    seeds = values.groupby("seed")
    means = seeds.mean()[seeds.size() == seeds.size().max()]  # a seed that lacks a data set has another mean
    if means.empty:
        return ""
    difference = float((means[first] - means[other]).mean())
    data_sets = seeds.size().max()
    text = f"{difference:+.3f}" + (f" over {data_sets} data sets" if data_sets > 1 else "")
    if extent:
        text += f", test images {extent[0]:+.3f} to {extent[1]:+.3f}"
    if len(means) == 1:
        return f"{text}, one seed"
    spread = float((means.max() - means.min()).max())
    open_ = abs(difference) <= spread or (extent is not None and extent[0] <= 0 <= extent[1])
    verdict = "no difference" if open_ else "better" if difference > 0 else "worse"
    return f"{text}, spread {spread:.3f}: {verdict}"


def _published(names: Sequence[str]) -> list[dict[str, Any]]:
    """The published rows of these data sets, and the printed means of the collections that they are from."""
    known = {*names, *(name.split("-")[0] for name in names if "-" in name)}
    return [row for row in _PUBLISHED["rows"] if row["data"] in known]


def _published_row(row: dict[str, Any]) -> dict[str, str]:
    """As text, in the paper's own unit, so that nothing computes with it."""
    values = {
        name: f"{row[name]} %" + (" (suspect)" if name in row.get("suspect", ()) else "")
        for name in QUALITY
        if name in row
    }
    return {"data": row["data"], "model": f"{row['model']}, published", "seeds": "published"} | values


def _curves(cells: Sequence[dict[str, Any]]) -> str:
    """ROC curves of all seeds, and for each model the scores of the test images of its first seed, as SVG."""
    models = list(dict.fromkeys(cell["model"] for cell in cells))
    figure, (roc, *histograms) = plt.subplots(
        1, 1 + len(models), figsize=(3 * (1 + len(models)), 2.6), layout="constrained"
    )
    for number, (model, histogram) in enumerate(zip(models, histograms, strict=True)):
        group = [cell for cell in cells if cell["model"] == model]
        for seed, cell in enumerate(group):
            scores, labels = (torch.tensor([image[key] for image in cell["images"]]) for key in ("score", "label"))
            false_positives, true_positives, _ = binary_roc(scores, labels)
            roc.plot(false_positives, true_positives, color=f"C{number}", linewidth=1, label=None if seed else model)
            if seed == 0:
                for label, name in enumerate(("normal", "anomalous")):
                    values = scores[labels == label]
                    histogram.hist(values, 20, (float(scores.min()), float(scores.max())), histtype="step", label=name)
                histogram.set(title=model, xlabel="score", yticks=[])
    roc.set(xlabel="false positive rate", ylabel="true positive rate")
    roc.legend()
    histograms[0].legend()
    file = io.StringIO()
    with plt.rc_context({"svg.fonttype": "none"}):  # the same letters need not be drawn again
        figure.savefig(file, format="svg")
    plt.close(figure)
    return file.getvalue()
