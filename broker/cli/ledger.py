"""`perllm ledger`: what the administrator of one's own server does for it."""

from __future__ import annotations

import sys
from importlib import resources
from typing import Annotated

import typer

from perllm.broker import functions
from perllm.broker.connection import check, connect, reaching
from perllm.broker.settings import load_settings

app = typer.Typer(help="The ledger's functions and users on the server.", no_args_is_help=True)


@app.command()
def load(
    only: Annotated[bool, typer.Option("--only", help="Drop those of other versions too: nobody runs one.")] = False,
) -> None:
    """Load this version's functions into the server at PERLLM_REDIS_URL, as a user who may; needed once per version.

    Those of other versions stay, for whoever still runs one.
    """
    settings = load_settings()
    check(settings)
    with reaching(settings):
        client = connect(settings)
        loaded, left = functions.load_all(client, only=only), functions.others(client)
    print(f"{len(loaded)} libraries are loaded: {', '.join(loaded)}")
    if left:
        print(f"of other versions, kept: {', '.join(left)} (drop them with --only)")


@app.command()
def users() -> None:
    """Print the server's access rules, a user for each role, for its ACL file: put in a password for each
    $<ROLE>_PASSWORD."""
    sys.stdout.write(resources.files("perllm.broker").joinpath("users.acl").read_text(encoding="utf-8"))
