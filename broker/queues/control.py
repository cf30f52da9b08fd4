"""Celery's remote control, as our workers answer it. Whoever may publish to the server's `celery.pidbox` sends commands
to every worker at once, so a command here is either a look or a cancellation:

- the looks (`celery inspect`, Flower's pages) are Celery's own;
- `revoke` and `terminate` are the ledger's cancel. Celery's would keep a list of revoked ids in each worker, write the
  result itself, and go on running what runs in a thread: another truth beside the ledger's;
- everything else is refused. A worker that stopped consuming, took one task an hour or had no thread left would still
  beat, and be sent work that it does not do. To stop a node, signal its process (SIGTERM): it drains.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import structlog
from celery.worker import consumer
from celery.worker.control import Panel

from perllm.broker.errors import Unreachable
from perllm.broker.ledger import Ledger, is_id

#: Commands that only look, and Flower's wish for events.
LOOKS = frozenset({
    "active", "active_queues", "clock", "conf", "enable_events", "heartbeat", "ping", "query_task", "registered",
    "report", "reserved", "revoked", "scheduled", "stats", "dump_active", "dump_conf", "dump_reserved",
    "dump_revoked", "dump_schedule", "dump_tasks",
})  # fmt: skip
#: Ids one command may revoke.
MOST_IDS = 10_000

Reply = dict[str, Any]
log = structlog.get_logger(__name__)


class Consumer(consumer.Consumer):  # type: ignore[misc]
    """Celery's, which asks no other worker at its start what it holds for revoked."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options | {"without_mingle": True, "without_gossip": True})


class _Commands(dict[str, Callable[..., Any]]):
    """Celery's looks, our own commands, and a refusal for everything else."""

    def __missing__(self, name: str) -> Callable[..., Reply]:
        def refuse(state: Any, **_: Any) -> Reply:
            log.warning("command_refused", command=str(name)[:40], worker=state.hostname)
            return {"error": f"{str(name)[:40]}: PerLLM's workers do not take this command"}

        return refuse


def restrict(ledger: Ledger | None) -> None:
    """Have this process's worker answer only the commands above, before it begins to consume. Where `ledger` is None
    its tasks are none of the ledger's, and there is nothing to revoke."""
    commands = _Commands({name: command for name, command in Panel.data.items() if name in LOOKS})
    if ledger is not None:
        revocation = _Revocation(ledger)
        commands |= {"revoke": revocation.revoke, "terminate": revocation.revoke}
    Panel.data = commands


class _Revocation:
    """Celery's `revoke` and `terminate`: every worker hears them, whichever is first cancels."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def revoke(self, state: Any, task_id: Any = (), terminate: Any = False, **_: Any) -> Reply:
        """Cancel these tasks, whatever becomes of `terminate` and `signal`: what runs stops at its next step."""
        ids = _ids(task_id)
        try:
            found = self._ledger.revoke(ids)
        except Unreachable as error:
            log.warning("revocation_lost", tasks=len(ids), reason=str(error))
            return {"error": str(error)}
        ended = [i for i, was in zip(ids, found, strict=True) if was is not None and not was.final]
        _tell(state, ended, bool(terminate))
        return {"ok": f"cancelled {len(ended)} of {len(ids)} tasks"}


def _ids(given: Any) -> Sequence[str]:
    """What of a command's argument can be ids of tasks."""
    several = given if isinstance(given, list | tuple) else [given]
    return [i for i in dict.fromkeys(x for x in several if isinstance(x, str)) if is_id(i)][:MOST_IDS]


def _tell(state: Any, ids: Sequence[str], terminated: bool) -> None:
    """Show it in Flower."""
    if ids:
        log.info("tasks_revoked", task_ids=list(ids[:10]), count=len(ids))
    events = state.consumer.event_dispatcher
    if events is not None and events.enabled:
        for task_id in ids:
            events.send("task-revoked", uuid=task_id, terminated=terminated, signum=None, expired=False)
