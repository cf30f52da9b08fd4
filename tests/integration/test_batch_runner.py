"""Batches on a real ledger, their tasks ended by hand: wherever the runner is stopped, every line comes out once."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from support.make import node_info, output, receipt, why
from support.raw import redis_of
from support.wait import eventually

from perllm.broker.api.batches.runner import BatchRunner
from perllm.broker.api.batches.store import BatchDocument, Batches
from perllm.broker.api.files.store import Files
from perllm.broker.api.keys import Keys
from perllm.broker.api.leased_worker import LeaseLost
from perllm.broker.api.settings import ApiSettings
from perllm.broker.api.store import ApiStore
from perllm.broker.ledger import Dispatch, Ledger
from perllm.broker.local.server import EmbeddedServer
from perllm.broker.messages import State

LINES = 25
BAD = {7, 19}


def content(lines: int = LINES) -> bytes:
    good = [{"custom_id": f"c{n}", "body": {"prompt": f"say {n}"}, "url": "/v1/completions"} for n in range(lines)]
    return b"".join(b"nonsense\n" if n in BAD else json.dumps(x).encode() + b"\n" for n, x in enumerate(good))


class Fragile(BatchRunner):
    """A runner that is killed at the n-th thing it does to the outside."""

    def __init__(self, fuse: list[int], *parts: Any) -> None:
        super().__init__(*parts)
        self._fuse = fuse

    def burn(self) -> None:
        self._fuse[0] -= 1
        if self._fuse[0] == 0:
            raise LeaseLost

    def renew(self) -> None:
        self.burn()


class Bench:
    """Files, batches and a ledger, and runners on them."""

    def __init__(self, ledger: Ledger, settings: ApiSettings, url: str) -> None:
        self.settings = settings.model_copy(update={"api_files": url})
        self.ledger, self.store = ledger, ApiStore(self.settings)
        self.ended: list[str] = []
        self.fuse = [0]
        bench = self

        class BurningFiles(Files):
            def write(self, *arguments: Any) -> int:
                bench.runner.burn()
                return super().write(*arguments)

            def discard(self, path: str) -> None:
                bench.runner.burn()
                super().discard(path)

        class BurningBatches(Batches):
            def close(self, batch: BatchDocument) -> None:
                bench.runner.burn()
                super().close(batch)

        self.files = BurningFiles(self.settings, self.store)
        self.batches = BurningBatches(self.store)
        self.runner = self.restart()

    def restart(self) -> Fragile:
        self.runner = Fragile(self.fuse, *self.parts(), lambda b: self.ended.append(b.status))
        return self.runner

    def parts(self) -> tuple[Any, ...]:
        """What a runner is made of."""
        keys = Keys(self.store, self.ledger)
        return self.settings, self.store, self.ledger, self.files, self.batches, keys

    def batch(self, lines: bytes, window: float = 600.0) -> str:
        file = self.files.keep("t", "in.jsonl", "batch", iter([BytesIO(lines)]))
        now = self.ledger.now()
        batch = BatchDocument(
            id="batch_1", tenant="t", created=now, endpoint="/v1/completions", input_file_id=file.id, window="10m",
            expires=now + window,
        )  # fmt: skip
        self.batches.add(batch)
        return batch.id

    def round(self) -> None:
        """A round of the runner; killed in it, another one takes its place."""
        try:
            self.runner.round()
        except LeaseLost:
            self.restart()
        self.look_at_all()

    def look_at_all(self) -> None:
        """No batch waits any longer until it is looked at."""
        for progress in self.runner._steps._progress.values():
            progress.due = 0.0

    def complete(self, most: int) -> None:
        """End some of the tasks that wait, every fifth as failed."""
        epoch = self.ledger.lead("me", 60)
        assert epoch is not None
        self.ledger.register(node_info("n"))
        for task_id in self.ledger.ids(State.PENDING, limit=most):
            self.ledger.dispatch(epoch, [Dispatch(task_id, 1, "n", "boot-1", "emulated", "edge.n", "{}", why())])
            self.ledger.claim(task_id, 1, "n", "token")
            if int(task_id[-2:]) % 5 == 0:
                self.ledger.fail(task_id, 1, "token", "broken", retry=False)
            else:
                self.ledger.complete(task_id, 1, "token", "succeeded", output(task_id), receipt("n"))

    def entries(self, file_id: str | None) -> list[dict[str, Any]]:
        if file_id is None:
            return []
        file = self.files.documents.get(file_id, "t")
        assert file is not None
        with self.files.read(file) as found:
            return [json.loads(line) for line in found.read().splitlines()]

    def get(self) -> BatchDocument:
        batch = self.batches.documents.get("batch_1")
        assert batch is not None
        return batch


@pytest.fixture(params=["file", "memory"])
def bench(request: pytest.FixtureRequest, valkey: EmbeddedServer, tmp_path: Path) -> Iterator[Bench]:
    """On the local disk, and on a store that fsspec reaches otherwise."""
    settings = ApiSettings.model_validate({"redis_url": valkey.url, "lease": 300, "heartbeat": 60})
    ledger = Ledger(settings)
    redis_of(ledger).flushall()
    yield Bench(ledger, settings, tmp_path.as_uri() if request.param == "file" else f"memory://{tmp_path}")
    ledger.close()


def run(bench: Bench) -> None:
    for _ in range(200):
        bench.round()
        if bench.get().status in ("completed", "expired", "failed", "cancelled") and not bench.batches.open():
            return
        bench.complete(4)
    raise AssertionError(f"it does not end: {bench.get()}")


def check(bench: Bench) -> None:
    batch = bench.get()
    good, bad = bench.entries(batch.output_file_id), bench.entries(batch.error_file_id)
    ids = Counter(e["custom_id"] for e in [*good, *bad])
    assert ids == Counter({f"c{n}": 1 for n in range(LINES) if n not in BAD} | {None: len(BAD)})
    assert {e["custom_id"] for e in bad} == {None} | {f"c{n}" for n in range(0, LINES, 5)}
    for entry in good:
        text = entry["response"]["body"]["choices"][0]["text"]
        assert int(text[-5:]) == int(entry["custom_id"][1:])
    assert (batch.total, batch.completed, batch.failed) == (LINES, len(good), len(bad))
    assert set(bench.ended) == {"completed"}
    left = bench.files._fs.find(bench.files.path("t", ""))
    assert not [path for path in left if ".out." in path or ".err." in path]


@pytest.mark.parametrize("collect_at", [3, 10_000])
def test_killed_anywhere_no_line_is_lost_or_doubled(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, collect_at: int
) -> None:
    monkeypatch.setattr("perllm.broker.api.batches.steps.COLLECT_AT", collect_at)
    monkeypatch.setattr("perllm.broker.api.batches.steps.FETCH", 5)
    for steps in range(1, 200):
        redis_of(bench.ledger).flushall()
        bench.ended.clear()
        bench.fuse[0] = 0
        bench.batch(content())
        bench.restart()
        bench.fuse[0] = steps
        run(bench)
        check(bench)
        if bench.fuse[0] > 0:  # it ended before it was to be killed
            assert steps > 10
            return
    raise AssertionError("it takes more steps than these")


@pytest.mark.parametrize("steps", range(6))
def test_cancelled_at_any_moment_every_line_is_answered(bench: Bench, steps: int) -> None:
    bench.batch(content())
    for _ in range(steps):
        bench.round()
        bench.complete(4)
    bench.batches.cancel("batch_1", "t")
    run(bench)
    batch = bench.get()
    entries = [*bench.entries(batch.output_file_id), *bench.entries(batch.error_file_id)]
    assert batch.status == "cancelled"
    assert len(entries) == LINES
    assert not [s for s, _ in bench.ledger.unfinished()]


def test_killed_while_being_fed_and_then_cancelled(bench: Bench) -> None:
    bench.batch(content())
    bench.fuse[0] = 2  # in the part of the refused lines, after all is submitted
    bench.round()
    assert bench.get().status == "validating"
    bench.batches.cancel("batch_1", "t")
    run(bench)
    batch = bench.get()
    assert batch.status == "cancelled"
    assert len(bench.entries(batch.error_file_id)) == LINES


def test_without_a_scheduler_a_batch_still_ends_with_its_window(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("perllm.broker.api.batches.steps.OVERTIME", -5.0)
    bench.batch(content(), window=1.0)
    bench.round()
    bench.round()
    batch = bench.get()
    assert batch.status == "expired"
    codes = {e["error"]["code"] for e in bench.entries(batch.error_file_id)}
    assert codes == {"batch_expired", "invalid_request"}


def test_too_many_lines_fail_before_any_is_run(bench: Bench) -> None:
    bench.settings = bench.settings.model_copy(update={"api_batch_lines": LINES - 1})
    bench.restart()
    bench.batch(content())
    bench.round()
    assert bench.get().status == "failed"
    assert str(LINES - 1) in bench.get().errors[0]["message"]
    assert list(bench.ledger.unfinished()) == []


def test_a_line_too_long_and_one_that_is_no_text_are_named(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("perllm.broker.openai.batch_file.MAX_LINE", 1000)
    first, *rest = content(3).splitlines(keepends=True)
    bench.batch(first + b"x" * 5000 + b"\n" + rest[0] + b"\xff\xfe\n" + rest[1])
    for _ in range(9):
        bench.round()
        bench.complete(4)
    batch = bench.get()
    said = [e["error"]["message"] for e in bench.entries(batch.error_file_id) if e["custom_id"] is None]
    assert [m.split(":")[0] for m in said] == ["line 2", "line 4"]
    assert batch.total == 5
    assert len(bench.entries(batch.output_file_id)) == 2


def test_only_one_process_runs_batches_and_another_takes_over_at_once(bench: Bench) -> None:
    one, another = (BatchRunner(*bench.parts(), lambda _: None) for _ in range(2))
    one.start()
    eventually(lambda: bench.store.client.exists(one._lease), "one has the lease")
    with pytest.raises(LeaseLost):
        another.renew()
    one.close()
    another.renew()


def test_a_bug_does_not_keep_a_batch_for_ever(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(bench.runner._steps._submitter, "check", broken)
    bench.batch(content())
    for _ in range(3):
        bench.runner.round()
        bench.look_at_all()
    assert bench.get().status == "failed"
    assert bench.batches.open() == []
