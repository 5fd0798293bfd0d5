"""Which files cannot be read as images, and why."""

from collections.abc import Iterable
from pathlib import Path

from PIL import Image

_CLIPPED_MODES = ("I", "F")  # 16- and 32-bit grey, float: anomalib's reader cuts them off at 255


def unreadable(paths: Iterable[str | Path]) -> dict[str, str]:
    """Decode every file and return those that cannot serve, each with the reason."""
    return {str(path): reason for path in paths if (reason := _fault(path))}


def _fault(path: str | Path) -> str | None:
    try:
        with Image.open(path) as image:
            if image.mode.startswith(_CLIPPED_MODES):
                return f"its pixels are of Pillow's mode {image.mode} and would be cut off at 255; convert it to 8 bits"
            image.load()
    except Exception as error:  # noqa: BLE001  # broken files make Pillow's decoders raise anything
        return f"{type(error).__name__}: {error}"
    return None


def list_faults(faults: dict[str, str]) -> str:
    """One line for each file."""
    return "\n".join(f"  {path}: {reason}" for path, reason in faults.items())
