"""What a producer does: submit tasks, wait for them, look at them, cancel them, try dead ones again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from perllm.broker.cli import submit_file, terminal
from perllm.broker.cli.terminal import AsJson, err, out, print_json
from perllm.broker.client import Client
from perllm.broker.errors import BadSetting, InvalidTask, TaskNotFound, Unreadable
from perllm.broker.ledger import TaskRecord
from perllm.broker.messages import Result, State
from perllm.broker.tables import Wide, line, short_ids, show, table

#: Characters of a prompt that are shown: at most, and with --wide.
PREVIEW, WIDE_PREVIEW = 60, 200

app = typer.Typer()
dead = typer.Typer(help="Tasks that failed for good: look at them, or try again.", no_args_is_help=True)
app.add_typer(dead, name="dead")

TaskId = Annotated[str, typer.Argument(help="A task's id, or its beginning.", show_default=False)]


@app.command()
def submit(
    what: Annotated[str, typer.Argument(help="A prompt, or a .jsonl file in OpenAI Batch format.")],
    deadline: Annotated[float | None, typer.Option(help="Seconds from now; 60 unless given.")] = None,
    value: Annotated[float | None, typer.Option(help="Weight against other tasks; 1 unless given.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Longest output, tokens; what fits unless given.")] = None,
    model: Annotated[str | None, typer.Option(help="A model on offer (`perllm nodes`); any unless given.")] = None,
    service: Annotated[str | None, typer.Option(help="Service class the task belongs to.")] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for the result(s).")] = False,
    output: Annotated[Path | None, typer.Option(help="With a file and --wait: results go here.")] = None,
    errors: Annotated[Path | None, typer.Option(help="With a file: bad lines and failures go here.")] = None,
    batch: Annotated[
        str | None, typer.Option(help="With a file: a name; submitting under it again goes on, nothing runs twice.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Submit one prompt, or every line of a JSONL file."""
    given = {"deadline": deadline, "value": value, "max_tokens": max_tokens, "model": model, "service": service}
    fields = {k: v for k, v in given.items() if v is not None}
    with Client() as client:
        if what.endswith(".jsonl"):
            report = submit_file.run(client, Path(what), fields, batch, wait, output, errors, err)
            if as_json:
                print_json(report)
            raise typer.Exit(0 if report["errors"] == 0 else 1)
        if output or errors or batch:
            raise InvalidTask("--output, --errors and --batch go with a .jsonl file")
        handle = client.submit_many([client.accept({"prompt": what, **fields})])[0]
        if wait:
            _print_result(handle.result(), as_json)
        elif as_json:
            print_json({"id": handle.id})
        else:
            print(handle.id)


@app.command()
def result(
    task_id: TaskId,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for it.")] = 3600.0,
    as_json: AsJson = False,
) -> None:
    """Wait for a task's result and print its text, vectors or scores (the receipt goes to standard error)."""
    with Client() as client:
        _print_result(client.result(client.find([task_id])[0], timeout), as_json)


@app.command()
def status(
    task_id: Annotated[str | None, typer.Argument(help="A task's id or its beginning; else the system.")] = None,
    as_json: AsJson = False,
) -> None:
    """How many tasks are in each state, or where one task is."""
    with Client() as client:
        if task_id is None:
            _show_system(client, as_json)
        else:
            _show_task(client, client.find([task_id])[0], as_json)


@app.command()
def cancel(
    task_ids: Annotated[list[str], typer.Argument(help="Tasks' ids, or their beginnings.")], as_json: AsJson = False
) -> None:
    """Cancel tasks, running ones too."""
    with Client() as client:
        found = {task_id: client.cancel(task_id) for task_id in dict.fromkeys(client.find(task_ids))}
    if as_json:
        print_json(found)
        return
    for task_id, state in found.items():
        print(f"{task_id}: {'already ' + state if state.final else 'cancelled (was ' + state + ')'}")


@app.command()
def explain(task_id: TaskId, as_json: AsJson = False) -> None:
    """Why a task was placed where it was, or refused."""
    with Client() as client:
        (task_id,) = client.find([task_id])
        why = client.explain(task_id)
    if as_json:
        print_json(why.model_dump() if why else None)
    elif why is None:
        print("not decided yet")
    else:
        out.print(terminal.explanation(task_id, why))


@app.command()
def nodes(
    live: Annotated[bool, typer.Option("--live", help="Only those that live.")] = False,
    wide: Wide = False,
    as_json: AsJson = False,
) -> None:
    """The nodes and what they are doing, those that died too; with --json also what was learned of them."""
    with Client() as client:
        rows, learned = client.ledger.nodes(), client.ledger.learned()
        distrusted = client.ledger.distrusted([info.name for info, _, _ in rows])
        dead = [] if live else [gone for gone in client.ledger.gone() if not gone.left]
    if as_json:
        print_json(
            [
                {
                    "node": info.model_dump(),
                    "heartbeat": beat.model_dump() if beat else None,
                    "draining": draining,
                    "distrusted": distrusted.get(info.name),
                    "state": "draining" if draining else "up",
                    "learned": learned[info.name].model_dump() if info.name in learned else None,
                }
                for info, beat, draining in rows
            ]
            + [
                {
                    "node": info.model_dump(),
                    "heartbeat": None,
                    "draining": False,
                    "distrusted": None,
                    "state": "dead",
                    "died": at,
                    "learned": None,
                }
                for info, at, _ in dead
            ]
        )
    elif rows or dead:
        show(out, terminal.nodes(rows, distrusted, dead), wide=wide)
    else:
        print("no live nodes")


@app.command()
def tasks(
    state: Annotated[State | None, typer.Option(help="Only tasks in this state.")] = None,
    limit: Annotated[int, typer.Option(help="At most so many of each state, newest first.", min=1)] = 20,
    wide: Wide = False,
    as_json: AsJson = False,
) -> None:
    """List tasks."""
    with Client() as client:
        now = client.ledger.now()
        found = [
            _row(r, now, WIDE_PREVIEW if wide else PREVIEW)
            for s in ([state] if state else State)
            for r in client.ledger.legible(_ids(client, s, limit))
        ]
    if as_json:
        print_json(found)
        return
    numbers = ("try", "left s")
    view = table("id", "state", "node", *numbers, "prompt", numbers=numbers, flexible=("node", "prompt"))
    short = short_ids([row["id"] for row in found])
    for row in found:
        task_id = row["id"] if wide else short[row["id"]]
        left = "-" if row["deadline_in"] is None else f"{row['deadline_in']:.1f}"
        cells = (task_id, row["state"], row["node"] or "-", str(row["attempt"]), left, row["prompt"])
        view.add_row(*map(line, cells))
    show(out, view, wide=wide)


@dead.command("list")
def dead_list(
    limit: Annotated[int, typer.Option(help="At most so many, newest first.", min=1)] = 50,
    wide: Wide = False,
    as_json: AsJson = False,
) -> None:
    """The tasks that failed for good, and why."""
    with Client() as client:
        ids = _ids(client, State.FAILED, limit)
        results = client.ledger.results(ids)
    rows = [{"id": r.id, "reason": r.reason or "-"} for r in results if r]
    if as_json:
        print_json(rows)
        return
    if not rows:
        print("no dead tasks")
        return
    view = table("id", "reason", flexible=("reason",))
    short = short_ids([row["id"] for row in rows])
    for row in rows:
        view.add_row(Text(row["id"] if wide else short[row["id"]]), Text(row["reason"]))
    show(out, view, wide=wide)


@dead.command("retry")
def dead_retry(
    task_ids: Annotated[list[str] | None, typer.Argument(help="Tasks' ids, or their beginnings.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="All of them.")] = False,
    as_json: AsJson = False,
) -> None:
    """Submit dead tasks' work again, as new tasks; the dead ones stay as they are."""
    if bool(task_ids) == everything:
        raise BadSetting("give task ids, or --all")
    with Client() as client:
        ids = client.ledger.ids(State.FAILED) if everything else client.find(task_ids or [])
        again = {}
        for task_id in ids:
            try:
                again[task_id] = client.retry(task_id).id
            except (Unreadable, TaskNotFound) as error:
                if not everything:
                    raise
                err.print(str(error), style="red", markup=False, highlight=False, soft_wrap=True)
    if as_json:
        print_json(again)
        return
    for old, new in again.items():
        print(f"{old} → {new}")


# --- printing


def _print_result(outcome: Result, as_json: bool) -> None:
    if as_json:
        print_json(outcome.model_dump(mode="json"))
    else:
        _print_output(outcome)
        if outcome.reason:
            err.print(f"{outcome.state}: {outcome.reason}", style="red", highlight=False)
        if outcome.receipt:
            r = outcome.receipt
            how = "estimated" if r.energy.estimated else "measured"
            err.print(
                f"{r.node}, {outcome.latency:.2f} s ({'on time' if outcome.on_time else 'late'}), "
                f"{r.completion_tokens} tokens, {r.energy.total:.2f} J {how} ({r.energy.method})",
                style="dim",
                highlight=False,
            )
    if outcome.state is not State.SUCCEEDED:
        raise typer.Exit(1)


def _print_output(outcome: Result) -> None:
    """Its text, or each of its answers; of other kinds of tasks one vector or score per line."""
    output = outcome.output
    if output is None:
        return
    if numbers := [*outcome.vectors, *(output.scores or ())]:
        print("\n".join(map(json.dumps, numbers)), flush=True)
        return
    for index, choice in enumerate(output.choices):
        if output.more:
            err.print(f"answer {index}:", style="dim", highlight=False)
        print(choice.text, flush=True)


def _show_system(client: Client, as_json: bool) -> None:
    counts, totals, live = client.ledger.counts(), client.ledger.totals(), client.ledger.nodes()
    if as_json:
        print_json({"tasks": counts, "totals": totals, "nodes": [info.name for info, _, _ in live]})
        return
    for what, final in (("waiting or at work", False), ("ended", True)):
        found = ", ".join(f"{n} {state}" for state, n in counts.items() if state.final == final)
        out.print(f"{what}: {found}", highlight=False)
    out.print(f"{len(live)} live node(s): {', '.join(i.name for i, _, _ in live) or 'none'}", highlight=False)


def _show_task(client: Client, task_id: str, as_json: bool) -> None:
    record = client.status(task_id)
    if as_json:
        print_json(
            {
                "id": task_id,
                "state": record.state,
                "node": record.node,
                "model": record.model,
                "attempt": record.attempt,
                "strikes": record.strikes,
                "submitted": record.submitted,
                "deadline": record.deadline,
                "result": record.result.model_dump(mode="json") if record.result else None,
            }
        )
        return
    where = f" on {record.node} (attempt {record.attempt})" if record.node else ""
    out.print(f"{record.state}{where}: {record.spec.preview()}", highlight=False, markup=False)


def _ids(client: Client, state: State, limit: int) -> list[str]:
    return client.ledger.ids(state, limit=limit, newest=state.final)


def _row(record: TaskRecord, now: float, width: int) -> dict[str, Any]:
    return {
        "id": record.id,
        "state": str(record.state),
        "node": record.node,
        "attempt": record.attempt,
        "deadline_in": None if record.state.final else record.deadline - now,
        "prompt": record.spec.preview(width),
    }
