"""What is built and installed: the wheel's contents, and every way to install, each into an environment of its own.

Nothing here writes into the repository: builds run in copies. Nothing but `slow` reaches a package registry: the new
environments see the packages of this one, except ours, through a folder of links.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = (
    "pyproject.toml",
    "MANIFEST.in",
    "README.md",
    "LICENSE",
    "CHANGELOG.md",
    "ulysses_triton",
    "kernels",
    "autotune_cache",
    "tests",  # these must not be carried
    "bench",
)

# Run in the new environment. What it prints tells which copies were imported.
CHECK = """
import json, importlib.metadata
import kernels
import transformers
import ulysses_triton
import ulysses_triton.kernels.pack
from ulysses_triton.kernels import _config
print(json.dumps({
    "package": ulysses_triton.__file__,
    "pack": ulysses_triton.kernels.pack.__file__,
    "table": sorted(_config._table("sm_90")),
    "version": importlib.metadata.version("ulysses-triton"),
    "kernels": kernels.__file__,
    "transformers' kernels": getattr(transformers, "kernels", kernels).__file__,
}))
"""


def command(*arguments: object, cwd: Path) -> str:
    env = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run([str(a) for a in arguments], cwd=cwd, env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, f"{' '.join(str(a) for a in arguments)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def copy_of_the_repository(folder: Path) -> Path:
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info", ".*")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=ignore)
        else:
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


def files_of_the_package() -> set[str]:
    """What an installation has to have: every module, the tables and the marker of a typed package."""
    package = ROOT / "ulysses_triton"
    folders = [package, *(p for p in package.iterdir() if p.is_dir() and p.name != "__pycache__")]
    modules = {f for folder in folders for f in (folder.glob("*.py") if folder == package else folder.rglob("*.py"))}
    tables = set((package / "autotune_cache").glob("*.json"))
    assert modules and tables
    return {str(f.relative_to(ROOT)) for f in modules | tables | {package / "py.typed"}}


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist and the wheel that is built from it."""
    out = tmp_path_factory.mktemp("dist")
    tree = copy_of_the_repository(tmp_path_factory.mktemp("build") / "tree")
    command(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, tree, cwd=out)
    return out


@pytest.fixture(scope="module")
def wheel(dist: Path) -> Path:
    (path,) = dist.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def sdist(dist: Path) -> Path:
    (path,) = dist.glob("*.tar.gz")
    return path


@pytest.fixture(scope="module")
def installed_packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Links to what is installed here, torch and all, without ourselves and without what the tests put in its place."""
    folder = tmp_path_factory.mktemp("installed")
    theirs = ("ulysses_triton", "__editable__", "kernels", "transformers", "__pycache__")
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if not entry.name.startswith(theirs) and entry.suffix != ".pth":
            (folder / entry.name).symlink_to(entry)
    return folder


class Environment:
    """A virtual environment with nothing in it, which sees the packages of `installed`."""

    def __init__(self, folder: Path, installed: Path):
        venv.create(folder, with_pip=False, symlinks=True)
        self.bin = folder / "bin"
        (self.site,) = (folder / "lib").glob("python*/site-packages")
        (self.site / "installed.pth").write_text(f"{installed}\n")
        self.elsewhere = folder / "elsewhere"
        self.elsewhere.mkdir()

    def pip_install(self, *arguments: object) -> None:
        pip = (sys.executable, "-m", "pip", "--python", self.bin / "python", "--disable-pip-version-check", "install")
        command(*pip, *arguments, cwd=self.elsewhere)

    def add_stubs(self) -> None:
        """Packages with the names of Hugging Face's."""
        for name, text in (("kernels", ""), ("transformers", "import kernels\n")):
            (self.site / name).mkdir()
            (self.site / name / "__init__.py").write_text(text)

    def check(self, cwd: Path | None = None) -> dict[str, str]:
        """Import everything, from a folder that has none of it, or from `cwd` with that on the path as in a shell."""
        isolated = [] if cwd else ["-I"]
        return json.loads(command(self.bin / "python", *isolated, "-c", CHECK, cwd=cwd or self.elsewhere))


def assert_ours_and_theirs(found: dict[str, str], package: Path, env: Environment) -> None:
    assert found["package"] == str(package / "__init__.py")
    assert found["pack"] == str(package / "kernels" / "pack.py")
    assert "attend_forward" in found["table"]
    assert found["version"] == "0.1.0"
    assert found["kernels"] == found["transformers' kernels"] == str(env.site / "kernels" / "__init__.py")


def test_the_wheel_has_the_package_and_nothing_else(wheel: Path) -> None:
    assert wheel.name == "ulysses_triton-0.1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = {n for n in archive.namelist() if not n.endswith("/")}
    info = {n for n in names if n.startswith("ulysses_triton-0.1.0.dist-info/")}
    assert names - info == files_of_the_package()
    assert {n.split("/", 1)[1] for n in info} >= {"METADATA", "entry_points.txt", "licenses/LICENSE"}


def test_the_wheel_of_a_checkout_equals_that_of_the_sdist(wheel: Path, tmp_path: Path) -> None:
    tree = copy_of_the_repository(tmp_path / "tree")
    command(sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", tmp_path, tree, cwd=tmp_path)
    with zipfile.ZipFile(wheel) as one, zipfile.ZipFile(tmp_path / wheel.name) as other:
        assert {n: one.read(n) for n in one.namelist()} == {n: other.read(n) for n in other.namelist()}


def test_the_sdist_has_files_for_links_and_no_tests(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        members = [m for m in archive.getmembers() if not m.isdir()]
    assert all(m.isfile() for m in members)
    names = {m.name.split("/", 1)[1] for m in members}
    assert {n for n in names if n.startswith("ulysses_triton/")} == files_of_the_package()
    top = {n.split("/")[0] for n in names} - {"ulysses_triton", "ulysses_triton.egg-info"}
    expected = {"pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md", "PKG-INFO", "setup.cfg"}
    assert top == expected


def test_requirements_are_the_ranges_that_are_promised(wheel: Path) -> None:
    (info,) = importlib.metadata.distributions(path=[str(wheel)])
    requires = [r for r in info.requires or [] if "extra" not in r]
    assert sorted(requires) == ["filelock", "numpy", "platformdirs", "torch>=2.11", "triton>=3.6"]
    assert info.metadata["License-Expression"] == "Apache-2.0"
    assert {"cuda12", "cuda13", "train", "data", "plot", "transformers", "hf", "liger", "dev"} == set(
        info.metadata.get_all("Provides-Extra") or []
    )
    assert [(s.name, s.value) for s in info.entry_points] == [("ulysses-triton", "ulysses_triton.cli:main")]


@pytest.mark.parametrize("way", ["wheel", "sdist", "folder", "editable"])
def test_installs(way: str, wheel: Path, sdist: Path, installed_packages: Path, tmp_path: Path) -> None:
    env = Environment(tmp_path / "env", installed_packages)
    env.add_stubs()
    tree = copy_of_the_repository(tmp_path / "tree")
    what = {"wheel": [wheel], "sdist": [sdist], "folder": [tree], "editable": ["--editable", tree]}[way]
    command(
        env.bin / "python", "-I", "-c", "import importlib.util as u; assert not u.find_spec('ulysses_triton')", cwd=tree
    )
    env.pip_install("--no-deps", "--no-index", "--no-build-isolation", *what)
    package = (tree if way == "editable" else env.site) / "ulysses_triton"
    assert_ours_and_theirs(env.check(), package, env)
    if way == "editable":  # a checkout's top-level folder `kernels` must not hide their package either
        assert_ours_and_theirs(env.check(cwd=tree), package, env)
    if way == "wheel":
        assert "train" in command(env.bin / "ulysses-triton", "--help", cwd=env.elsewhere)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_installs_beside_hugging_faces_own_packages(wheel: Path, installed_packages: Path, tmp_path: Path) -> None:
    env = Environment(tmp_path / "env", installed_packages)
    env.pip_install("transformers", "kernels")
    env.pip_install("--no-deps", wheel)
    assert_ours_and_theirs(env.check(), env.site / "ulysses_triton", env)
    # The range of versions that this transformers takes is not our affair.
    seen = "import ulysses_triton; from transformers.utils import is_kernels_available as f; print(f('0', '1000'))"
    assert command(env.bin / "python", "-I", "-c", seen, cwd=env.elsewhere).split() == ["True"]


@pytest.mark.slow
def test_installs_with_a_build_environment_of_its_own(installed_packages: Path, tmp_path: Path) -> None:
    env = Environment(tmp_path / "env", installed_packages)
    env.add_stubs()
    env.pip_install("--no-deps", copy_of_the_repository(tmp_path / "tree"))
    assert_ours_and_theirs(env.check(), env.site / "ulysses_triton", env)
