"""The door through which models from other packages enter anomalib: entry points of the group ``anomalib.models``.

anomalib finds models among the classes that something has imported. ``anomalib_raad.pth``, whose line Python runs at
start because it lies in site-packages, installs an import hook that waits for ``anomalib.models`` and imports nothing
itself. When ``anomalib.models`` is imported, the hook calls :func:`find_spec` below, and then :func:`register`

1. looks up the entry points (name: the class; value: ``package.module:Class``) of every installed package,
2. adds their packages to anomalib's list of allowed modules, for ``get_model({"class_path": ...})``,
3. makes each class an attribute of ``anomalib.models``, and imports it, so that the CLI and ``list_models`` see it.

Uninstalling removes the ``.pth`` with the package.
"""

import sys
import warnings
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from importlib.metadata import entry_points
from types import ModuleType

GROUP = "anomalib.models"
_HOOK = "AnomalibPlugins"  # name of the hook's class in the .pth file


def find_spec(name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
    """Find ``anomalib.models`` as everybody else does, and register the plugins once it has been executed."""
    finders = (finder for finder in sys.meta_path if getattr(finder, "__name__", None) != _HOOK)
    spec = next((spec for finder in finders if (spec := finder.find_spec(name, path, target))), None)
    if spec is None or spec.loader is None:
        return None
    execute = spec.loader.exec_module

    def execute_and_register(module: ModuleType) -> None:
        execute(module)
        register(module)

    spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
    return spec


def register(models: ModuleType) -> None:
    """Make the classes of all installed plugins known to the module ``anomalib.models``.

    A plugin that cannot be imported is named in a warning, and anomalib works on without it.
    """
    plugins = {plugin.name: plugin for plugin in entry_points(group=GROUP)}

    def __getattr__(name: str) -> object:  # noqa: N807
        if name in plugins:
            return plugins[name].load()
        msg = f"module {models.__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)

    # As a fallback for names anomalib lacks, so no plugin can take a built-in model's name.
    models.__getattr__ = __getattr__  # type: ignore[method-assign]
    for name, plugin in plugins.items():
        package = plugin.module.partition(".")[0]
        models.ALLOWED_MODULES.add(package)
        if _being_imported(package):
            continue  # it asked for anomalib, and its class will exist when its own import ends
        try:
            plugin.load()
        except Exception as error:  # noqa: BLE001  # whatever a plugin does wrong, anomalib goes on
            msg = f"anomalib works on without the plugin {name} ({plugin.value}): {type(error).__name__}: {error}"
            warnings.warn(msg, stacklevel=2)


def _being_imported(package: str) -> bool:
    modules = [module for name, module in list(sys.modules.items()) if f"{name}.".startswith(f"{package}.")]
    return any(getattr(getattr(module, "__spec__", None), "_initializing", False) for module in modules)
