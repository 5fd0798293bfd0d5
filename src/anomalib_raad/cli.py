"""The command ``anomalib-raad``; training, testing and export go through anomalib's own command line."""

import json
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from jsonargparse import auto_cli
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from anomalib_raad.teacher.distillation import Distillation, PhotoFolder
from anomalib_raad.teacher.weights import save_teacher

USAGE = """usage: anomalib-raad COMMAND [--help] [--config FILE] [options]

  distill   distil a teacher from a backbone and a folder of photos (Eq. 1)
  compare   fit and test several models on several data sets with several seeds
  figures   draw where each stage of a finished run looks, and look at its layers
  inspect   show in the browser what a deployed model says about images
"""


class _DistillationCLI(LightningCLI):
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--output", type=Path, default="teacher.safetensors", help="file for the teacher's weights")
        parser.add_argument("--ckpt_path", type=Path, default=None, help="checkpoint of an interrupted distillation")


def distill(arguments: Sequence[str]) -> None:
    """Fit a :class:`Distillation`, write the teacher, and beside it a JSON file that says how it was made."""
    cli = _DistillationCLI(
        Distillation,
        PhotoFolder,
        run=False,
        args=list(arguments),
        save_config_kwargs={"overwrite": True},
        parser_kwargs={"prog": "anomalib-raad distill"},
    )
    cli.trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=cli.config.ckpt_path)
    cli.trainer.limit_val_batches = 1.0  # the curve may have been taken on a part of the held-out photos
    metrics = cli.trainer.validate(cli.model, datamodule=cli.datamodule)[0]
    output = Path(cli.config.output)
    record = {
        "sha256": save_teacher(cli.model.teacher, output),
        "steps": cli.trainer.global_step,
        "held_out": metrics,
        "explained_variance_by_channel": cli.model.explained_variance().tolist(),
        "model": dict(cli.model.hparams),
        "data": dict(cli.datamodule.hparams),
    }
    output.with_suffix(".json").write_text(json.dumps(record, indent=2, default=str))
    sys.stdout.write(f"teacher: {output}\nrecord: {output.with_suffix('.json')}\n")


def figures(results: Path) -> None:
    """Draw the figures of a finished run, as a test of it does, and look at its layers.

    Writes ``stages.png``, ``attention.png``, ``bias.png``, ``layers.png``, ``diagnostics.png`` and
    ``diagnostics.json``; see :mod:`~anomalib_raad.report.stages` and :mod:`~anomalib_raad.report.diagnostics`.

    Args:
        results: Results folder of ``anomalib train``, with its ``config.yaml``.
    """
    from anomalib.engine import Engine  # noqa: PLC0415  # slow to import

    from .raad.diagnosis import diagnose_run  # noqa: PLC0415
    from .raad.schedule import STAGE_CHECKPOINTS  # noqa: PLC0415
    from .report.stages import checkpoint_paths, draw_figures  # noqa: PLC0415

    _, model, datamodule = Engine.from_config(results / "config.yaml")
    datamodule.setup()
    checkpoints = checkpoint_paths(results, STAGE_CHECKPOINTS)
    for path in draw_figures(results, checkpoints, model, datamodule.test_data):
        sys.stdout.write(f"{path}\n")
    sys.stdout.write(f"{diagnose_run(results, next(iter(checkpoints.values())), datamodule)}\n")


def main() -> None:
    """Run the command line."""
    command, *arguments = sys.argv[1:] or ["--help"]
    if command == "distill":
        distill(arguments)
    elif command == "compare":
        from .compare.grid import compare  # noqa: PLC0415  # plotting libraries that nothing else needs
        from .compare.parts import compare_parts  # noqa: PLC0415

        if any(argument.startswith("--config") for argument in arguments):
            failed = auto_cli(compare, args=arguments, as_positional=False, prog="anomalib-raad compare")
        else:
            failed = compare_parts(arguments)
        sys.exit(min(1, failed))
    elif command == "figures":
        auto_cli(figures, args=arguments, as_positional=False, prog="anomalib-raad figures")
    elif command == "inspect":
        if find_spec("gradio") is None:
            sys.exit("anomalib-raad inspect needs Gradio: pip install 'anomalib-raad[inspect]'")
        from .inspection import inspect  # noqa: PLC0415

        auto_cli(inspect, args=arguments, as_positional=False, prog="anomalib-raad inspect")
    else:
        sys.stdout.write(USAGE)
        sys.exit(0 if command in {"-h", "--help"} else 2)
