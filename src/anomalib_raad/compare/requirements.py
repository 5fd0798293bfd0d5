"""What a comparison needs on a machine and does not find there."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from anomalib.utils.path import get_pretrained_weights_dir


def missing_data(data: Mapping[str, dict[str, Any]]) -> list[str]:
    """Folders of datamodules that do not exist."""
    roots = {name: options.get("init_args", {}).get("root") for name, options in data.items()}
    return [f"data of {name}: no folder {root}" for name, root in roots.items() if root and not Path(root).is_dir()]


def missing_weights(models: Mapping[str, dict[str, Any]]) -> list[str]:
    """What EfficientAd would download: its teacher and ImageNet images."""
    missing = []
    for name, options in models.items():
        arguments = options.get("init_args", {})
        if options["class_path"].rpartition(".")[2] != "EfficientAd":
            continue
        size = arguments.get("model_size", "small")
        teacher = get_pretrained_weights_dir() / "efficientad_pretrained_weights" / f"pretrained_teacher_{size}.pth"
        if not teacher.exists():
            missing.append(f"teacher of {name}: no file {teacher}, see docs/howto.md")
        photos = Path(arguments.get("imagenet_dir", "./datasets/imagenette"))
        if not photos.is_dir():
            missing.append(f"photos for the penalty of {name}: no folder {photos} with a folder of images in it")
    return missing
