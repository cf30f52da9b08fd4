"""`celery -A support.stuck_worker worker`: an edge node that hangs in native code, with the interpreter free, as
soon as a prompt says so."""

from __future__ import annotations

import ctypes

from perllm.broker.worker import node
from perllm.broker.worker.app import worker_app
from perllm.edge_worker import engine
from perllm.edge_worker.batch import Answer, Batch
from perllm.edge_worker.engine import LlamaEngine
from perllm.edge_worker.llama import Logits
from perllm.edge_worker.settings import EdgeSettings

engine.STUCK_SECONDS = 1.0
engine.STUCK_FACTOR = 0.0
node.STUCK_CONFIRMED = 0.5
_take = Batch._take


def _hanging(batch: Batch, answer: Answer, token: int, logits: Logits) -> None:
    if answer.request.spec.prompt == "HANG":
        ctypes.CDLL(None).sleep(1000)
    _take(batch, answer, token, logits)


Batch._take = _hanging  # type: ignore[method-assign]
app = worker_app("edge", EdgeSettings, LlamaEngine)
