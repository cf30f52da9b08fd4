"""Work that goes on beside the requests, and that only one API process does at a time."""

from __future__ import annotations

import threading
from contextlib import suppress
from uuid import uuid4

import structlog

from broker.connection import reaching
from broker.errors import PerLLMError
from broker.functions import Function
from broker.ledger import Ledger
from broker.settings import Settings

#: Seconds the lease on a duty lasts without a renewal.
LEASE = 15.0
#: Seconds between rounds, and after something went wrong.
PAUSE, AFTER_FAILURE = 0.25, 2.0

_HOLD = Function(
    "hold",
    """
if redis.call('SET', KEYS[1], ARGV[1], 'NX', 'PX', ARGV[2]) then return 1 end
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
return redis.call('PEXPIRE', KEYS[1], ARGV[2])
""",
    full=True,
)

log = structlog.get_logger(__name__)


class Deposed(Exception):
    """Another process has the duty now, or this one is to stop."""


class Duty:
    """A thread that does `round` again and again while it holds the lease `api:duty:<name>`."""

    def __init__(self, settings: Settings, ledger: Ledger, name: str) -> None:
        self._settings, self._ledger, self._name = settings, ledger, name
        self._lease = f"{ledger.prefix}api:duty:{name}"
        self._holder = uuid4().hex
        self._hold_script = _HOLD.on(ledger.client)
        self._woken, self._closing = threading.Event(), False
        self._thread = threading.Thread(target=self._run, name=f"perllm-{name}", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def wake(self) -> None:
        """There is something to do."""
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

    def hold(self) -> None:
        """Renew the lease. To be called every few seconds in a long round. Raises Deposed."""
        with reaching(self._settings):
            if self._closing or not self._hold_script(keys=[self._lease], args=[self._holder, int(LEASE * 1000)]):
                raise Deposed

    def _run(self) -> None:
        while not self._closing:
            self._woken.clear()
            pause = PAUSE
            try:
                self.hold()
                self.round()
            except Deposed:
                pause = LEASE / 5
            except PerLLMError as error:
                log.warning("duty_delayed", duty=self._name, reason=str(error))
                pause = AFTER_FAILURE
            except Exception:  # a bug must not end the duty
                log.exception("duty_failed", duty=self._name)
                pause = AFTER_FAILURE
            self._woken.wait(pause)
        with suppress(PerLLMError), reaching(self._settings):
            if self._ledger.client.get(self._lease) == self._holder.encode():
                self._ledger.client.delete(self._lease)
