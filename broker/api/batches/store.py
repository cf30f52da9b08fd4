"""Batches as they are stored, and as the API shows them."""

from __future__ import annotations

from typing import Any, Literal, cast

from pydantic import Field

from perllm.broker.api.document_store import Document, DocumentStore
from perllm.broker.api.store import ApiStore
from perllm.broker.connection import reaching

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
    origin: dict[str, str] = Field(default_factory=dict)  # fields by which its tasks are traced to its request
    output_lasts: float | None = None  # s that its output files are kept; None: as all files
    output_file_id: str | None = None
    error_file_id: str | None = None

    def with_status(self, status: Status, at: float, **changes: Any) -> BatchDocument:
        """The same in another status."""
        return self.model_copy(update={"status": status, "times": {**self.times, status: at}, **changes})


class Batches:
    """Every tenant's batches.

    api:batches-open         set     those that have not ended; with :<tenant>, a tenant's
    api:batch-marks:<batch>  string  a byte per line of its input: what became of it (`lines.Mark`)
    """

    def __init__(self, store: ApiStore) -> None:
        self._store, self._client, self._settings = store, store.client, store.settings
        self.documents: DocumentStore[BatchDocument] = DocumentStore(store, "batch", BatchDocument)
        self._open = store.key("batches-open")

    def open(self) -> list[BatchDocument]:
        """The batches that have not ended. One that is gone, or cannot be read, is no longer looked for."""
        with reaching(self._settings):
            ids = [i.decode(errors="replace") for i in cast("set[bytes]", self._client.smembers(self._open))]
        found = self.documents.many(ids)
        if gone := set(ids) - {batch.id for batch in found}:
            with reaching(self._settings):
                self._client.srem(self._open, *gone)
        return found

    def inputs_in_use(self) -> set[str]:
        """Input files of the batches that have not ended."""
        return {batch.input_file_id for batch in self.open()}

    def count_open(self, tenant: str) -> int:
        """How many of a tenant's batches have not ended."""
        with reaching(self._settings):
            return self._client.scard(f"{self._open}:{tenant}")

    def add(self, batch: BatchDocument) -> None:
        """A new batch, to be run."""
        self.documents.add(batch)
        with reaching(self._settings):
            pipe = self._client.pipeline()
            pipe.sadd(self._open, batch.id)
            pipe.sadd(f"{self._open}:{batch.tenant}", batch.id)
            pipe.execute()

    def close(self, batch: BatchDocument) -> None:
        """Look for a batch no longer: it has ended."""
        with reaching(self._settings):
            pipe = self._client.pipeline()
            pipe.srem(self._open, batch.id)
            pipe.srem(f"{self._open}:{batch.tenant}", batch.id)
            pipe.delete(self._marks_key(batch))
            pipe.execute()

    def marks(self, batch: BatchDocument) -> bytearray:
        """What became of each of its lines, as last saved; empty before the first time."""
        with reaching(self._settings):
            return bytearray(cast("bytes | None", self._client.get(self._marks_key(batch))) or b"")

    def save_marks(self, batch: BatchDocument, marks: bytearray) -> None:
        """Replace them."""
        with reaching(self._settings):
            self._client.set(self._marks_key(batch), bytes(marks))

    def _marks_key(self, batch: BatchDocument) -> str:
        return self._store.key("batch-marks", batch.id)

    def cancel(self, identity: str, tenant: str) -> BatchDocument | None:
        """Ask for an end; one that is ending or has ended stays as it is."""
        now = self._store.now()

        def cancelling(batch: BatchDocument) -> BatchDocument | None:
            running = batch.tenant == tenant and batch.status in ("validating", "in_progress")
            return batch.with_status("cancelling", now) if running else None

        batch = self.documents.change(identity, cancelling)
        return batch if batch is not None and batch.tenant == tenant else None


def batch_object(batch: BatchDocument) -> dict[str, Any]:
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
