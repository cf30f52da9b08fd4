"""`make bench-tools`: calls of tools by the small model, over random schemas: how many keep to theirs.

Every schema (hypothesis, `tests/support/schemas.py`) becomes the one tool of a task that must call it; every second one
is strict. What is refused at the door, by a keyword's path, is counted apart; of the rest each answer is parsed and
validated by `jsonschema` (Draft 2020-12). `finished` are the answers the model ended by itself; the others were brought
to their end before `--tokens` ran out, and say `length`. The peer is the same model with the same prompts and no
grammar: how many of its answers hold a call that keeps to the schema.

With `--random` the model is one of random weights (`tests/support/tiny_gguf.py`), which never ends anything by itself:
faster, and the harder test of the grammar.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jsonschema
import structlog
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from support.schemas import parameters
from support.tiny_gguf import tiny_llama

from benchmarks.common import emit
from perllm.broker import grammar
from perllm.broker.chat import AnswerStream
from perllm.broker.engine.contract import EngineError, Stop
from perllm.broker.errors import InvalidTask
from perllm.broker.messages import TaskSpec
from perllm.broker.settings import load_settings
from perllm.edge_worker.engine import LlamaEngine
from perllm.edge_worker.settings import EdgeSettings

#: Failures that are shown.
SHOWN = 20


def schemas(count: int, seed: int) -> list[dict[str, Any]]:
    """So many of them, always the same of one seed."""
    found: list[dict[str, Any]] = []

    @seeded(seed)
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(parameters())
    def draw(schema: dict[str, Any]) -> None:
        found.append(schema)

    while len(found) < count:  # hypothesis leaves some out
        draw()
    return found[:count]


def spec(number: int, schema: dict[str, Any], tokens: int) -> TaskSpec:
    """The task of one schema."""
    tool = {"name": "fill_in", "description": "Fills in the form", "parameters": schema, "strict": number % 2 == 1}
    fields = {"tools": [tool], "tool_choice": "required", "max_tokens": tokens}
    return TaskSpec.model_validate({"prompt": "Please fill in the form, as you like.", **fields})


class Bench:
    """The engine, and what came of its answers."""

    def __init__(self, engine: LlamaEngine, tokens: int) -> None:
        self._engine, self._tokens = engine, tokens
        self.counts: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self.failures: list[dict[str, Any]] = []
        self.generated = 0

    def run(self, given: Iterable[dict[str, Any]], width: int) -> None:
        with ThreadPoolExecutor(width) as pool:
            for number, outcome in enumerate(pool.map(self._one, *zip(*enumerate(given), strict=True))):
                self.counts[outcome] += 1
                if number % 500 == 499:
                    print(number + 1, dict(self.counts), flush=True)

    def _one(self, number: int, schema: dict[str, Any]) -> str:
        task = spec(number, schema, self._tokens)
        try:
            grammar.check(task)
        except InvalidTask as error:
            self.refused[_keyword(str(error))] += 1
            return "refused"
        try:
            done = self._engine.generate(f"t{number}", task, Stop(3600))
        except EngineError as error:
            self._fail(schema, f"{error}")
            return "invalid"
        self.generated += done.completion_tokens
        calls, reason = done.output.tool_calls, done.output.finish_reason
        if not calls:
            self._fail(schema, f"no call ({reason})")
            return "invalid"
        for call in calls:
            if wrong := _wrong(call.arguments, schema):
                self._fail(schema, f"{reason}: {wrong}")
                return "invalid"
        return "valid" if reason == "tool_calls" else "shortened"

    def _fail(self, schema: dict[str, Any], what: str) -> None:
        print(what, json.dumps(schema), flush=True)
        if len(self.failures) < SHOWN:
            self.failures.append({"schema": schema, "what": what})

    def free(self, given: Iterable[dict[str, Any]], width: int) -> float:
        """The share of calls that keep to their schemas where nothing holds the model to them."""
        with ThreadPoolExecutor(width) as pool:
            kept = list(pool.map(self._free, *zip(*enumerate(given), strict=True)))
        return sum(kept) / len(kept)

    def _free(self, number: int, schema: dict[str, Any]) -> bool:
        task = spec(number, schema, self._tokens)
        prompt = self._engine._pool.get(None).loaded
        assert prompt is not None
        text, form = prompt.prompter.template.render(task)  # type: ignore[union-attr]
        plain = TaskSpec(messages=[{"role": "user", "content": text}], max_tokens=self._tokens)  # type: ignore[list-item]
        try:
            answer = AnswerStream(form)
            answer.push(self._engine.generate(f"f{number}", plain, Stop(3600)).output.text)
        except EngineError:
            return False
        answer.finish()
        return bool(answer.calls) and not any(_wrong(call.arguments, schema) for call in answer.calls)


def _wrong(arguments: str, schema: dict[str, Any]) -> str:
    """What is wrong with them; empty: nothing."""
    try:
        jsonschema.Draft202012Validator(schema).validate(json.loads(arguments))
    except ValueError as error:
        return f"no JSON: {error}: …{arguments[-60:]}"
    except jsonschema.ValidationError as error:
        return f"{error.json_path}: {error.message}"[:300]
    return ""


def _keyword(error: str) -> str:
    """The keyword a refusal names, and why."""
    where, _, why = error.partition("#/")[2].partition(": ")
    return f"{where.rpartition('/')[2]}: {why}"[:120]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--schemas", type=int, default=10_000)
    parser.add_argument("--tokens", type=int, default=256, help="most of an answer")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--random", action="store_true", help="a model of random weights")
    parser.add_argument("--peer", type=int, default=100, help="answers of the peer")
    options = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    with tempfile.TemporaryDirectory(prefix="bench-tools-") as folder:
        model = str(tiny_llama(Path(folder) / "random.gguf", context=8192)) if options.random else None
        engine = LlamaEngine(load_settings(EdgeSettings, model=model, context=4096))
        engine.start()
        given = schemas(options.schemas, options.seed)
        bench = Bench(engine, options.tokens)
        began = time.monotonic()
        bench.run(given, engine.slots)
        seconds = time.monotonic() - began
        figures = _figures(bench, options.schemas)
        if options.peer and not options.random:
            figures["valid_share_without_grammar"] = bench.free(given[: options.peer], engine.slots)
        description = engine.description
        engine.close()
    emit(
        "tools-random" if options.random else "tools",
        figures,
        {},
        model=description,
        tokens=options.tokens,
        seed=options.seed,
        seconds=round(seconds),
        generated=bench.generated,
        refused=dict(bench.refused.most_common(20)),
        failures=bench.failures,
    )


def _figures(bench: Bench, count: int) -> dict[str, Any]:
    counts = bench.counts
    answered = count - counts["refused"]
    return {
        "schemas": count,
        "refused_at_the_door": counts["refused"],
        "answered": answered,
        "valid_share": (counts["valid"] + counts["shortened"]) / max(1, answered),
        "invalid": counts["invalid"],
        "finished_share": counts["valid"] / max(1, answered),
    }


if __name__ == "__main__":
    main()
