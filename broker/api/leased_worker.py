"""Background work that one API process at a time does, beside serving requests: whichever holds the lease."""

from __future__ import annotations

import threading
from contextlib import suppress
from uuid import uuid4

import structlog

from perllm.broker.api.store import ApiStore
from perllm.broker.connection import reaching
from perllm.broker.errors import PerLLMError
from perllm.broker.functions import Function

#: Seconds a lease lasts without a renewal.
LEASE_TIME = 15.0
#: Seconds between rounds, and after one that failed.
ROUND_PAUSE, FAILURE_PAUSE = 0.25, 2.0

_RENEW = Function(
    "renew",
    """
if redis.call('SET', KEYS[1], ARGV[1], 'NX', 'PX', ARGV[2]) then return 1 end
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
return redis.call('PEXPIRE', KEYS[1], ARGV[2])
""",
    full=True,
)

log = structlog.get_logger(__name__)


class LeaseLost(Exception):
    """Another process holds the lease, or this one is to stop."""


class LeasedWorker:
    """A thread that calls `round` again and again while it holds the lease `api:lease:<name>`."""

    def __init__(self, store: ApiStore, name: str) -> None:
        self._store, self._name = store, name
        self._lease = store.key("lease", name)
        self._holder = uuid4().hex
        self._renew = _RENEW.on(store.client)
        self._woken, self._closing = threading.Event(), False
        self._thread = threading.Thread(target=self._run, name=f"perllm-{name}", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def wake(self) -> None:
        """Begin the next round now."""
        self._woken.set()

    def close(self) -> None:
        """Stop, and let another process go on at once."""
        self._closing = True
        self._woken.set()
        if self._thread.is_alive():
            self._thread.join(timeout=10)

    def round(self) -> None:
        """Do what is to be done now."""
        raise NotImplementedError

    def renew(self) -> None:
        """Take or renew the lease. To be called every few seconds in a long round. Raises LeaseLost."""
        with reaching(self._store.settings):
            if self._closing or not self._renew(keys=[self._lease], args=[self._holder, int(LEASE_TIME * 1000)]):
                raise LeaseLost

    def _run(self) -> None:
        while not self._closing:
            self._woken.clear()
            pause = ROUND_PAUSE
            try:
                self.renew()
                self.round()
            except LeaseLost:
                pause = LEASE_TIME / 5
            except PerLLMError as error:
                log.warning("background_work_delayed", worker=self._name, reason=str(error))
                pause = FAILURE_PAUSE
            except Exception:  # a bug must not end the thread
                log.exception("background_work_failed", worker=self._name)
                pause = FAILURE_PAUSE
            self._woken.wait(pause)
        client = self._store.client
        with suppress(PerLLMError), reaching(self._store.settings):
            if client.get(self._lease) == self._holder.encode():
                client.delete(self._lease)
