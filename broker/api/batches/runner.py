"""Runs batches side by side.

Each batch works for a few milliseconds at a time, tenants in turn and each tenant's batches in turn, so that no batch
waits for all lines of another. What is done for one batch is in `steps`. One thread of one API process does it at a
time, under a lease.
"""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Iterator
from operator import itemgetter

import structlog

from perllm.broker.api.batches.steps import BatchSteps, CannotRun, OnEnd
from perllm.broker.api.batches.store import BatchDocument, Batches
from perllm.broker.api.files.store import ContentMissing, Files
from perllm.broker.api.keys import Keys
from perllm.broker.api.leased_worker import ROUND_PAUSE, LeasedWorker, LeaseLost
from perllm.broker.api.settings import ApiSettings
from perllm.broker.api.store import ApiStore
from perllm.broker.errors import StoreUnavailable, Unreachable
from perllm.broker.ledger import Ledger

#: Batches of one tenant, and of all, that are worked on at once.
TENANT_CONCURRENCY, CONCURRENCY = 2, 32
#: Times in a row that a batch may meet a bug of ours before it is given up, and seconds before the next try.
MAX_FAILURES, FAILURE_PAUSE = 3, 5.0
#: Seconds between removals of expired files, and of orphaned content.
EXPIRY_PERIOD, ORPHAN_PERIOD = 60.0, 3600.0

log = structlog.get_logger(__name__)


class BatchRunner(LeasedWorker):
    """`on_end` is called at every batch's end, once or more."""

    def __init__(
        self,
        settings: ApiSettings,
        store: ApiStore,
        ledger: Ledger,
        files: Files,
        batches: Batches,
        keys: Keys,
        on_end: OnEnd,
    ) -> None:
        super().__init__(store, "batches")
        self._ledger, self._files, self._batches = ledger, files, batches
        self._steps = BatchSteps(settings, store, ledger, files, batches, keys, on_end, self.renew)
        self._working: OrderedDict[str, deque[tuple[BatchDocument, Iterator[None]]]] = OrderedDict()  # by tenant
        self._expired_at = self._orphans_at = float("-inf")  # when files were last removed

    def look_at(self, batch_id: str) -> None:
        """There is something to do about this batch, now."""
        self._steps.make_due(batch_id)
        self.wake()

    # --- batches side by side

    def round(self) -> None:
        """Work on every batch until each waits for something, and remove old files."""
        self._ledger.expire()  # with no scheduler and no worker there, who asks now and then is to find it so, too
        try:
            self._adopt()
            adopted = time.monotonic()
            while self._working:
                for tenant in list(self._working):
                    self._work(tenant)
                if time.monotonic() > adopted + ROUND_PAUSE:
                    self.renew()
                    self._adopt()
                    adopted = time.monotonic()
        finally:
            self._working.clear()  # what was begun begins anew
        if time.monotonic() - self._expired_at > EXPIRY_PERIOD:
            self._files.sweep(self._batches.inputs_in_use())
            self._expired_at = time.monotonic()
        if time.monotonic() - self._orphans_at > ORPHAN_PERIOD:
            self._orphans_at = time.monotonic()
            for _ in self._files.sweep_orphans({batch.id for batch in self._batches.open()}):
                self.renew()

    def _adopt(self) -> None:
        """Begin to work on the batches that are due, those that have waited longest first."""
        working = {batch.id for queue in self._working.values() for batch, _ in queue}
        unfinished = self._batches.open()
        self._steps.keep_only(unfinished)
        waiting = [(self._steps.progress(b.id).due, b.created, b) for b in unfinished if b.id not in working]
        for due, _, batch in sorted(waiting, key=itemgetter(0, 1)):
            if due > time.monotonic() or len(working) >= CONCURRENCY:
                return
            if len(self._working.get(batch.tenant, ())) < TENANT_CONCURRENCY:
                self._working.setdefault(batch.tenant, deque()).append((batch, self._steps.advance(batch)))
                working.add(batch.id)

    def _work(self, tenant: str) -> None:
        """A slice of one of the tenant's batches."""
        queue = self._working[tenant]
        batch, steps = queue.popleft()
        self._steps.slice.begin()
        if self._step(batch, steps):
            queue.append((batch, steps))
        elif not queue:
            del self._working[tenant]

    def _step(self, batch: BatchDocument, steps: Iterator[None]) -> bool:
        """Whether there is more to do for the batch now. Whatever goes wrong with it is no other's concern."""
        try:
            next(steps)
            return True
        except StopIteration:
            self._steps.progress(batch.id).failures = 0
        except (LeaseLost, Unreachable):
            raise
        except CannotRun as error:
            self._steps.fail(batch, *error.args)
        except ContentMissing as error:
            self._steps.fail(batch, "no_file", str(error))
        except FileNotFoundError:
            self._steps.fail(batch, "no_file", f"the input file {batch.input_file_id} is gone")
        except StoreUnavailable as error:  # nothing is lost: it goes on when the store does
            log.warning("batch_delayed", batch=batch.id, reason=str(error))
            self._steps.progress(batch.id).due = time.monotonic() + FAILURE_PAUSE
            current = self._batches.documents.get(batch.id)
            if current and current.status == "validating" and self._store.now() > current.expires:
                self._steps.fail(batch, "unavailable", "the input file could not be read within the window")
        except Exception:
            log.exception("batch_failed", batch=batch.id)
            progress = self._steps.progress(batch.id)
            progress.due = time.monotonic() + FAILURE_PAUSE
            progress.failures += 1
            if progress.failures == MAX_FAILURES:
                self._steps.fail(batch, "internal", "an internal error; it is in the server's log")
        return False
