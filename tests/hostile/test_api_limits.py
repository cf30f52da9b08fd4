"""What one client of the HTTP API may do to the others: nothing. A real API on a real server; its tasks wait."""

from __future__ import annotations

import json
import os
import re
import socket
import stat
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import httpx
import psutil
import pytest
from support.api import ApiProcess
from support.raw import prefix_of, redis_of
from support.wait import eventually

from perllm.broker.api.batches.runner import BatchRunner
from perllm.broker.api.batches.store import BatchDocument, Batches
from perllm.broker.api.files.store import FileDocument, Files
from perllm.broker.api.keys import Keys
from perllm.broker.api.settings import ApiSettings
from perllm.broker.api.store import ApiStore
from perllm.broker.errors import BadSetting, Unreachable
from perllm.broker.ledger import Ledger
from perllm.broker.local.server import EmbeddedServer
from perllm.broker.messages import State, TaskSpec
from perllm.broker.settings import Settings

QUOTA = {"task_bytes": 300_000, "file_bytes": 20_000, "files": 3, "batches": 4}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServer]:
    with EmbeddedServer(tmp_path_factory.mktemp("server")) as started:
        yield started


@pytest.fixture(scope="module")
def api(server: EmbeddedServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiProcess]:
    folder = tmp_path_factory.mktemp("api")
    (folder / "api" / "files").mkdir(parents=True, mode=0o755)
    limits = {
        "api_quotas": json.dumps({"small": QUOTA}),
        "api_waiting_per_key": 5,
        "api_waiting": 8,
        "api_connections_per_address": 300,
    }
    before = os.umask(0o022)
    try:
        with ApiProcess(server.url, folder, **limits) as running:
            yield running
    finally:
        os.umask(before)


def scrape(http: httpx.Client) -> str:
    return http.get("/metrics").text


def test_methods_clients_make_up_are_one_series(api: ApiProcess) -> None:
    with ThreadPoolExecutor(4) as many:
        statuses = set(many.map(lambda n: httpx.request(f"M{n}{'x' * 5_000}", api.base + "/").status_code, range(40)))
    assert statuses == {405}
    page = scrape(api.http(operator=True))
    assert len(page) < 100_000
    assert set(re.findall(r'method="(\w+)"', page)) <= {"GET", "POST", "DELETE", "other"}


def test_a_body_of_a_million_values_is_refused_before_it_is_read(api: ApiProcess) -> None:
    http = api.http()
    for body in (b'{"a":[' + b"[]," * 1_000_000 + b"1]}", b"{" + b",".join(b'"%d":1' % n for n in range(1000)) + b"}"):
        answer = http.post("/v1/tasks", content=body)
        assert answer.status_code in (400, 413)
        assert len(answer.content) < 1000


def test_an_id_of_any_length_is_only_unknown(api: ApiProcess) -> None:
    http = api.http()
    for path in ("/v1/tasks/", "/v1/files/", "/v1/batches/", "/v1/responses/", "/v1/webhooks/"):
        answer = http.get(path + "x" * 20_000)
        assert answer.status_code == 404
        assert len(answer.content) < 1000


# --- connections


def test_what_is_dripped_after_an_early_answer_is_cut_off(api: ApiProcess) -> None:
    with socket.create_connection(("127.0.0.1", api.port)) as line:
        line.sendall(b"POST /v1/tasks HTTP/1.1\r\nHost: a\r\nContent-Length: 100000\r\n\r\n{")
        assert b" 401 " in line.recv(65536)

        def cut_off() -> bool:
            try:
                line.sendall(b" ")
            except OSError:
                return True
            return False

        eventually(cut_off, "it is cut off", patience=20)


def test_one_address_has_so_many_connections_and_others_are_told(api: ApiProcess) -> None:
    lines = [socket.create_connection(("127.0.0.1", api.port)) for _ in range(300)]
    try:

        def refused() -> bool:
            with socket.create_connection(("127.0.0.1", api.port), timeout=5) as one_more:
                one_more.sendall(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")
                try:
                    answer = one_more.recv(65536)
                    return b" 503 " in answer and b"x-request-id: req_" in answer
                except OSError:
                    return False

        eventually(refused, "one more is refused")
    finally:
        for line in lines:
            line.close()
    eventually(lambda: httpx.get(f"{api.base}/health").status_code == 200, "there is room again")


def test_streams_are_counted_by_key_and_in_all(api: ApiProcess) -> None:
    body = {"model": "auto", "input": "hi", "stream": True, "deadline": 600}
    headers = [{"Authorization": f"Bearer {api.key(name)}"} for name in ("streams", "streams", "others")]
    streams = []

    def begin(mine: dict[str, str]) -> httpx.Response:
        http = httpx.Client(base_url=api.base, timeout=30)
        streams.append(http)
        return http.send(http.build_request("POST", "/v1/responses", json=body, headers=mine), stream=True)

    try:
        assert [begin(headers[0]).status_code for _ in range(6)] == [200] * 5 + [429]
        assert [begin(headers[1]).status_code for _ in range(4)] == [200] * 3 + [503]
        full = begin(headers[2])
        assert full.status_code == 503
        assert full.headers["retry-after"]
        wait = httpx.post(f"{api.base}/v1/responses", json={**body, "stream": False}, headers=headers[0])
        assert wait.status_code == 429
    finally:
        for http in streams:
            http.close()

    def free() -> bool:
        answer = begin(headers[2])
        answer.close()
        return answer.status_code == 200

    eventually(free, "the places are given back")


def test_an_idle_stream_costs_next_to_nothing(server: EmbeddedServer, api: ApiProcess, tmp_path: Path) -> None:
    files = api.settings.data_dir / "api" / "files"
    with ApiProcess(server.url, tmp_path, api_files=files) as api:
        key = api.key("idle")
        request = json.dumps({"model": "auto", "input": "hi", "stream": True, "deadline": 600}).encode()
        head = f"POST /v1/responses HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {key}\r\n"
        head += f"Content-Length: {len(request)}\r\n\r\n"
        lines = []
        for _ in range(450):
            line = socket.create_connection(("127.0.0.1", api.port))
            line.sendall(head.encode() + request)
            lines.append(line)
        for line in lines:
            assert b" 200 " in line.recv(65536)
        process = psutil.Process(api.process.pid)
        eventually(lambda: process.cpu_percent(1.0) < 20, "it is quiet")
        before, began = sum(process.cpu_times()[:2]), time.monotonic()
        time.sleep(3)  # what is measured
        share = (sum(process.cpu_times()[:2]) - before) / (time.monotonic() - began)
        for line in lines:
            line.close()
        assert share < 0.05  # it was 0.08 when each looked for itself


# --- lists


def test_a_list_of_nothing_holds_up_nobody(api: ApiProcess) -> None:
    api.ledger.submit((f"many-{n}", TaskSpec(prompt="hi", deadline=600, tenant="lists")) for n in range(6000))
    lister, other = api.http("lists"), api.http("other")
    made = other.post("/v1/tasks", json={"prompt": "hi", "deadline": 600}).json()["id"]
    stop = threading.Event()

    def list_again_and_again(_: int) -> int:
        pages = 0
        while not stop.is_set():
            answer = lister.get("/v1/tasks", params={"service": "nope"})
            assert answer.status_code in (200, 429)
            pages += 1
        return pages

    with ThreadPoolExecutor(12) as many:
        listing = [many.submit(list_again_and_again, n) for n in range(12)]
        took = []
        try:
            for _ in range(20):
                began = time.monotonic()
                assert other.get(f"/v1/tasks/{made}").status_code == 200
                took.append(time.monotonic() - began)
        finally:
            stop.set()
        assert sum(page.result() for page in listing) > 0
    assert sorted(took)[10] < 0.5


def test_pages_of_a_filtered_list_lead_to_its_end(api: ApiProcess) -> None:
    services = ["a" if n % 700 else "b" for n in range(2500)]
    api.ledger.submit(
        (f"page-{n:04d}", TaskSpec(prompt="hi", deadline=600, tenant="pages", service=s))
        for n, s in enumerate(services)
    )
    http, found, after = api.http("pages"), [], None
    for _ in range(20):
        page = http.get("/v1/tasks", params={"service": "b", "limit": 3, **({"after": after} if after else {})}).json()
        found += [task["id"] for task in page["data"]]
        after = page["last_id"]
        if not page["has_more"]:
            break
    assert found == [f"page-{n:04d}" for n in range(2499, -1, -1) if n % 700 == 0]


def test_a_page_of_large_tasks_is_shorter(api: ApiProcess) -> None:
    api.ledger.submit(
        (f"large-{n:03d}", TaskSpec(prompt="x" * 1_000_000, deadline=600, tenant="large")) for n in range(25)
    )
    http, found, after = api.http("large"), [], None
    for _ in range(9):
        page = http.get("/v1/tasks", params={"limit": 100, **({"after": after} if after else {})}).json()
        found.append(len(page["data"]))
        after = page["last_id"]
        if not page["has_more"]:
            break
    assert sum(found) == 25
    assert len(found) > 1
    for n in range(25):
        api.ledger.forget(f"large-{n:03d}")


# --- what is stored


def test_tasks_have_a_quota_and_what_is_deleted_makes_room(api: ApiProcess) -> None:
    http, other = api.http("small"), api.http("roomy")
    ids = []
    for _ in range(10):
        answer = http.post("/v1/tasks", json={"prompt": "x" * 90_000, "deadline": 600})
        if answer.status_code != 200:
            break
        ids.append(answer.json()["id"])
    assert len(ids) == 3
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (429, "quota_exceeded")
    assert "DELETE /v1/tasks" in error["message"]
    assert answer.headers["x-should-retry"] == "false"
    assert other.post("/v1/tasks", json={"prompt": "x" * 90_000, "deadline": 600}).status_code == 200
    many = {"tasks": [{"prompt": "x" * 20_000, "deadline": 600}] * 2}
    assert http.post("/v1/tasks", json=many).status_code == 429
    assert http.delete(f"/v1/tasks/{ids.pop()}").status_code == 200
    assert http.post("/v1/tasks", json=many).status_code == 200
    for task in http.get("/v1/tasks").json()["data"]:
        http.delete(f"/v1/tasks/{task['id']}")
    assert api.ledger.stored_bytes(["small"]) == [0]


def upload(http: httpx.Client, content: bytes, name: str = "f.jsonl") -> httpx.Response:
    return http.post("/v1/files", files={"file": (name, content)}, data={"purpose": "batch"})


def test_files_have_a_quota_and_are_nobody_elses(api: ApiProcess, tmp_path: Path) -> None:
    http = api.http("small")
    root = api.log.parent / "api"
    first = upload(http, b"x" * 9_000).json()["id"]
    assert upload(http, b"x" * 9_000).status_code == 200
    refused = upload(http, b"x" * 9_000)
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "quota_exceeded")
    assert upload(http, b"x").status_code == 200
    assert "3 files" in upload(http, b"x").json()["error"]["message"]
    found = sorted(path for path in (root / "files").rglob("*"))
    assert len([path for path in found if path.is_file() and "small" in str(path)]) == 3
    for path in (root, root / "files", root / "tmp", *found):
        assert stat.S_IMODE(path.stat().st_mode) == (0o600 if path.is_file() else 0o700), path
    assert http.delete(f"/v1/files/{first}").status_code == 200
    assert upload(http, b"x" * 9_000).status_code == 200
    for file in http.get("/v1/files").json()["data"]:
        http.delete(f"/v1/files/{file['id']}")
    assert api.store.client.hget(api.store.key("file-bytes"), "small") == b"0"


def test_unfinished_batches_have_a_quota(api: ApiProcess) -> None:
    http = api.http("small")
    line = json.dumps({"custom_id": "1", "url": "/v1/completions", "body": {"prompt": "hi"}}).encode()
    file = upload(http, line).json()["id"]
    made = {"input_file_id": file, "endpoint": "/v1/completions", "completion_window": "1h"}
    answers = [http.post("/v1/batches", json=made) for _ in range(5)]
    assert [answer.status_code for answer in answers] == [200] * 4 + [429]
    for answer in answers[:4]:
        http.post(f"/v1/batches/{answer.json()['id']}/cancel")

    def ended() -> bool:
        return {batch["status"] for batch in http.get("/v1/batches").json()["data"]} == {"cancelled"}

    eventually(ended, "they are cancelled")
    for found in http.get("/v1/files").json()["data"]:
        http.delete(f"/v1/files/{found['id']}")


def test_a_full_server_refuses_new_work_and_lives(tmp_path: Path) -> None:
    with EmbeddedServer(tmp_path, memory=16 << 20) as server:
        ledger = Ledger(Settings.model_validate({"redis_url": server.url}))
        assert redis_of(ledger).config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
        stored: list[str] = []
        tasks = ((f"t{n}", TaskSpec(prompt="x" * 1_000_000, deadline=600)) for n in range(100))
        with pytest.raises(Unreachable, match="out of memory"):
            stored += (ledger.submit([task])[0] for task in tasks)
        assert 3 < len(stored) < 17
        ledger.forget(stored.pop())
        ledger.forget(stored.pop())
        assert ledger.submit([("again", TaskSpec(prompt="hi", deadline=600))]) == ["again"]
        assert ledger.task(stored[0]) is not None
        ledger.close()


# --- files, where no API stands before them


@pytest.fixture
def ledger(server: EmbeddedServer) -> Iterator[Ledger]:
    one = Ledger(Settings.model_validate({"redis_url": server.url, "cell": "alone"}))
    for key in redis_of(one).scan_iter(f"{prefix_of(one)}*"):
        redis_of(one).delete(key)
    yield one
    one.close()


@pytest.fixture
def settings(server: EmbeddedServer, tmp_path: Path) -> ApiSettings:
    return ApiSettings.model_validate({"redis_url": server.url, "cell": "alone", "data_dir": tmp_path})


class Broken(BytesIO):
    def read(self, *_: object) -> bytes:  # type: ignore[override]
        if self.tell() > 100:
            raise OSError(28, "No space left on device")
        return super().read(101)


def test_a_failed_upload_leaves_nothing(ledger: Ledger, settings: ApiSettings, store: ApiStore) -> None:
    files = Files(settings, store)
    with pytest.raises(OSError, match="No space"):
        files.keep("t", "a", "batch", iter([Broken(b"x" * 1000)]))
    found = [path for path in (settings.data_dir / "api").rglob("*") if path.is_file()]
    assert [path.name for path in found] == ["store-id"]
    assert redis_of(ledger).keys(f"{prefix_of(ledger)}*") == []


def test_what_a_killed_process_left_is_swept(ledger: Ledger, settings: ApiSettings, store: ApiStore) -> None:
    files = Files(settings, store)
    kept = files.keep("t", "a", "batch", iter([BytesIO(b"x")]))
    folder = settings.data_dir / "api" / "files" / "t"
    old = ("file-orphan", "batch_gone.out.1", "batch_here.out.1", "something-else", kept.id)
    for name in old:
        (folder / name).touch()
        os.utime(folder / name, (1e9, 1e9))
    (folder / "file-young").touch()
    list(files.sweep_orphans({"batch_here"}))
    assert {path.name for path in folder.iterdir()} == {"file-young", *old[2:]}


def test_links_are_not_followed(settings: ApiSettings, store: ApiStore, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "file-x").write_text("secret")
    files = Files(settings, store)
    root = settings.data_dir / "api" / "files"
    (root / "t").symlink_to(secret)
    stolen = FileDocument(id="file-x", tenant="t", created=0, filename="x", bytes=6, purpose="batch", expires=1e12)
    with pytest.raises(OSError):  # noqa: PT011  ELOOP or ENOTDIR
        files.read(stolen)
    with pytest.raises(OSError):  # noqa: PT011
        files.keep("t", "a", "batch", iter([BytesIO(b"x")]))
    with pytest.raises(OSError):  # noqa: PT011
        files.discard(files.path("t", "file-x"))
    (root / "u").mkdir()
    (root / "u" / "file-x").symlink_to(secret / "file-x")
    with pytest.raises(OSError):  # noqa: PT011
        files.read(stolen.model_copy(update={"tenant": "u"}))
    assert (secret / "file-x").read_text() == "secret"
    root.rename(root.with_name("elsewhere"))
    root.symlink_to(root.with_name("elsewhere"))
    with pytest.raises(BadSetting, match="is a link"):
        Files(settings, store)


# --- batches


class Bench:
    def __init__(self, ledger: Ledger, settings: ApiSettings) -> None:
        self.ledger = ledger
        store = ApiStore(settings)
        self.files, self.batches = Files(settings, store), Batches(store)
        self.keys = Keys(store, ledger)
        self.ended: list[str] = []
        note = lambda batch: self.ended.append(batch.id)  # noqa: E731
        self.runner = BatchRunner(settings, store, ledger, self.files, self.batches, self.keys, note)

    def batch(self, name: str, tenant: str, lines: bytes, key: str | None = None) -> None:
        file = self.files.keep(tenant, "in", "batch", iter([BytesIO(lines)]))
        now = self.ledger.now()
        batch = BatchDocument(
            id=f"batch_{name}",
            tenant=tenant,
            created=now,
            endpoint="/v1/completions",
            input_file_id=file.id,
            window="10m",
            expires=now + 600,
            key=key,
        )
        self.batches.add(batch)

    def get(self, name: str) -> BatchDocument:
        batch = self.batches.documents.get(f"batch_{name}")
        assert batch is not None
        return batch

    def round(self) -> None:
        for progress in self.runner._steps._progress.values():
            progress.due = 0.0
        self.runner.round()


def good(count: int, size: int = 10) -> bytes:
    line = {"url": "/v1/completions", "body": {"prompt": "x" * size}}
    return b"".join(json.dumps({**line, "custom_id": str(n)}).encode() + b"\n" for n in range(count))


@pytest.fixture
def bench(ledger: Ledger, settings: ApiSettings) -> Bench:
    narrow = settings.api_quota.model_copy(update={"task_bytes": 60_000})
    return Bench(ledger, settings.model_copy(update={"api_quotas": {"narrow": narrow}}))


def test_a_batch_is_fed_as_its_keys_tasks_end(bench: Bench) -> None:
    key, _ = bench.keys.make("t", "", None, 5)
    bench.batch("a", "t", good(23), key.id)
    most = 0
    for _ in range(60):
        bench.round()
        waiting = bench.ledger.ids(State.PENDING)
        most = max(most, len(waiting))
        assert not bench.keys.reserve(key, {f"own-{n}": 600.0 for n in range(6 - len(waiting))})
        if bench.ended:
            break
        assert bench.get("a").status == "in_progress"
        bench.ledger.cancel_many(waiting[:3])
    batch = bench.get("a")
    assert most == 5
    assert (batch.status, batch.total, batch.failed) == ("completed", 23, 23)


def test_a_batch_keeps_to_its_keys_rate(bench: Bench) -> None:
    key, _ = bench.keys.make("t", "", 10.0, None)
    bench.batch("a", "t", good(500), key.id)
    bench.round()
    assert len(bench.ledger.ids(State.PENDING)) <= 10
    assert bench.keys.wait(key) == 0  # half of the burst stays for requests
    eventually(lambda: bench.round() or len(bench.ledger.ids(State.PENDING)) > 12, "it goes on")


def test_a_batch_larger_than_the_quota_makes_its_own_room(bench: Bench) -> None:
    bench.batch("a", "narrow", good(20, 10_000))
    for _ in range(60):
        bench.round()
        assert bench.ledger.stored_bytes(["narrow"])[0] < 70_000
        if bench.ended:
            break
        bench.ledger.cancel_many(bench.ledger.ids(State.PENDING))
    assert (bench.get("a").status, bench.get("a").failed) == ("completed", 20)


def test_a_small_batch_does_not_wait_for_large_ones_of_others(bench: Bench) -> None:
    bad = b'{"custom_id": "x", "url": "/v1/completions", "body": {"prompt": 5}}\n' * 10_000
    for n in range(3):
        bench.batch(f"bad{n}", "hostile", bad)
    bench.batch("small", "light", good(5))
    done: list[int] = []
    submit = bench.ledger.submit

    def noting(tasks: object) -> list[str]:
        ids = submit(tasks)  # type: ignore[arg-type]
        done.append(len(bench.ended))
        bench.ledger.cancel_many(ids)
        return ids

    bench.ledger.submit = noting  # type: ignore[method-assign]
    bench.runner.round()
    assert done[0] == 0  # its lines were in the ledger before the first of the others had ended


def test_one_unreadable_batch_does_not_stop_the_others(bench: Bench, ledger: Ledger) -> None:
    bench.batch("broken", "hostile", good(5))
    bench.batch("light", "light", good(5))
    bench.batches._client.set(bench.batches.documents.key("batch_broken"), b'{"id": 5}')
    bench.round()
    assert bench.get("light").status == "in_progress"


def test_a_store_that_fails_one_tenant_delays_only_that_one(bench: Bench, settings: ApiSettings) -> None:
    bench.batch("linked", "hostile", good(5))
    bench.batch("light", "light", good(5))
    folder = settings.data_dir / "api" / "files" / "hostile"
    folder.rename(folder.with_name("moved"))
    folder.symlink_to(folder.with_name("moved"))
    for _ in range(3):
        bench.round()
    assert bench.get("light").status == "in_progress"
    assert bench.get("linked").status == "validating"  # until the folder is mended …
    bench.batches.documents.change("batch_linked", lambda b: b.model_copy(update={"expires": 1.0}))
    bench.round()
    assert bench.get("linked").status == "failed"  # … or its window ends
