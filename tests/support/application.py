"""A producer's own Celery application, which knows nothing of PerLLM: its tasks, and its worker.

CELERY_BROKER_URL=... celery -A support.application worker
"""

from __future__ import annotations

import os
from typing import Any

import celery

app = celery.Celery("application", broker=os.environ["CELERY_BROKER_URL"], backend=os.environ["CELERY_BROKER_URL"])
app.conf.worker_pool = "solo"
app.conf.worker_hijack_root_logger = False


@app.task(name="application.ask")
def ask(topic: str) -> str:
    return f"tell me of {topic}"


@app.task(name="application.fields")
def fields(topic: str) -> dict[str, Any]:
    return {"prompt": f"tell me of {topic}", "max_tokens": 2}


@app.task(name="application.count")
def count(answer: dict[str, Any]) -> int:
    return len(answer["output"]["text"].split())


@app.task(name="application.total")
def total(answers: list[Any]) -> int:
    return sum(one if isinstance(one, int) else len(one["output"]["text"].split()) for one in answers)


@app.task(name="application.note")
def note(task_id: str) -> str:
    """An error callback: where it was called with."""
    app.backend.client.rpush("app.noted", task_id)
    return task_id


@app.task(name="application.fails")
def fails(_: Any) -> None:
    raise ValueError("as it does")
