"""Celery's events (what Flower shows, and what the cloud benchmark times aborts by) pass through our transport."""

from __future__ import annotations

import threading

from support.wait import eventually

from perllm.broker.local.server import EmbeddedServer
from perllm.broker.queues.app import make_app
from perllm.broker.settings import Settings


def test_events_reach_those_who_listen(valkey: EmbeddedServer) -> None:
    app = make_app(Settings.model_validate({"redis_url": valkey.url}))
    heard = threading.Event()

    def listen() -> None:
        with app.connection_for_read() as connection:
            receiver = app.events.Receiver(connection, handlers={"worker-heartbeat": lambda _: heard.set()})
            for _ in receiver.itercapture(limit=None, timeout=None, wakeup=False):
                if heard.is_set():
                    return

    threading.Thread(target=listen, daemon=True).start()
    with app.connection_for_write() as connection, app.events.Dispatcher(connection) as dispatcher:

        def told() -> bool:  # again and again, until the listener has subscribed
            dispatcher.send("worker-heartbeat")
            return heard.wait(0.05)

        eventually(told, "an event was heard")
