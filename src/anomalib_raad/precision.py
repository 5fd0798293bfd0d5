"""Which precision is the fastest on a processor: bfloat16 without instructions for it is emulated."""

import logging

import torch
from lightning.pytorch import Trainer

logger = logging.getLogger(__name__)


def has_bfloat16() -> bool:
    """Whether this machine's processor computes in bfloat16 (AVX512_BF16 or AMX, or their counterpart of ARM)."""
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def fastest_precision() -> str:
    """Lightning's precision in which Raad trains fastest on this machine's processor."""
    return "bf16-mixed" if has_bfloat16() else "32-true"


def check_precision(trainer: Trainer) -> None:
    """Say so if a fit on the processor is about to emulate bfloat16.

    Raises:
        ValueError: If the weights themselves would be in half precision, in which small steps are lost.
    """
    if trainer.precision in {"bf16-true", "16-true"}:
        mixed = trainer.precision.replace("true", "mixed")
        msg = f"precision is {trainer.precision}, in which weights lose small steps: take {mixed} or 32-true"
        raise ValueError(msg)
    if trainer.strategy.root_device.type == "cpu" and str(trainer.precision).startswith("bf16") and not has_bfloat16():
        logger.warning(
            "no bfloat16 instructions in this processor: %s takes several times as long as --trainer.precision 32-true",
            trainer.precision,
        )
