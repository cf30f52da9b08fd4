"""The peer `benchmarks.dispatch` measures: an ordinary Celery queue and worker with a task that does nothing."""

from __future__ import annotations

import os
import time

from celery import Celery

from perllm.broker.settings import load_settings

_url = load_settings().celery_url
app = Celery("plain", broker=_url, backend=_url)
app.conf.update(
    task_default_queue="plain",
    worker_pool="threads",
    worker_concurrency=int(os.environ.get("PERLLM_SLOTS", "8")),
    worker_hijack_root_logger=False,
    broker_connection_retry_on_startup=True,
    worker_send_task_events=os.environ.get("PLAIN_EVENTS") == "1",
)


@app.task(name="plain.stamp")  # type: ignore[untyped-decorator]
def stamp(_prompt: str) -> str:
    """The machine's monotonic clock when the task began, ns."""
    return str(time.monotonic_ns())
