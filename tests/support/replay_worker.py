"""`celery -A support.replay_worker worker`: a node with the replaying engine."""

from __future__ import annotations

from perllm.broker.worker.app import worker_app
from perllm.broker.worker.settings import WorkerSettings
from support.replay import ReplayEngine

app = worker_app("edge", WorkerSettings, ReplayEngine)
