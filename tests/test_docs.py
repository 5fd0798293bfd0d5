"""What README and docs tell the reader to type exists."""

import re
import shlex
from importlib.util import find_spec
from inspect import signature
from pathlib import Path

import pytest
import torch
from anomalib.cli.cli import AnomalibCLI
from anomalib.models import Aand, Agpnet, EfficientAd, Raad
from lightning.pytorch import Trainer

from anomalib_raad.quantization.reconstruction import Reconstruction
from anomalib_raad.teacher.distillation import Distillation

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [
    block for page in PAGES for block in re.findall(r"```(\w+)\n(.*?)```", page.read_text(), flags=re.DOTALL)
]  # language and text
TRAIN_COMMANDS = [
    shlex.split(line, comments=True)[1:]
    for language, block in BLOCKS
    if language == "bash"
    for line in block.replace("\\\n", " ").splitlines()
    if line.startswith("anomalib train")
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_a_page_names_exists(page: Path) -> None:
    text = page.read_text()
    options = {name for part in (Aand, Agpnet, Raad, Distillation) for name in signature(part).parameters} | {"help"}
    assert set(re.findall(r"--model\.(\w+)", text)) <= options
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert set(re.findall(r"`make ([a-z-]+)`", text)) <= targets
    for path in re.findall(r"\b((?:benchmarks|configs|docs|notebooks|src|tests)/[\w/.-]+\.\w+)", text):
        assert (ROOT / path).is_file(), path
    for module in re.findall(r"python -m ((?:anomalib_raad|benchmarks)[a-z_.]+[a-z])", text):
        assert find_spec(module), module


@pytest.mark.parametrize("command", TRAIN_COMMANDS, ids=" ".join)
def test_anomalib_reads_the_command(command: list[str], tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("teacher.safetensors").touch()
    arguments = [argument for argument in command if argument != "..."]
    if "--data" not in arguments:
        arguments += ["--data", "anomalib_raad.Elpv"]
    assert type(AnomalibCLI(args=arguments, run=False).model) in {Aand, Agpnet, Raad}


@pytest.mark.usefixtures("coarse_grids")
def test_an_efficientad_becomes_a_raad(cell_data, engine, tmp_path, monkeypatch) -> None:
    """The how-to's block, on a checkpoint as anomalib writes it, leads straight to stage 2."""
    monkeypatch.chdir(tmp_path)
    efficientad = EfficientAd(padding=True)
    efficientad.model.mean_std["std"].data.fill_(2.0)
    trainer = Trainer(logger=False, accelerator="cpu")
    trainer.strategy.connect(efficientad)
    trainer.save_checkpoint("efficientad.ckpt")
    block = next(block for _, block in BLOCKS if "EfficientAd.load_from_checkpoint" in block)
    names: dict = {}
    exec(block.replace("999", "1"), names)  # noqa: S102
    raad = names["raad"]
    for network in ("teacher", "student", "ae"):
        own = dict(getattr(raad.model, network).named_parameters())
        for name, expected in getattr(efficientad.model, network).named_parameters():
            torch.testing.assert_close(own[name], expected, rtol=0, atol=0)
    assert (raad.model.teacher_std == 2).all()
    raad.pre_processor, raad.visualizer = Raad.configure_pre_processor((64, 64)), None
    raad.reconstruction = Reconstruction(iterations=0)
    engine(fast_dev_run=2).fit(raad, datamodule=cell_data())
    assert raad.model.quantized
    torch.testing.assert_close(raad.model.teacher.conv4.weight, efficientad.model.teacher.conv4.weight, rtol=0, atol=0)


def test_the_documentation_stays_short() -> None:
    """Whoever adds a page says the rest in fewer words."""
    assert len((ROOT / "README.md").read_text().splitlines()) <= 90
    assert sum(len(page.read_text().split()) for page in (ROOT / "docs").glob("*.md")) <= 10_700
