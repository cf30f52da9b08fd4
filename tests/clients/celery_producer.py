"""Celery as a bare producer: sends by name, waits, groups, chains, a chord, and revokes."""

from __future__ import annotations

import os
from typing import Any

from celery import Celery, chain, chord, group
from celery.exceptions import TaskRevokedError

app = Celery(broker=os.environ["CELERY_BROKER_URL"], backend=os.environ["CELERY_BROKER_URL"])
PATIENCE = 120  # s


def generate(**fields: Any) -> Any:
    return app.signature("perllm.generate", kwargs={"max_tokens": 8, "deadline": 100, **fields}, queue="inbox")


answer = app.send_task("perllm.generate", kwargs={"prompt": "Why is the sky blue?", "max_tokens": 8}, queue="inbox")
result = answer.get(PATIENCE)
assert answer.state == "SUCCESS"
assert result["output"]["text"]
assert result["receipt"]["node"]

vectors = app.send_task("perllm.embed", kwargs={"inputs": ["the sky", "the sea"]}, queue="inbox").get(PATIENCE)
assert len(vectors["output"]["vectors"]) == 2

texts = [generate(prompt=f"Say {n}.") for n in range(2)]
embed = app.signature("perllm.embed", kwargs={"inputs": ["the sky"]}, queue="inbox")
assert len(chord(texts, embed)().get(PATIENCE)["output"]["vectors"]) == 3

assert len(group(generate(prompt=f"Say {n}.") for n in range(3))().get(PATIENCE)) == 3
assert chain(generate(prompt="Name a river."), generate(prompt="Where is it?"))().get(PATIENCE)["output"]["text"]
summary = chord([generate(prompt=f"Say {n}.") for n in range(2)], generate(prompt="Summarise:"))().get(PATIENCE)
assert summary["output"]["text"]

for terminate in (False, True):
    waiting = generate(prompt="later", deadline=700).apply_async(countdown=600)
    app.control.revoke(waiting.id, terminate=terminate)
    try:
        waiting.get(PATIENCE)
    except TaskRevokedError:
        assert waiting.state == "REVOKED"
    else:
        raise AssertionError("a revoked task has a result")

wrong = generate(prompt="hi", temperature=-1).apply_async()
try:
    wrong.get(PATIENCE)
except Exception as error:
    assert "temperature" in str(error)
else:
    raise AssertionError("a wrong field was accepted")
assert wrong.state == "FAILURE"
