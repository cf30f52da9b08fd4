"""The sdist holds all sources, the wheel made of it what the code reads, the locks what pyproject.toml asks for."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path
from zipfile import ZipFile

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from perllm.broker.extras import MODULES

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PACKAGES = ("broker", "scheduler", "edge_worker", "cloud_worker")
#: What is in the repository, and what is about to be.
FILES = subprocess.run(
    ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
    cwd=ROOT,
    check=True,
    capture_output=True,
    text=True,
).stdout.split("\n")[:-1]
#: Kept in the packages' folders for people, not read by code.
NOT_SHIPPED = {".md"}


def required(*extras: str) -> list[Requirement]:
    """The project's requirements with these extras."""
    found, left = [Requirement(text) for text in PROJECT["dependencies"]], list(extras)
    while left:
        for requirement in map(Requirement, PROJECT["optional-dependencies"][left.pop()]):
            if requirement.name == PROJECT["name"]:  # an extra made of others
                left += requirement.extras
            else:
                found.append(requirement)
    return found


def pins(*locks: str) -> dict[str, str]:
    """Name → version in these locks."""
    text = "".join((ROOT / "requirements" / f"{lock}.txt").read_text() for lock in locks)
    found = re.findall(r"^([\w.-]+)==([^\s;]+)", text, re.MULTILINE)
    return {canonicalize_name(name): version for name, version in found}


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist built from the working tree."""
    folder = tmp_path_factory.mktemp("sdist")
    source = folder / "source"
    for name in FILES:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name, follow_symlinks=False)
    code = f"from setuptools.build_meta import build_sdist; build_sdist({str(folder)!r})"
    built = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, cwd=source)
    assert built.returncode == 0, built.stdout + built.stderr
    return next(folder.glob("perllm-*.tar.gz"))


@pytest.fixture(scope="module")
def wheel_file(sdist: Path) -> Path:
    """The wheel built from the sdist."""
    folder = sdist.parent
    options = ["--no-deps", "--no-build-isolation", "--disable-pip-version-check", "--wheel-dir", str(folder)]
    built = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", *options, str(sdist)], check=False, capture_output=True, text=True
    )
    assert built.returncode == 0, built.stdout + built.stderr
    return next(folder.glob("perllm-*.whl"))


@pytest.fixture(scope="module")
def wheel(wheel_file: Path) -> set[str]:
    """Names of the files in it."""
    with ZipFile(wheel_file) as archive:
        return set(archive.namelist())


def test_the_sdist_holds_every_source(sdist: Path) -> None:
    """The packages stand in it as perllm/…, and what belongs to this repository alone does not."""
    expected = {f"perllm/{name}" if name.partition("/")[0] in PACKAGES else name for name in FILES}
    expected -= {name for name in expected if name.startswith(".") or (ROOT / name).is_dir()}
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert expected - names == set()


def test_the_wheel_holds_every_file_of_the_packages(wheel: set[str]) -> None:
    expected = {
        f"perllm/{path.relative_to(ROOT)}"
        for name in PACKAGES
        for path in (ROOT / name).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.suffix not in NOT_SHIPPED
    }
    assert "perllm/broker/users.acl" in wheel
    assert {"perllm/broker/py.typed", "perllm/broker/ledger/ledger.lua", "perllm/broker/demo_tasks.jsonl"} <= expected
    assert expected - wheel == set()


def test_the_wheel_holds_nothing_else(wheel: set[str]) -> None:
    assert {name.split("/")[0] for name in wheel} <= {"perllm", f"perllm-{PROJECT['version']}.dist-info"}
    assert f"perllm-{PROJECT['version']}.dist-info/licenses/LICENSE" in wheel


@pytest.mark.parametrize(
    ("extras", "locks"),
    [
        (("all", "dev", "docs"), ("lock", "source")),
        (("server", "scheduler", "edge", "remote", "api"), ("runtime", "source")),
        (("cloud",), ("cloud",)),
        (("bench",), ("bench",)),
    ],
)
def test_locks_hold_what_the_project_asks_for(extras: tuple[str, ...], locks: tuple[str, ...]) -> None:
    locked = pins(*locks)
    stale = [
        str(requirement)
        for requirement in required(*extras)
        if locked.get(canonicalize_name(requirement.name), "none") not in requirement.specifier
    ]
    assert stale == [], "run `make lock`"


@pytest.mark.parametrize("other", ["bench", "runtime"])
def test_locks_agree(other: str) -> None:
    one, another = pins("lock"), pins(other)
    assert {name for name in one.keys() & another.keys() if one[name] != another[name]} == set()


def test_what_the_code_imports_is_declared() -> None:
    declared = {canonicalize_name(r.name) for r in required("all", "cloud", "agod")}
    providers = packages_distributions()
    undeclared = set()
    for path in (path for name in PACKAGES for path in (ROOT / name).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Import(names=names):
                    modules = [alias.name for alias in names]
                case ast.ImportFrom(module=str(module), level=0):
                    modules = [module]
                case _:
                    continue
            for top in {module.split(".")[0] for module in modules} - set(sys.stdlib_module_names) - {"perllm"}:
                if not declared & {canonicalize_name(name) for name in providers.get(top, [top])}:
                    undeclared.add(f"{path.relative_to(ROOT)}: {top}")
    assert undeclared == set()


def test_every_extra_says_which_modules_it_brings() -> None:
    extras = PROJECT["optional-dependencies"].keys() - {"all", "bench", "dev", "docs"}
    assert MODULES.keys() == extras
    providers = packages_distributions()
    for extra in extras:
        wanted = {canonicalize_name(r.name) for r in required(extra)}
        for module in MODULES[extra]:
            names = {canonicalize_name(name) for name in providers.get(module, [])}
            assert not names or names & wanted, f"{module} is not brought by {extra}"


def test_it_lives_beside_packages_named_broker_and_scheduler(wheel_file: Path, tmp_path: Path) -> None:
    """Both are on PyPI, and in many an application that would use the client."""
    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    packages = next((environment / "lib").glob("python3*/site-packages"))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(environment), "install"]
    found = subprocess.run([*pip, "broker", "scheduler"], check=False, capture_output=True, text=True)
    if found.returncode != 0:
        pytest.skip("PyPI cannot be reached")
    subprocess.run([*pip, "--no-deps", str(wheel_file)], check=True, capture_output=True)
    (packages / "dependencies.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    code = (
        "import broker, scheduler, perllm; from perllm import Client; import perllm.scheduler.service;"
        "print(broker.__file__, scheduler.__file__, perllm.__file__, perllm.scheduler.__name__)"
    )
    ran = subprocess.run(
        [environment / "bin" / "python", "-I", "-c", code], check=False, capture_output=True, text=True, cwd=tmp_path
    )
    assert ran.returncode == 0, ran.stderr
    *files, name = ran.stdout.split()
    assert all(file.startswith(str(packages)) for file in files)
    assert name == "perllm.scheduler"
