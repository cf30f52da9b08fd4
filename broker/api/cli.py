"""`perllm api`: the HTTP API, and its keys."""

from __future__ import annotations

import json
import os
import resource
import socket
import sys
import tempfile
from contextlib import suppress
from datetime import UTC, datetime
from typing import Annotated

import typer
import uvicorn
from rich.console import Console

from perllm.broker import logs
from perllm.broker import metrics as families
from perllm.broker.api.app import make_app
from perllm.broker.api.callers import is_loopback
from perllm.broker.api.files.sharing import StoreSharing
from perllm.broker.api.files.store import Files
from perllm.broker.api.keys import Key, Keys
from perllm.broker.api.openapi.fields import markdown
from perllm.broker.api.request_limits import MAX_HEAD, LimitedProtocol
from perllm.broker.api.settings import ApiSettings
from perllm.broker.api.stopping import LAST_WORDS, Server
from perllm.broker.api.store import ApiStore
from perllm.broker.connection import check
from perllm.broker.errors import BadSetting, PerLLMError, exit_with
from perllm.broker.ledger import Ledger
from perllm.broker.private_files import private_folder
from perllm.broker.settings import load_settings
from perllm.broker.tables import Wide, line, show, table

app = typer.Typer(help="The HTTP API, for any OpenAI client; `perllm api keys` for who may use it.")
keys = typer.Typer(help="Who may use the HTTP API.", no_args_is_help=True)
app.add_typer(keys, name="keys")

#: Files and sockets kept for other things than clients' connections.
RESERVED_FILES = 256

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


@app.callback(invoke_without_command=True)
def serve(
    context: typer.Context,
    host: Annotated[str | None, typer.Option(help="Address to listen on; PERLLM_API_HOST.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on; PERLLM_API_PORT.", min=1, max=65535)] = None,
) -> None:
    """Serve the OpenAI API over the queue until interrupted."""
    if context.invoked_subcommand is not None:
        return
    given = {name: value for name, value in (("api_host", host), ("api_port", port)) if value is not None}
    settings = load_settings(ApiSettings, **given)
    if settings.api_open and not is_loopback(settings.api_host):
        raise BadSetting(
            f"PERLLM_API_OPEN opens the API to all that reach {settings.api_host}: unset it and make keys with "
            "`perllm api keys make`, or listen on 127.0.0.1"
        )
    logs.configure(settings)
    try:
        check(settings)
        run(settings)
    except PerLLMError as error:
        if settings.log_json:
            exit_with(error)
        raise


def run(settings: ApiSettings) -> None:
    """Serve until interrupted. Raises BadSetting where the port cannot be had."""
    os.umask(0o077)
    private_folder(settings.data_dir, given=True)
    private_folder(settings.data_dir / "api")
    scratch = private_folder(settings.data_dir / "api" / "tmp")
    tempfile.tempdir = str(scratch)  # where uploads lie while they come in: /tmp may be memory
    LimitedProtocol.head_timeout = settings.api_patience
    LimitedProtocol.max_connections = min(settings.api_connections, _open_files() - RESERVED_FILES)
    LimitedProtocol.max_connections_per_address = settings.api_connections_per_address
    store = ApiStore(settings)
    files = Files(settings, store)
    files.check()
    listening = _listen(settings.api_host, settings.api_port)
    StoreSharing(store, files).begin()
    store.close()
    api = make_app(settings)
    config = uvicorn.Config(
        api,
        http=LimitedProtocol,
        ws="none",
        lifespan="on",
        access_log=False,
        log_config=None,
        log_level="warning",
        server_header=False,
        h11_max_incomplete_event_size=MAX_HEAD,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=LAST_WORDS,
    )
    Server(config, api.state.stopping).run(sockets=[listening])


def _open_files() -> int:
    """How many files and sockets this process may have open: as many as it may be allowed."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most == resource.RLIM_INFINITY:
        most = 1 << 20
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def _listen(host: str, port: int) -> socket.socket:
    try:
        listening = socket.create_server(
            (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=2048
        )
    except OSError as error:
        reason = f"{host}:{port} cannot be listened on ({error.strerror}): set PERLLM_API_HOST and PERLLM_API_PORT"
        raise BadSetting(reason) from None
    # Connections inherit it; asyncio sets it only on sockets made for TCP by number, and a body would wait 40 ms for
    # the acknowledgement of its head.
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listening


@keys.command("make")
def make(
    tenant: Annotated[str, typer.Option(help="The tenant whose tasks, files and batches it opens.")] = "default",
    name: Annotated[str, typer.Option(help="For people, to tell keys apart.")] = "",
    rate: Annotated[float | None, typer.Option(help="Most requests per second; else no limit.", min=0.001)] = None,
    in_flight: Annotated[int | None, typer.Option(help="Most unfinished tasks; else no limit.", min=1)] = None,
    max_value: Annotated[float, typer.Option(help="Highest value of a task: its weight against others'.")] = 1.0,
    operator: Annotated[bool, typer.Option("--operator", help="It also opens all of /metrics.")] = False,
    as_json: AsJson = False,
) -> None:
    """Make a key. It is shown once and kept as a digest only."""
    key, secret = _keys().make(tenant, name, rate, in_flight, max_value, operator=operator)
    if as_json:
        print(json.dumps({**_row(key), "key": secret}))
    else:
        print(secret)


@keys.command("list")
def list_keys(wide: Wide = False, as_json: AsJson = False) -> None:
    """Every key, revoked ones too, without its secret."""
    rows = [_row(key) for key in _keys().list()]
    if as_json:
        print(json.dumps(rows))
        return
    if not rows:
        print("no keys")
        return
    numbers = ("req/s", "in flight", "value")
    view = table(
        "id", "tenant", "name", "made", *numbers, "operator", "revoked", numbers=numbers, flexible=("tenant", "name")
    )
    for row in rows:
        times = {} if wide else {name: str(row[name] or "")[:10] for name in ("made", "revoked")}
        times["operator"] = "yes" if row["operator"] else ""
        view.add_row(*(line("-" if value in (None, "") else str(value)) for value in (row | times).values()))
    show(Console(file=sys.stdout), view, wide=wide)


@keys.command("revoke")
def revoke(
    identity: Annotated[str, typer.Argument(metavar="ID", help="A key's id, as `list` shows it.")],
    as_json: AsJson = False,
) -> None:
    """Have a key refused from now on."""
    key = _keys().revoke(identity)
    print(json.dumps(_row(key)) if as_json else f"{key.id}: revoked")


@app.command("metrics")
def metrics() -> None:
    """Every metric of `/metrics`, as tables."""
    print(families.markdown(), end="")


@app.command("fields")
def fields() -> None:
    """Every field of the OpenAI endpoints, as a table: taken, ignored or refused."""
    print(markdown(), end="")


def _keys() -> Keys:
    settings = load_settings(ApiSettings)
    return Keys(ApiStore(settings), Ledger(settings))


def _row(key: Key) -> dict[str, object]:
    def when(at: float | None) -> str | None:
        return None if at is None else datetime.fromtimestamp(at, UTC).isoformat(timespec="seconds")

    return {
        "id": key.id,
        "tenant": key.tenant,
        "name": key.name,
        "made": when(key.created),
        "rate": key.rate,
        "in_flight": key.in_flight,
        "max_value": key.max_value,
        "operator": key.operator,
        "revoked": when(key.revoked),
    }
