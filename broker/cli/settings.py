"""`perllm settings`: every setting with its value, where that comes from, and what it is."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.text import Text

from perllm.broker.cli.terminal import AsJson, out, print_json
from perllm.broker.settings_reference import Setting, all_settings
from perllm.broker.tables import Wide, show, table


def settings(
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the reference of docs/settings.md.")] = False,
    wide: Wide = False,
    as_json: AsJson = False,
) -> None:
    """Print all settings: value, origin and meaning."""
    if markdown:
        print(reference(all_settings(read=False)))
        return
    found = all_settings()
    if as_json:
        print_json([one._asdict() | {"value": _plain(one.value)} for one in found])
        return
    view = table("setting", "value", "from", flexible=("value",))
    for one in found:
        value = Text(_text(one.value))
        view.add_row(one.variable, value, one.origin, style=None if one.origin == "default" else "bold")
    show(out, view, wide=wide)


def reference(found: list[Setting]) -> str:
    """All settings as Markdown, by package."""
    lines = [
        "# Settings",
        "",
        "Every setting is an environment variable, or a line of `.env`. This page is made by",
        "`perllm settings --markdown`; `perllm settings` prints the values in force and where each comes from.",
        "Times are in seconds, sizes in bytes.",
    ]
    package = ""
    for one in found:
        if one.package != package:
            package = one.package
            lines += ["", f"## {package}", "", "| variable | type | default | meaning |", "|---|---|---|---|"]
        cells = (f"`{one.variable}`", f"`{one.type}`", f"`{_text(one.value)}`", one.meaning)
        lines.append("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |")
    return "\n".join(lines)


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
