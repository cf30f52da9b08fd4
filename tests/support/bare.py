"""`python -m support.bare EXTRAS COMMAND ...` runs a command as it runs where only what perllm itself asks for, and
these extras of its (with commas between), are installed."""

from __future__ import annotations

import runpy
import sys
import tomllib
from importlib import metadata
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def installed(extras: list[str]) -> set[str]:
    """Distributions that `pip install perllm[...]` brings."""
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    left = [("perllm", extra) for extra in ("", *extras)]
    seen = set[tuple[str, str]]()
    while left:
        if (one := left.pop()) in seen:
            continue
        seen.add(one)
        name, extra = one
        try:
            if name == "perllm":
                required = project["optional-dependencies"][extra] if extra else project["dependencies"]
            else:
                required = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        for requirement in map(Requirement, required):
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                left += [(canonicalize_name(requirement.name), more) for more in ("", *requirement.extras)]
    return {name for name, _ in seen}


def hide(extras: list[str]) -> None:
    """Have no module found that these extras do not bring."""
    there = installed(extras)
    providers = metadata.packages_distributions()
    absent = {module for module, of in providers.items() if there.isdisjoint(map(canonicalize_name, of))}

    class Finder(PathFinder):
        @classmethod
        def find_spec(cls, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
            return None if fullname.partition(".")[0] in absent else super().find_spec(fullname, path, target)

    sys.meta_path[:] = [Finder if finder is PathFinder else finder for finder in sys.meta_path]
    for module in [module for module in sys.modules if module.partition(".")[0] in absent]:
        del sys.modules[module]


if __name__ == "__main__":
    hide([extra for extra in sys.argv[1].split(",") if extra])
    sys.argv = sys.argv[2:]
    match sys.argv[0]:
        case "perllm":
            from perllm.broker.cli.main import main

            main()
        case module:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
