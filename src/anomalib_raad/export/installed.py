"""What exporting needs and anomalib does not install by itself."""

from importlib.util import find_spec


def check_installed(*packages: str) -> None:
    """Look whether packages are there.

    Raises:
        ModuleNotFoundError: If one is missing; the message says how to get it.
    """
    for package in packages:
        if find_spec(package) is None:
            msg = f"this export needs {package}: pip install 'anomalib[openvino]'"
            raise ModuleNotFoundError(msg)
