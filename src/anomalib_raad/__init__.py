"""RAAD for anomalib: train, quantize by score, fine-tune.

The names below are imported when they are first used, so that the parts can be used without anomalib's whole weight.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .aand.lightning_model import Aand
    from .aand.torch_model import AandModel
    from .agpnet.lightning_model import Agpnet
    from .agpnet.torch_model import AgpnetModel
    from .data.elpv import Elpv
    from .data.products import Products
    from .raad.lightning_model import Raad
    from .raad.torch_model import RaadModel

__all__ = ["Aand", "AandModel", "Agpnet", "AgpnetModel", "Elpv", "Products", "Raad", "RaadModel"]
__version__ = "0.1.0"

_HOMES = {
    "Aand": ".aand.lightning_model",
    "AandModel": ".aand.torch_model",
    "Agpnet": ".agpnet.lightning_model",
    "AgpnetModel": ".agpnet.torch_model",
    "Elpv": ".data.elpv",
    "Products": ".data.products",
    "Raad": ".raad.lightning_model",
    "RaadModel": ".raad.torch_model",
}


def __getattr__(name: str) -> object:
    """Import a public name on first use (PEP 562)."""
    if name not in _HOMES:
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    return getattr(import_module(_HOMES[name], __name__), name)
