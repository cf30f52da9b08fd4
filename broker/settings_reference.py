"""All settings of all installed packages: for `perllm settings`, and for a warning about variables that nobody reads.

Each package registers its settings under the entry point group `perllm.settings`, so the broker need not know them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from difflib import get_close_matches
from importlib.metadata import entry_points
from typing import Any, NamedTuple

from dotenv import dotenv_values
from pydantic import SecretStr
from pydantic_core import to_jsonable_python

from perllm.broker.settings import Settings, load_settings

PREFIX = "PERLLM_"


class Setting(NamedTuple):
    """One setting. `value` is as JSON, secrets masked; `origin` is `environment`, `.env` or `default`."""

    package: str
    variable: str
    type: str
    value: Any
    origin: str
    meaning: str


def all_settings(*, read: bool = True) -> list[Setting]:
    """Every setting with the value in force or, unless `read`, its default. Raises BadSetting."""
    return [setting for package, model in _models() for setting in _settings(package, model, read)]


def unknown_variables() -> list[str]:
    """A line for each `PERLLM_` variable, of the environment or `.env`, that no package reads: most likely a typing
    error, so it names the nearest there is."""
    known = {_variable(name) for _, model in _models() for name in model.model_fields}
    given = {name for name in os.environ if name.startswith(PREFIX)} | {n for n in _dotenv() if n.startswith(PREFIX)}
    return [_warning(name, known) for name in sorted(given - known)]


def _warning(name: str, known: set[str]) -> str:
    near = get_close_matches(name, known, n=1)
    return f"{name} is no setting" + (f": is {near[0]} meant?" if near else ": `perllm settings` lists them")


def _models() -> Iterator[tuple[str, type[Settings]]]:
    for entry in sorted(entry_points(group="perllm.settings"), key=lambda e: e.name):
        try:
            yield entry.name, entry.load()
        except ModuleNotFoundError:  # of an extra that is not installed
            continue


def _settings(package: str, model: type[Settings], read: bool) -> Iterator[Setting]:
    inherited = {name for base in model.__mro__[1:] if base is not object for name in getattr(base, "model_fields", {})}
    in_force = load_settings(model) if read else None
    types = model.model_json_schema()["properties"]
    from_file = _dotenv()
    for name, field in model.model_fields.items():
        if name in inherited and not (package == "broker" and model is Settings):
            continue
        variable = _variable(name)
        value = getattr(in_force, name) if in_force is not None else field.get_default(call_default_factory=False)
        if in_force is None and field.default_factory is not None:
            value = "(see the meaning)"
        origin = "environment" if variable in os.environ else ".env" if variable in from_file else "default"
        yield Setting(package, variable, _type(types[name]), _shown(value), origin, field.description or "")


def _variable(name: str) -> str:
    return f"{PREFIX}{name.upper()}"


def _dotenv() -> dict[str, str | None]:
    return {name.upper(): value for name, value in dotenv_values(".env").items()}


def _shown(value: Any) -> Any:
    return "********" if isinstance(value, SecretStr) else to_jsonable_python(value, fallback=str)


def _type(schema: dict[str, Any]) -> str:
    """A JSON schema's type in a word or two."""
    if "enum" in schema:
        return " or ".join(map(str, schema["enum"]))
    if "anyOf" in schema:
        return " or ".join(_type(one) for one in schema["anyOf"] if one.get("type") != "null")
    return str(schema.get("type", "object"))
