"""`perllm embed`: vectors of texts, or of each line of a file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic_core import from_json

from perllm.broker.cli import submit_file
from perllm.broker.cli.terminal import AsJson, err, print_json
from perllm.broker.client import Client
from perllm.broker.errors import InvalidTask
from perllm.broker.messages import Result, State
from perllm.broker.openai.embeddings import EMBEDDINGS

app = typer.Typer()

#: Deadline of a task unless given, s.
_DEADLINE = 3600.0


@app.command()
def embed(
    what: Annotated[
        list[str],
        typer.Argument(
            help="Texts; or a .jsonl file, a line of which is a text in quotes, an object with `input` (or `text`) "
            "and a `custom_id` if you like, or a request in OpenAI Batch format."
        ),
    ],
    model: Annotated[str | None, typer.Option(help="A model on offer (`perllm nodes`).")] = None,
    dimensions: Annotated[int | None, typer.Option(help="Numbers of a vector; the model's unless given.")] = None,
    deadline: Annotated[float | None, typer.Option(help="Seconds from now; 3600 unless given.")] = None,
    value: Annotated[float | None, typer.Option(help="Weight against other tasks; 1 unless given.")] = None,
    service: Annotated[str | None, typer.Option(help="Service class the tasks belong to.")] = None,
    output: Annotated[Path | None, typer.Option(help="The vectors go here; of a file, FILE.output.jsonl.")] = None,
    errors: Annotated[Path | None, typer.Option(help="With a file: bad lines and failures go here.")] = None,
    batch: Annotated[
        str | None, typer.Option(help="With a file: a name; embedding under it again goes on, nothing runs twice.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Embed texts, or every line of a JSONL file, and wait for the vectors."""
    given = {"model": model, "dimensions": dimensions, "deadline": deadline or _DEADLINE, "value": value}
    fields = {k: v for k, v in {**given, "service": service}.items() if v is not None}
    with Client() as client:
        if what[0].endswith(".jsonl"):
            if len(what) > 1:
                raise InvalidTask("give one file, or texts")
            path = Path(what[0])
            again = f"perllm embed {path} --batch"
            report = submit_file.run(
                client, path, fields, batch, True, output, errors, err, as_requests=as_requests, again=again
            )
            if as_json:
                print_json(report)
            raise typer.Exit(0 if report["errors"] == 0 else 1)
        if errors or batch:
            raise InvalidTask("--errors and --batch go with a .jsonl file")
        handle = client.submit_many([{"kind": "embed", "inputs": what, **fields}])[0]
        _show(handle.result(), output, as_json)


def as_requests(lines: Iterable[str]) -> Iterator[str]:
    """Lines of a file of texts as requests in OpenAI Batch format. What is no such line is left as it is."""
    for number, line in enumerate(lines, start=1):
        given: Any = None
        with suppress(ValueError):  # it will be said where it is read
            given = from_json(line, allow_inf_nan=False) if line.strip() else None
        if isinstance(given, str):
            given = {"input": given}
        if not isinstance(given, dict) or "body" in given:
            yield json.dumps({"url": EMBEDDINGS, **given}) if isinstance(given, dict) else line
            continue
        custom_id = given.pop("custom_id", f"line-{number}")
        body = {"input": given.pop("text"), **given} if "text" in given else given
        yield json.dumps({"custom_id": custom_id, "url": EMBEDDINGS, "body": body})


def _show(result: Result, output: Path | None, as_json: bool) -> None:
    lines = (json.dumps(vector) + "\n" for vector in result.vectors)
    if output is not None and result.state is State.SUCCEEDED:
        submit_file.write(output, lines)
    elif as_json:
        print_json({**result.model_dump(mode="json", exclude={"output"}), "embeddings": result.vectors})
    else:
        for line in lines:
            print(line, end="")
    _print_outcome(result)
    if result.state is not State.SUCCEEDED:
        raise typer.Exit(1)


def _print_outcome(result: Result) -> None:
    if result.reason:
        err.print(f"{result.state}: {result.reason}", style="red", markup=False, highlight=False)
    if (receipt := result.receipt) is not None:
        how = "estimated" if receipt.energy.estimated else "measured"
        err.print(
            f"{receipt.node}, {receipt.model}, {result.latency:.2f} s ({'on time' if result.on_time else 'late'}), "
            f"{len(result.vectors)} vector(s) of {receipt.prompt_tokens} tokens, {receipt.energy.total:.2f} J {how} "
            f"({receipt.energy.method})",
            style="dim",
            highlight=False,
        )
