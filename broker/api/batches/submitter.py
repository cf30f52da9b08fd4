"""Lines become tasks: checked as all tasks are, submitted as their key's limits and their tenant's quota leave room."""

from __future__ import annotations

import structlog

from perllm.broker.api.batches.lines import OPEN, task_id
from perllm.broker.api.batches.progress import Progress
from perllm.broker.api.batches.store import BatchDocument
from perllm.broker.api.keys import Keys
from perllm.broker.api.settings import ApiSettings
from perllm.broker.errors import InvalidTask
from perllm.broker.ledger import Ledger, weight
from perllm.broker.messages import TaskSpec
from perllm.broker.openai.batch_file import BadLine, Line
from perllm.broker.openai.translation import seconds_left
from perllm.broker.validation import TaskValidator

#: Lines, and bytes of them, submitted at once.
GROUP_LINES, GROUP_BYTES = 100, 1 << 20

log = structlog.get_logger(__name__)


class SubmitBuffer:
    """Valid lines gathered to be submitted together. `full`: there was no room for all of the last ones, so no more are
    gathered."""

    def __init__(self) -> None:
        self.lines: list[tuple[int, TaskSpec]] = []
        self.full = False
        self._size = 0

    def add(self, row: int, spec: TaskSpec) -> bool:
        """Gather a line; whether it is time to submit."""
        if self.full:
            return False
        self.lines.append((row, spec))
        self._size += spec.text_bytes()
        return len(self.lines) >= GROUP_LINES or self._size > GROUP_BYTES

    def take(self) -> list[tuple[int, TaskSpec]]:
        """The lines gathered, which are in the buffer no longer."""
        taken, self.lines, self._size = self.lines, [], 0
        return taken


class LineSubmitter:
    """Checks and submits lines."""

    def __init__(self, settings: ApiSettings, ledger: Ledger, keys: Keys) -> None:
        self._settings, self._ledger, self._keys = settings, ledger, keys
        self._validator = TaskValidator(settings, ledger)

    def check(self, batch: BatchDocument, line: Line | BadLine, now: float) -> TaskSpec | BadLine:
        """The line's task, its deadline within the batch's window, or what is wrong with it."""
        if isinstance(line, BadLine):
            return line
        fields = dict(line.fields)
        left = max(0.001, batch.expires - now)
        try:
            deadline = fields.get("deadline")
            if isinstance(deadline, str):
                deadline = seconds_left(deadline, now)
            if deadline is None:
                fields["deadline"] = left
            else:
                fields["deadline"] = min(deadline, left) if isinstance(deadline, int | float) else deadline
            return self._validator.accept({**batch.origin, **fields, "tenant": batch.tenant}, max_value=batch.max_value)
        except InvalidTask as error:
            return line.bad(error)

    def submit(self, batch: BatchDocument, marks: bytearray, buffer: SubmitBuffer, progress: Progress) -> None:
        """Submit the lines in the buffer as far as there is room, and mark them."""
        lines = buffer.take()
        if not lines:
            return
        size, room = 0, self._settings.quota(batch.tenant).task_bytes - self._ledger.stored_bytes([batch.tenant])[0]
        fitting: list[tuple[int, str, TaskSpec]] = []
        for row, spec in lines:
            size += weight(spec)
            if size > room:
                break
            fitting.append((row, task_id(batch, row), spec))
        progress.no_room = len(fitting) < len(lines)
        key = self._keys.get(batch.key) if batch.key is not None else None
        if key is not None and fitting:
            del fitting[self._keys.admit(key, {identity: spec.deadline for _, identity, spec in fitting}) :]
        self._ledger.submit((identity, spec) for _, identity, spec in fitting)
        for row, identity, spec in fitting:
            marks[row] = OPEN
            log.info("task_submitted", task_id=identity, tenant=batch.tenant, service=spec.service, **spec.origin())
        buffer.full = len(fitting) < len(lines)
