from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from anomalib_raad import precision

CPUINFO = Path("/proc/cpuinfo")


def trainer(kind: str, device: str = "cpu") -> SimpleNamespace:
    return SimpleNamespace(precision=kind, strategy=SimpleNamespace(root_device=torch.device(device)))


@pytest.fixture(params=[True, False], ids=["bfloat16", "without"])
def bfloat16(request, monkeypatch) -> bool:
    monkeypatch.setattr(precision, "has_bfloat16", lambda: request.param)
    return request.param


@pytest.mark.skipif(not CPUINFO.exists(), reason="asks Linux")
def test_has_bfloat16() -> None:
    flags = next(line.split() for line in CPUINFO.read_text().splitlines() if line.startswith(("flags", "Features")))
    assert precision.has_bfloat16() == any(flag in flags for flag in ("avx512_bf16", "amx_bf16", "bf16"))


def test_fastest_precision(bfloat16: bool) -> None:
    assert precision.fastest_precision() == ("bf16-mixed" if bfloat16 else "32-true")


@pytest.mark.parametrize(
    ("kind", "device", "slow"),
    [("bf16-mixed", "cpu", True), ("32-true", "cpu", False), ("bf16-mixed", "meta", False)],
)
def test_slow_precision__warning(bfloat16: bool, kind: str, device: str, slow: bool, monkeypatch) -> None:
    warnings: list[str] = []
    monkeypatch.setattr(precision.logger, "warning", lambda text, *arguments: warnings.append(text % arguments))
    precision.check_precision(trainer(kind, device))
    expected = f"no bfloat16 instructions in this processor: {kind} takes several times as long"
    assert [text.startswith(expected) for text in warnings] == [True] * (slow and not bfloat16)


@pytest.mark.parametrize("kind", ["bf16", "16"])
def test_weights_in_half_precision__error(kind: str) -> None:
    with pytest.raises(ValueError, match=f"precision is {kind}-true, .* take {kind}-mixed or 32-true"):
        precision.check_precision(trainer(f"{kind}-true"))
