"""Celery's events, as Flower shows them, sent by a thread of their own.

Celery 5.7 publishes them from the loop that also fetches messages, in a trip to the server each time round. So a worker
whose server is 15 ms away would begin no more than some thirty tasks in a second, whatever its slots.
"""

from __future__ import annotations

import threading
from typing import Any

from celery.app import events
from celery.events import dispatcher

#: Seconds in which events gather: nobody looks sooner, and each trip costs as much as one of a task's own.
GATHER = 0.05
#: Events kept while the server does not take them; beyond that the oldest are dropped.
MOST_KEPT = 10_000


class Events(events.Events):  # type: ignore[misc]
    """Celery's, with the dispatcher below."""

    dispatcher_cls = f"{__name__}:Dispatcher"


class Dispatcher(dispatcher.EventDispatcher):  # type: ignore[misc]
    """Celery's, whose buffered events (a worker's of its tasks) a thread sends: who makes one never waits."""

    def __init__(self, *args: Any, buffer_group: Any = None, **options: Any) -> None:
        self._some, self._no_more = threading.Event(), threading.Event()
        if buffer_group:
            options |= {"buffer_group": buffer_group, "buffer_limit": MOST_KEPT, "on_send_buffered": self._some.set}
        super().__init__(*args, **options)
        if buffer_group:
            threading.Thread(target=self._send_until_closed, name="perllm-events", daemon=True).start()

    def _send_until_closed(self) -> None:
        while not self._no_more.is_set():
            self._some.wait()
            self._some.clear()
            self._no_more.wait(GATHER)
            while len(self._outbound_buffer) > MOST_KEPT:
                self._outbound_buffer.popleft()
            self.flush()

    def close(self) -> None:
        """See Celery's."""
        self._no_more.set()
        self._some.set()
        super().close()
