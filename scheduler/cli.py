"""`perllm policies`: what there is to choose from, what `+mech` adds, and which policy leads now."""

from __future__ import annotations

from typing import Annotated

import typer

from perllm.broker.cli.terminal import AsJson, err, out, print_json
from perllm.broker.client import Client
from perllm.broker.errors import PerLLMError
from perllm.broker.ledger import Leader
from perllm.broker.tables import show, table
from perllm.scheduler.policies import MECHANISMS, MECHANISMS_ADDED, describe_policies


def policies(
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the page docs/policies.md.")] = False,
    as_json: AsJson = False,
) -> None:
    """List the placement policies, and say which one leads now."""
    if markdown:
        print(page())
        return
    leader, unknown = _leader()
    found = describe_policies()
    if as_json:
        leads = {"policy": leader.policy, "since": leader.since} if leader else None
        print_json(
            {"policies": [p._asdict() for p in found], "mechanisms": MECHANISMS_ADDED, "leader": leads, "note": unknown}
        )
        return
    view = table("policy", "what it does", flexible=("what it does",))
    for policy in found:
        view.add_row(policy.name, policy.sentence)
    show(out, view)
    out.print(f"NAME{MECHANISMS} adds {', '.join(MECHANISMS_ADDED)}.", highlight=False)
    if leader:
        out.print(f"leading now: {leader.policy}", highlight=False)
    else:
        err.print(unknown or "no scheduler leads", style="yellow", highlight=False, markup=False, soft_wrap=True)


def page() -> str:
    """The list as Markdown."""
    lines = [
        "# Policies",
        "",
        "`PERLLM_POLICY` chooses one for the service, `--policy` for `perllm simulate`. This page is made by",
        "`perllm policies --markdown`; `perllm policies` also says which one leads now.",
        "",
        "| policy | what it does |",
        "|---|---|",
        *(f"| `{policy.name}` | {policy.sentence} |" for policy in describe_policies()),
        "",
        f"A name that ends with `{MECHANISMS}` adds what CS-UCB always has, live and simulated alike:",
        "",
        *(f"- {mechanism}" for mechanism in MECHANISMS_ADDED),
    ]
    return "\n".join(lines)


def _leader() -> tuple[Leader | None, str | None]:
    """Who leads, or why that cannot be said."""
    try:
        with Client() as client:
            return client.ledger.leader(), None
    except PerLLMError as error:
        return None, f"which one leads is not known: {error}"
