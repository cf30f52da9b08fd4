"""What is kept of batches."""

from __future__ import annotations

from typing import Any, Literal, cast

from pydantic import Field

from perllm.broker.api.document_store import Document, DocumentStore
from perllm.broker.connection import reaching
from perllm.broker.ledger import Ledger
from perllm.broker.settings import Settings

Status = Literal["validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"]


#: Statuses a batch does not leave.
ENDED = ("failed", "completed", "expired", "cancelled")


class BatchDocument(Document):
    """A batch. Times are in s since the epoch; `times` has one for each status it was in."""

    endpoint: str
    input_file_id: str
    window: str
    expires: float
    metadata: dict[str, str] | None = None
    max_value: float = 1.0  # of a line, as the key it was made with says
    status: Status = "validating"
    times: dict[str, float] = Field(default_factory=dict)
    total: int = 0
    completed: int = 0
    failed: int = 0
    errors: list[dict[str, Any]] = Field(default_factory=list)  # the first of its bad lines
    parts: int = 0  # of its results, collected so far
    overdue: bool = False  # some line was not done within the window
    key: str | None = None  # the id of the key it was made with, whose limits hold for its lines
    output_lasts: float | None = None  # s that its output files are kept; None: as all files
    output_file_id: str | None = None
    error_file_id: str | None = None

    def entered(self, status: Status, at: float, **changes: Any) -> BatchDocument:
        """The same in another status."""
        return self.model_copy(update={"status": status, "times": {**self.times, status: at}, **changes})


class Batches:
    """Every tenant's batches.

    api:batches-open        set     those that have not ended; with :<tenant>, a tenant's
    api:batch-marks:<id>    string  a byte per line of its input: what became of it (`batch_runner`)
    """

    def __init__(self, settings: Settings, ledger: Ledger) -> None:
        self._settings, self._ledger = settings, ledger
        self.shelf: DocumentStore[BatchDocument] = DocumentStore(settings, ledger, "batch", BatchDocument)
        self._open = f"{ledger.prefix}api:batches-open"
        self.marks_key = f"{ledger.prefix}api:batch-marks:"

    def open(self) -> list[BatchDocument]:
        """The batches that have not ended. One that is gone, or cannot be read, is no longer looked for."""
        with reaching(self._settings):
            ids = [i.decode(errors="replace") for i in cast("set[bytes]", self._ledger.client.smembers(self._open))]
        found = self.shelf.many(ids)
        if gone := set(ids) - {batch.id for batch in found}:
            with reaching(self._settings):
                self._ledger.client.srem(self._open, *gone)
        return found

    def inputs_in_use(self) -> set[str]:
        """Input files of the batches that have not ended."""
        return {batch.input_file_id for batch in self.open()}

    def count_open(self, tenant: str) -> int:
        """How many of a tenant's batches have not ended."""
        with reaching(self._settings):
            return self._ledger.client.scard(f"{self._open}:{tenant}")

    def add(self, batch: BatchDocument) -> None:
        """A new batch, to be run."""
        self.shelf.add(batch)
        with reaching(self._settings):
            pipe = self._ledger.client.pipeline()
            pipe.sadd(self._open, batch.id)
            pipe.sadd(f"{self._open}:{batch.tenant}", batch.id)
            pipe.execute()

    def close(self, batch: BatchDocument) -> None:
        """A batch has ended."""
        with reaching(self._settings):
            pipe = self._ledger.client.pipeline()
            pipe.srem(self._open, batch.id)
            pipe.srem(f"{self._open}:{batch.tenant}", batch.id)
            pipe.delete(f"{self.marks_key}{batch.id}")
            pipe.execute()

    def cancel(self, identity: str, tenant: str) -> BatchDocument | None:
        """Ask for an end; one that is ending or has ended stays as it is."""
        now = self._ledger.now()

        def ask(batch: BatchDocument) -> BatchDocument | None:
            running = batch.tenant == tenant and batch.status in ("validating", "in_progress")
            return batch.entered("cancelling", now) if running else None

        batch = self.shelf.change(identity, ask)
        return batch if batch is not None and batch.tenant == tenant else None


def shown(batch: BatchDocument) -> dict[str, Any]:
    """The batch as the API shows it."""

    def at(status: str) -> int | None:
        return int(batch.times[status]) if status in batch.times else None

    return {
        "id": batch.id,
        "object": "batch",
        "endpoint": batch.endpoint,
        "errors": {"object": "list", "data": batch.errors} if batch.errors else None,
        "input_file_id": batch.input_file_id,
        "completion_window": batch.window,
        "status": batch.status,
        "output_file_id": batch.output_file_id,
        "error_file_id": batch.error_file_id,
        "created_at": int(batch.created),
        "in_progress_at": at("in_progress"),
        "expires_at": int(batch.expires),
        "finalizing_at": at("finalizing"),
        "completed_at": at("completed"),
        "failed_at": at("failed"),
        "expired_at": at("expired"),
        "cancelling_at": at("cancelling"),
        "cancelled_at": at("cancelled"),
        "request_counts": {"total": batch.total, "completed": batch.completed, "failed": batch.failed},
        "metadata": batch.metadata,
    }
