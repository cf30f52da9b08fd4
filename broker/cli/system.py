"""The whole system on this machine: `perllm up` keeps it running, `perllm demo` shows it at work."""

from __future__ import annotations

import shlex
import time
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from perllm.broker import extras
from perllm.broker.cli import demo as demonstration
from perllm.broker.cli.terminal import AsJson, err, out, print_json
from perllm.broker.local.supervisor import Supervisor
from perllm.broker.settings import Settings, load_settings


def up(
    edges: Annotated[int, typer.Option(help="Edge workers to start.", min=0, max=64)] = 2,
    flower_port: Annotated[int, typer.Option(help="Flower's port on 127.0.0.1; 0 for no Flower.", min=0)] = 5555,
    api_port: Annotated[int, typer.Option(help="The HTTP API's port on 127.0.0.1; 0 for no API.", min=0)] = 8000,
    port: Annotated[
        int | None, typer.Option(help="Let the embedded server listen here too far away processes of this machine.")
    ] = None,
) -> None:
    """Run the whole system here until interrupted: server, scheduler, inbox, workers, Flower, HTTP API."""
    extras.require("perllm up", *extras.COMMANDS["up"])
    settings = load_settings()
    if api_port and (lacking := extras.missing("api")):
        err.print(f"no HTTP API: {extras.how_to_install(lacking)}", style="yellow", highlight=False, markup=False)
        api_port = 0
    names = tuple(f"e{i + 1}" for i in range(edges))
    supervisor = Supervisor(
        settings,
        edges=names,
        clouds=("c1",),
        flower_port=flower_port or None,
        api_port=api_port or None,
        server_port=port,
    )
    with supervisor:
        demonstration.await_nodes(supervisor, err)
        if flower_port:
            err.print(f"Flower: http://127.0.0.1:{flower_port}", highlight=False)
        if api_port:
            err.print(f"API:    http://127.0.0.1:{api_port}/v1 (any key), /docs", highlight=False)
        err.print(f"Celery: {_broker_url(settings, supervisor, port)}", highlight=False, markup=False, soft_wrap=True)
        err.print("        (broker and result backend of a producer; its queue is inbox)", highlight=False)
        err.print(f"Logs:   {supervisor.logs}\nup; Ctrl-C stops everything", highlight=False, soft_wrap=True)
        try:
            while True:
                time.sleep(0.2)
                for line in supervisor.tend():
                    _say(line)
        except KeyboardInterrupt:
            _say("stopping …")


def _broker_url(settings: Settings, supervisor: Supervisor, port: int | None) -> str:
    """What a Celery producer here gives as its broker and result backend; a shell puts in the password, which is not
    shown."""
    if settings.redis_url is not None:
        return f"as PERLLM_REDIS_URL, {settings.address}"
    if port is not None:
        return f"redis://:$(cat {shlex.quote(str(settings.data_dir / 'password'))})@127.0.0.1:{port}/0"
    return supervisor.settings.celery_url


def _say(line: str) -> None:
    """Tell people, if they are there: a terminal may be gone, a file on a full disk."""
    with suppress(OSError):
        err.print(line, style="yellow", highlight=False, markup=False, soft_wrap=True)


def demo(
    tasks: Annotated[Path | None, typer.Option(help="A JSONL file to run instead of the bundled one.")] = None,
    rate: Annotated[float, typer.Option(help="Tasks submitted per second.", min=0.1)] = 4.0,
    as_json: AsJson = False,
) -> None:
    """Start everything, run about 60 real tasks through two edge workers and one cloud worker, show what happened."""
    extras.require("perllm demo", *extras.COMMANDS["demo"])
    report = demonstration.run(tasks, rate, err if as_json else out)
    if as_json:
        print_json(report)
