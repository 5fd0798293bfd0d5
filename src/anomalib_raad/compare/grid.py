"""Models side by side on the same data: every model of a YAML file on every data set with every seed.

    anomalib-raad compare --config configs/compare_quick.yaml --check true
    anomalib-raad compare --config configs/compare_quick.yaml

Each finished cell is a file, so an interrupted comparison goes on where it stopped, and a failed cell is reported and
tried again the next time. A finished comparison only writes its report again. The test images are only measured.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from tqdm import tqdm

from anomalib_raad.precision import fastest_precision

from .cell import attempt
from .report import write_report
from .requirements import missing_data, missing_weights


class Cell(NamedTuple):
    """One model on one data set with one seed, by their names in the configuration."""

    data: str
    model: str
    seed: int

    def __str__(self) -> str:
        return f"{self.data}-{self.model}-{self.seed}"


def compare(
    models: Mapping[str, dict],  # of Any values jsonargparse would build the objects that they describe
    data: Mapping[str, dict],
    seeds: Sequence[int] = (0,),
    trainer: dict | None = None,
    results: Path = Path("results/comparison"),
    check: bool = False,
    download: bool = False,
    ray: str | None = None,
) -> int:
    """Fit and test every cell that is not finished, then write the report.

    Args:
        models: For each name ``class_path`` and ``init_args`` of a model, and ``trainer`` and ``data`` with what it has
            otherwise. The report compares the first one with each of the others.
        data: For each name ``class_path`` and ``init_args`` of a datamodule; ``apart: true`` keeps it out of the means.
        seeds: Seeds of weights and order.
        trainer: Lightning's options for all models, for instance ``max_steps``. On a processor, ``precision`` is by
            default its fastest.
        results: Folder for the cells; receives ``comparison.html``, ``.md``, ``.csv`` and ``.png``.
        check: Only say what is missing on this machine.
        download: Let anomalib download what EfficientAd needs, instead of naming it as missing.
        ray: Address of a Ray cluster, on whose machines the cells run side by side, a GPU for each where there are any;
            ``local`` starts one. All machines need the data and the results folder at the same path.

    Returns:
        The number of cells that failed, or of things that are missing.
    """
    cells = [Cell(name, model, seed) for name in data for seed in seeds for model in models]
    paths = {cell: results / f"{cell}.json" for cell in cells}
    left = [cell for cell, path in paths.items() if not path.exists() or "error" in json.loads(path.read_text())]
    missing = [
        *missing_data({cell.data: data[cell.data] for cell in left}),
        *([] if download else missing_weights({cell.model: models[cell.model] for cell in left})),
    ]
    for line in missing:
        Console(stderr=True).print(f"missing: {line}", soft_wrap=True)
    if check or missing:
        return len(missing)
    results.mkdir(parents=True, exist_ok=True)
    tasks = {}
    precision = {"precision": fastest_precision()} if (trainer or {}).get("accelerator") == "cpu" else {}
    for cell in left:
        limits = precision | (trainer or {}) | models[cell.model].get("trainer", {})
        folder = results.resolve() / "runs" / str(cell)
        tasks[cell] = (models[cell.model], data[cell.data], cell.seed, limits, folder)
    failed = 0
    try:
        for cell, outcome in tqdm(_outcomes(tasks, ray), "Cells", total=len(tasks)):
            if "error" in outcome:
                failed += 1
                Console(stderr=True).print(f"failed: {cell}: {outcome['error']}", soft_wrap=True, markup=False)
            unfinished = paths[cell].with_suffix(".tmp")
            unfinished.write_text(json.dumps(cell._asdict() | outcome, indent=1))
            unfinished.replace(paths[cell])
    finally:  # an interrupted comparison has a report as well
        apart = [name for name, options in data.items() if options.get("apart")]
        write_report(list(paths.values()), results, apart)
    return failed


def _outcomes(tasks: Mapping[Cell, tuple[Any, ...]], address: str | None) -> Iterator[tuple[Cell, dict[str, Any]]]:
    """Run the cells one after another, or side by side on a Ray cluster, and give each as it ends."""
    if address is None:
        yield from ((cell, attempt(*arguments)) for cell, arguments in tasks.items())
        return
    import ray  # noqa: PLC0415  # optional

    with ray.init(address=address):
        remote = ray.remote(num_gpus=int("GPU" in ray.cluster_resources()))(attempt)
        running = {remote.remote(*arguments): cell for cell, arguments in tasks.items()}
        while running:
            (done,), _ = ray.wait(list(running))
            try:
                outcome = ray.get(done)
            except ray.exceptions.RayError as error:  # the machine or the worker was lost
                outcome = {"error": str(error)}
            yield running.pop(done), outcome
