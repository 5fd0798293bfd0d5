"""The built wheel in a clean environment: Raad is known to anomalib without anybody importing it."""

import ast
import json
import re
import subprocess
import sys
import sysconfig
import venv
from importlib.metadata import packages_distributions
from pathlib import Path
from zipfile import ZipFile

import pytest

PROJECT = Path(__file__).parents[1]

SPELLINGS = """
import json
from anomalib.models import Raad, get_model, list_models

paths = ["Raad", "anomalib.models.Raad", "anomalib_raad.Raad"]
models = [get_model(name) for name in ("raad", "Raad", "RAAD")] + [get_model({"class_path": path}) for path in paths]
models.append(get_model({"class_path": "Raad", "init_args": {"padding": True}}))
print(json.dumps([type(model) is Raad for model in models] + ["raad" in list_models(), models[-1].padding]))
"""

SPAWNED = """
import multiprocessing

def names():
    from anomalib.models import list_models
    return sorted(list_models())

if __name__ == "__main__":
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print("raad" in pool.apply(names))
"""

# The class's home imported first: it asks for anomalib, whose hook asks for the class.
HOME_FIRST = """
import anomalib_raad.raad.lightning_model as home
from anomalib.models import Raad, list_models
print(Raad is home.Raad and "raad" in list_models())
"""


class Environment:
    """A virtual environment that sees this one's packages, without their start-up hooks and without this project."""

    def __init__(self, root: Path) -> None:
        venv.create(root, with_pip=False, symlinks=True)
        self.python = root / "bin" / "python"
        purelib = self.run("-c", "import sysconfig; print(sysconfig.get_path('purelib'))").stdout.strip()
        self.packages = Path(purelib)
        for package in Path(sysconfig.get_path("purelib")).iterdir():
            if "anomalib_raad" not in package.name and package.suffix != ".pth":
                (self.packages / package.name).symlink_to(package)

    def run(self, *arguments: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        command = [self.python, *arguments]
        result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd)
        assert result.returncode == 0, result.stderr
        return result

    def pip(self, *arguments: str | Path) -> None:
        subprocess.run([sys.executable, "-m", "pip", "--python", self.python, *arguments], check=True)

    def names(self) -> set[str]:
        return {path.name for path in self.packages.iterdir()}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    options = ["--no-deps", "--no-build-isolation", "--quiet", "--wheel-dir", folder]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, PROJECT], check=True)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module", params=["wheel", "editable"])
def environment(request, wheel, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    environment = Environment(tmp_path_factory.mktemp(request.param) / "env")
    before = environment.names()
    source = [wheel] if request.param == "wheel" else ["--no-build-isolation", "--editable", PROJECT]
    environment.pip("install", "--quiet", "--no-deps", *source)
    environment.added = environment.names() - before
    return environment


def test_what_the_wheel_holds(wheel: Path) -> None:
    """The package, its data and the start-up hook; no benchmark, no test."""
    names = {name for name in ZipFile(wheel).namelist() if ".dist-info/" not in name}
    source = PROJECT / "src"
    expected = {path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file()}
    assert names == {name for name in expected if "__pycache__" not in name}
    data = {Path(name).name for name in names if not name.endswith(".py")}
    assert data == {
        "anomalib_raad.pth",
        "py.typed",
        "published_results.json",
        "report.html",
        "teacher_small.safetensors",
    }


def test_what_is_imported_is_declared() -> None:
    tomllib = pytest.importorskip("tomllib")  # of Python 3.11
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    optional = [name for extra in ("openvino", "cluster", "inspect") for name in extras[extra]]
    declared = {re.match(r"[\w-]+", name)[0].lower() for name in [*project["dependencies"], *optional]}
    distributions = packages_distributions()
    for path in (PROJECT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            for module in {name.partition(".")[0] for name in modules} - {"anomalib_raad", *sys.stdlib_module_names}:
                names = {name.lower() for name in distributions.get(module, [module])} | {module.replace("_", "-")}
                # OpenVINO and NNCF come with an extra of anomalib.
                assert module in {"openvino", "nncf"} or any(name.startswith(tuple(names)) for name in declared), (
                    path,
                    module,
                )


def last_line(result: subprocess.CompletedProcess[str]) -> object:
    return json.loads(result.stdout.strip().splitlines()[-1].lower())


def test_every_spelling_of_get_model(environment: Environment) -> None:
    assert last_line(environment.run("-c", SPELLINGS)) == [True] * 9


def test_class_imported_before_anomalib(environment: Environment) -> None:
    assert last_line(environment.run("-c", HOME_FIRST)) is True


def test_spawned_worker(environment: Environment, tmp_path: Path) -> None:
    script = tmp_path / "spawned.py"
    script.write_text(SPAWNED)
    assert last_line(environment.run(script)) is True


def test_start_of_python_imports_nothing(environment: Environment) -> None:
    watched = ("torch", "typing", "importlib.metadata")
    code = f"import sys; print([name for name in sys.modules if 'anomalib' in name or name in {watched}])"
    loaded = environment.run("-c", code).stdout
    assert loaded.strip() == "[]"


def test_command_line(environment: Environment, tmp_path: Path) -> None:
    """Every subcommand accepts every spelling; the printed configuration names the class."""
    spellings = ["Raad", "anomalib.models.Raad", "anomalib_raad.Raad"]
    runs = []
    for subcommand in ("train", "fit", "validate", "test", "predict", "export"):
        for spelling in spellings:
            config = tmp_path / f"{spelling}.yaml"
            config.write_text(f"class_path: {spelling}\ninit_args:\n  padding: true\n")
            for model in (spelling, str(config)):
                arguments = [subcommand, "--model", model, "--data", "anomalib_raad.Elpv"]
                runs.append([*arguments, "--export_type", "onnx"] if subcommand == "export" else arguments)
    script = tmp_path / "parse.py"
    script.write_text(PARSE.replace("RUNS", repr(runs)))
    parsed = json.loads(environment.run(script, cwd=tmp_path).stdout.strip().splitlines()[-1])
    assert parsed == ["anomalib_raad.raad.lightning_model Raad"] * len(runs)


# Runs anomalib's own command line up to the point where it would instantiate the classes.
PARSE = """
import importlib, json
from unittest.mock import patch
from anomalib.cli.cli import AnomalibCLI

class Parsed(Exception):
    pass

def stop(cli):
    module, _, name = cli.config[cli.config.subcommand].model.class_path.rpartition(".")
    model = getattr(importlib.import_module(module), name)
    raise Parsed(f"{model.__module__} {model.__name__}")

names = []
with patch.object(AnomalibCLI, "before_instantiate_classes", stop):
    for arguments in RUNS:
        try:
            AnomalibCLI(args=arguments)
        except Parsed as parsed:
            names.append(str(parsed))
print(json.dumps(names))
"""


def test_broken_plugin_is_named_and_anomalib_works_on(environment: Environment) -> None:
    (environment.packages / "broken_plugin.py").write_text("raise RuntimeError('no licence found')")
    info = environment.packages / "broken_plugin-1.0.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[anomalib.models]\nBroken = broken_plugin:Broken\nPadim = broken_plugin:Padim\n"
    )
    result = environment.run("-c", "from anomalib.models import Padim, Raad; print(Padim.__module__)")
    assert "anomalib works on without the plugin Broken (broken_plugin:Broken)" in result.stderr
    assert "RuntimeError: no licence found" in result.stderr
    assert result.stdout.strip().endswith("anomalib.models.image.padim.lightning_model")


def test_uninstalling_leaves_nothing_behind(environment: Environment) -> None:
    """The last test: the environment is of no use afterwards."""
    assert "anomalib_raad.pth" in environment.added
    environment.pip("uninstall", "--yes", "--quiet", "anomalib-raad")
    assert not environment.added & environment.names()
    result = environment.run("-c", "import anomalib.models as m; print(hasattr(m, 'Raad'))")
    assert result.stdout.strip().endswith("False")
