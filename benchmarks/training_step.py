"""What an optimizer step of Raad costs, against anomalib's EfficientAd: time, multiply-adds, memory, by batch size.

    python -m benchmarks.training_step --output step.json

Raad knows the teacher's features of the unaugmented image, as in a fit from an image's second visit on. All variants
take their steps in turn in one process, so that whatever else the machine does slows all of them: quote the ratios, not
the seconds. Memory is measured in a process of its own for each variant.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from anomalib.models.image.efficient_ad.torch_model import EfficientAdModel
from jsonargparse import auto_cli
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from anomalib_raad import RaadModel
from anomalib_raad.compare.timing import median_seconds
from anomalib_raad.quantization.recipe import Allocation, quantize_

from .memory import peak_megabytes, printed_by

_SIZE = (256, 256)


@dataclass(frozen=True)
class Variant:
    """A model, a precision and what takes part in its step."""

    model: str
    bfloat16: bool = False
    penalty: bool = False
    quantized: bool = False
    batch_size: int = 1

    @property
    def name(self) -> str:
        """What the tables call it."""
        parts = [self.model, "stage 3" if self.quantized else "", "bf16" if self.bfloat16 else "fp32"]
        parts += ["penalty" if self.penalty else "", f"batch {self.batch_size}" if self.batch_size > 1 else ""]
        return ", ".join(filter(None, parts))


VARIANTS = [
    Variant("EfficientAd", penalty=True),
    Variant("EfficientAd", penalty=True, bfloat16=True),
    Variant("Raad", penalty=True),
    Variant("Raad", penalty=True, bfloat16=True),
    Variant("Raad"),
    Variant("Raad", bfloat16=True),
    Variant("Raad", bfloat16=True, quantized=True),
    Variant("Raad", bfloat16=True, batch_size=4),
    Variant("Raad", bfloat16=True, batch_size=8),
]


def main(steps: int = 7, output: Path | None = None, memory_of: int | None = None) -> None:
    """Measure every variant and print a table.

    Args:
        steps: Steps of each variant after two that are not counted; the median counts.
        output: JSON file for the figures.
        memory_of: Take two steps of this variant alone and print the megabytes used at most.
    """
    torch.manual_seed(0)
    if memory_of is not None:
        step = _step(VARIANTS[memory_of])
        step()
        step()
        print(peak_megabytes())  # noqa: T201
        return
    loops = [_step(variant) for variant in VARIANTS]
    median_seconds(loops, rounds=2)  # to warm up
    seconds = median_seconds(loops, steps)
    rows = [
        {
            **asdict(variant),
            "seconds": time,
            "multiply_adds": _multiply_adds(step),
            "megabytes": printed_by("benchmarks.training_step", "--memory_of", str(number)),
        }
        for number, (variant, step, time) in enumerate(zip(VARIANTS, loops, seconds, strict=True))
    ]
    _print(rows)
    if output:
        output.write_text(json.dumps(rows, indent=1))


def _step(variant: Variant) -> Callable[[], None]:
    image = torch.rand(variant.batch_size, 3, *_SIZE)
    unrelated = torch.rand(variant.batch_size, 3, *_SIZE) if variant.penalty else None
    model: nn.Module
    inputs = [image, unrelated]
    if variant.model == "EfficientAd":
        model = EfficientAdModel(teacher_out_channels=384)
    else:
        model = RaadModel()
        if variant.quantized:
            model.eval()
            quantize_(model, [image], [image], Allocation(bits=4))
        with torch.no_grad():  # a fit computes them when it sees an image for the first time
            inputs.append(model.teacher(image))
    model.train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-5, weight_decay=1e-5)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=variant.bfloat16):
            terms = model(*inputs)
        optimizer.zero_grad()
        sum(term for term in terms if term is not None).backward()
        optimizer.step()

    return step


def _multiply_adds(step: Callable[[], None]) -> int:
    """Of the forward and backward convolutions of one step."""
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops() // 2


def _print(rows: list[dict]) -> None:
    table = Table("Variant", "s / step", "ratio", "G multiply-adds", "ratio", "MB", "images / s")
    reference = rows[0]
    for variant, row in zip(VARIANTS, rows, strict=True):
        table.add_row(
            variant.name,
            f"{row['seconds']:.2f}",
            f"{row['seconds'] / reference['seconds']:.2f}",
            f"{row['multiply_adds'] / 1e9:.0f}",
            f"{row['multiply_adds'] / reference['multiply_adds']:.2f}",
            f"{row['megabytes']:.0f}",
            f"{row['batch_size'] / row['seconds']:.2f}",
        )
    Console().print(table)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
