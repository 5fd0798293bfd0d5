"""Where a teacher comes from: the package itself, anomalib's official weights, or a file."""

from hashlib import sha256
from importlib.resources import files
from pathlib import Path

import torch
from anomalib.data.utils import download_and_extract
from anomalib.models.image.efficient_ad.lightning_model import WEIGHTS_DOWNLOAD_INFO
from anomalib.utils.path import get_pretrained_weights_dir
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from anomalib_raad.fit.checkpoints import check_archive

BUNDLED_SHA256 = "55ad1e38c2ed814eff6bb6fe5bc051c6e3adead135d602908c97d6f14501d69a"
_BUNDLED = "teacher_small.safetensors"


def load_teacher_(network: nn.Module, source: str | Path, model_size: str) -> None:
    """Load a teacher's weights into a patch description network, in place.

    Args:
        network: PDN of the given size.
        source: ``bundled`` (in this package, small only), ``efficientad`` (anomalib's official weights, downloaded by
            anomalib's own code on first use) or a ``.safetensors``, ``.pth`` or ``.pt`` file with a PDN's state dict.
        model_size: ``small`` or ``medium``.

    Raises:
        FileNotFoundError: If ``source`` is neither a known name nor a file.
        ValueError: If the file is damaged or does not hold a PDN of this size, or the bundled file was changed.
        pickle.UnpicklingError: If the file holds anything else than tensors.
    """
    path = _teacher_path(source, model_size)
    state = _read(path)
    own = dict(network.named_parameters())
    shapes = {name: tuple(parameter.shape) for name, parameter in own.items()}
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if shapes != found:
        different = sorted(name for name in shapes.keys() | found.keys() if shapes.get(name) != found.get(name))
        name = different[0]
        msg = (
            f"{path} does not hold a {model_size} teacher: {name} has shape {found.get(name)}, needed is "
            f"{shapes.get(name)} ({len(different)} tensors differ)"
        )
        raise ValueError(msg)
    if broken := [name for name, tensor in state.items() if not tensor.isfinite().all()]:
        msg = f"{path} holds no teacher: values of {', '.join(broken)} are not finite"
        raise ValueError(msg)
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(state[name])


def _read(path: Path) -> dict[str, torch.Tensor]:
    """Read a state dict without unpickling anything else."""
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            msg = f"{path} is no file of safetensors, or damaged: {error}"
            raise ValueError(msg) from error
    check_archive(path)
    state = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        msg = f"{path} does not hold a state dict"
        raise ValueError(msg)
    return state


def _teacher_path(source: str | Path, model_size: str) -> Path:
    if source == "bundled":
        return _bundled_path(model_size)
    if source == "efficientad":
        root = get_pretrained_weights_dir()
        if not (root / "efficientad_pretrained_weights").is_dir():
            download_and_extract(root, WEIGHTS_DOWNLOAD_INFO)
        return root / "efficientad_pretrained_weights" / f"pretrained_teacher_{model_size}.pth"
    path = Path(source)
    if not path.is_file():
        msg = (
            f"unknown teacher {str(source)!r}: use 'bundled', 'efficientad' or the path of a .safetensors or .pth file"
        )
        raise FileNotFoundError(msg)
    return path


def _bundled_path(model_size: str) -> Path:
    if model_size != "small":
        msg = f"there is no bundled {model_size} teacher: use teacher='efficientad' or the path of a weights file"
        raise ValueError(msg)
    path = Path(str(files(__package__) / _BUNDLED))
    if sha256(path.read_bytes()).hexdigest() != BUNDLED_SHA256:
        msg = f"{path} is damaged: its SHA-256 is not {BUNDLED_SHA256}; install anomalib-raad again"
        raise ValueError(msg)
    return path


def save_teacher(network: nn.Module, path: str | Path) -> str:
    """Write a teacher's weights as float16 safetensors and return the file's SHA-256."""
    state = {name: parameter.detach().half().contiguous() for name, parameter in network.named_parameters()}
    save_file(state, path)
    return sha256(Path(path).read_bytes()).hexdigest()
