"""The `perllm` command. Other packages add theirs through the entry point group `perllm.commands`."""

from __future__ import annotations

import io
import os
import signal
import sys
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path

import typer

from perllm.broker import extras
from perllm.broker.cli import embed, ledger, tasks
from perllm.broker.cli.terminal import err
from perllm.broker.errors import BadSetting, PerLLMError

app = typer.Typer(
    name="perllm",
    help="A queue for LLM work with deadlines. Start it with `perllm up`, or watch it with `perllm demo`.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # help texts name extras in brackets, which are no markup
)
app.add_typer(tasks.app)
app.add_typer(embed.app)
app.add_typer(ledger.app, name="ledger")


def main() -> None:
    """The console script: the user's mistakes are one line and status 1, never a traceback."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # `kill` cleans up as Ctrl-C does
    for stream in (sys.stdout, sys.stderr):  # arguments and file names may be no text, and are shown all the same
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if len(sys.argv) < 2 or sys.argv[1] not in _own_commands():
        _add_plugins()  # only then: importing the simulator takes longer than most commands
    try:
        _warn_of_unknown_variables()
        try:
            app()
        except ModuleNotFoundError as error:  # what only some commands of a group need
            raise extras.lacking(f"perllm {' '.join(sys.argv[1:2])}", error) from None
    except PerLLMError as error:
        err.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


def _warn_of_unknown_variables() -> None:
    if any(name.startswith("PERLLM_") for name in os.environ) or Path(".env").exists():
        from perllm.broker.settings_reference import unknown_variables  # noqa: PLC0415  most have set none

        for line in unknown_variables():
            err.print(f"warning: {line}", style="yellow", markup=False, highlight=False, soft_wrap=True)


def _own_commands() -> set[str]:
    names = {
        c.name or getattr(c.callback, "__name__", "")
        for c in (*tasks.app.registered_commands, *embed.app.registered_commands)
    }
    return names | {g.name for g in tasks.app.registered_groups if g.name} | {"ledger"}


def _add_plugins() -> None:
    for entry in entry_points(group="perllm.commands"):
        try:
            plugin = entry.load()
        except ModuleNotFoundError as error:
            lacking = extras.lacking(f"perllm {entry.name}", error, *extras.COMMANDS.get(entry.name, ()))
            anything = {"ignore_unknown_options": True, "allow_extra_args": True}
            app.command(entry.name, context_settings=anything)(_missing(lacking))
            continue
        if isinstance(plugin, typer.Typer):
            app.add_typer(plugin, name=entry.name)
        else:
            app.command(entry.name)(plugin)


def _missing(error: BadSetting) -> Callable[[], None]:
    def command() -> None:
        raise error

    command.__doc__ = f"{str(error).partition(' is ')[2].capitalize()}."
    return command
