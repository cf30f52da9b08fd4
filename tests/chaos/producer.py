"""A producer as a process: `python -m chaos.producer NAME FOLDER SEED REAL_MODEL [URL]`, until SIGTERM. With a URL it
hands its tasks in to the HTTP API there.

It keeps some backlog in the ledger, repeats what it was not told is accepted, cancels a few tasks, and now and then
looks at a result. What it does and is told goes to a file, a line each, written at once, so that a kill loses none of
it: `try KEY...`, `ok BEGUN TIME ID=KEY...`, `saw BEGUN TIME ID DIGEST`.
"""

from __future__ import annotations

import random
import signal
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any, cast

import httpx
from support.raw import prefix_of, redis_of
from support.replay import FAULT, MODEL, POISON

from chaos.checker import AMPLE
from chaos.history import Saw, Told
from chaos.observer import digest
from perllm import Client, State
from perllm.broker.connection import reaching
from perllm.broker.errors import InvalidTask, PerLLMError, Unreachable

#: Seconds most tasks are given.
DEADLINE = 1.5 * AMPLE
#: Tasks waiting in the ledger beyond which it rests.
BACKLOG = 300
#: Most tasks per call.
BATCH = 25
#: How long answers are, tokens.
LENGTHS = (1, 2, 4, 8, 16)
#: Tasks that kill the workers they run on: this one, and so many of all.
FIRST_POISON, POISONED = "producer-1.1.200", 1 / 8000


class Producer:
    """See the module's head. `real_model` is what the node with a real engine offers, empty without one."""

    def __init__(self, name: str, folder: Path, seed: str, real_model: str, url: str = "") -> None:
        self._name = name
        self._http = httpx.Client(base_url=url, timeout=5.0) if url else None
        self._random = random.Random(seed)
        self._real_model = real_model
        self._record = (folder / f"{name}.record").open("ab", buffering=0)
        self._client = Client()
        self._mine: deque[str] = deque(maxlen=500)
        self._count = 0
        self._stopping = False
        signal.signal(signal.SIGTERM, self._stop)

    def _stop(self, *_: object) -> None:
        self._stopping = True

    def run(self) -> None:
        while not self._stopping:
            try:
                if self._client.ledger.counts()[State.PENDING] < BACKLOG:
                    self._submit()
                else:
                    time.sleep(0.02)
                self._look()
            except Unreachable:
                time.sleep(0.1)

    def _submit(self) -> None:
        tasks = [self._task() for _ in range(self._random.randint(1, BATCH))]
        self._note("try", *(t["idempotency_key"] for t in tasks))
        while not self._stopping:
            begun = time.time()
            try:
                ids = self._hand_in(tasks)
            except (Unreachable, httpx.TransportError):
                time.sleep(0.1)
                continue
            except InvalidTask:  # the node with the real model is away: nobody serves it at present
                return
            pairs = [f"{i}={t['idempotency_key']}" for i, t in zip(ids, tasks, strict=True)]
            self._note("ok", f"{begun:.6f}", f"{time.time():.6f}", *pairs)
            self._mine.extend(ids)
            if self._random.random() < 0.2:
                self._client.ledger.cancel(self._random.choice(ids))
            return

    def _hand_in(self, tasks: list[dict[str, Any]]) -> list[str]:
        """The tasks' ids, once they are accepted."""
        if self._http is None:
            return [handle.id for handle in self._client.submit_many(tasks)]
        answer = self._http.post("/v1/tasks", json={"tasks": tasks})
        if answer.status_code in (400, 404):
            raise InvalidTask(answer.text)
        if answer.status_code == 503:
            raise Unreachable(answer.text)
        answer.raise_for_status()
        return [task["id"] for task in answer.json()["data"]]

    def _task(self) -> dict[str, Any]:
        self._count += 1
        key = f"{self._name}.{self._count}"
        dice = self._random.random()
        task = {
            "prompt": f"{key} why is the sky blue?",
            "idempotency_key": key,
            "deadline": DEADLINE,
            "max_tokens": self._random.choice(LENGTHS),
            "model": MODEL,
            "service": self._random.choice(("chat", "batch")),
            "stream": self._random.random() < 0.02,
        }
        if self._http is None:
            task["tenant"] = self._random.choice(("us", "them"))
        if key == FIRST_POISON or dice > 1 - POISONED:
            task["prompt"] += POISON
        elif dice < 0.01:
            task["prompt"] += FAULT
        elif dice < 0.03:
            task["deadline"] = self._random.uniform(0.2, 2.0)
        elif dice < 0.04 and self._real_model:
            task |= {"model": self._real_model, "max_tokens": 4}
        return task

    def _look(self) -> None:
        if self._mine:
            task_id, begun = self._random.choice(self._mine), time.time()
            with reaching(self._client.settings):
                result = redis_of(self._client.ledger).get(f"{prefix_of(self._client.ledger)}result:{task_id}")
            if result:
                self._note("saw", f"{begun:.6f}", f"{time.time():.6f}", task_id, digest(cast("bytes", result)))

    def _note(self, *words: str) -> None:
        self._record.write((" ".join(words) + "\n").encode())


def read_records(folder: Path) -> tuple[set[str], list[Told], list[Saw]]:
    """What all producers in a folder have tried, were told, and saw."""
    tried: set[str] = set()
    told: list[Told] = []
    saw: list[Saw] = []
    for path in folder.glob("*.record"):
        for line in path.read_text().splitlines():
            match line.split(" "):
                case ["try", *keys]:
                    tried.update(keys)
                case ["ok", begun, at, *pairs]:
                    told += [Told(*pair.split("=", 1), float(begun), float(at)) for pair in pairs]
                case ["saw", begun, at, task_id, seen]:
                    saw.append(Saw(task_id, seen, float(begun), float(at)))
    return tried, told, saw


if __name__ == "__main__":
    try:
        Producer(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:]).run()
    except PerLLMError as error:
        sys.exit(f"error: {error}")
