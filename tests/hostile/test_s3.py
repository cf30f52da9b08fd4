"""Files in an S3-compatible store: what it does to the API when it is well, gone, silent, slow or refuses us. A real
API on a real server; the store is moto's, behind a bad network. Needs `pip install s3fs 'moto[server]'`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.api import ApiProcess
from support.make import node_info, output, receipt, why
from support.ports import free_port
from support.proxy import Proxy
from support.wait import eventually

from perllm.broker.api.files.store import Files
from perllm.broker.api.settings import ApiSettings
from perllm.broker.api.store import ApiStore
from perllm.broker.ledger import Dispatch, Ledger
from perllm.broker.local.server import EmbeddedServer
from perllm.broker.messages import State

pytest.importorskip("s3fs")
moto = pytest.importorskip("moto.server")

LINE = {"method": "POST", "url": "/v1/completions", "body": {"prompt": "Hi"}, "deadline": 600}
URL = "s3://bucket/some folder/[a]*"


class Store:
    """The store, and the network before it."""

    def __init__(self, port: int, network: Proxy) -> None:
        self.network = network
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30)
        self.http.put("/bucket").raise_for_status()

    def names(self) -> list[str]:
        """Of all that is stored."""
        page = self.http.get("/bucket", params={"list-type": "2"}).text
        return [part.partition("</Key>")[0] for part in page.split("<Key>")[1:]]

    def unfinished(self) -> int:
        """How many uploads were begun and neither finished nor given up."""
        return self.http.get("/bucket?uploads").text.count("<UploadId>")

    def require_rights(self, required: bool) -> None:
        """Whether credentials are looked at: there are none that would do."""
        self.http.post("/moto-api/reset-auth", content=b"0" if required else b"1000000000").raise_for_status()


@pytest.fixture(scope="module")
def bucket() -> Iterator[Store]:
    port = free_port()
    server = moto.ThreadedMotoServer("127.0.0.1", port, verbose=False)
    server.start()
    with Proxy(f"http://127.0.0.1:{port}") as network, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{network.port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "us")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        yield Store(port, network)
    server.stop()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServer]:
    with EmbeddedServer(tmp_path_factory.mktemp("server")) as started:
        yield started


@pytest.fixture(scope="module")
def both(
    server: EmbeddedServer, bucket: Store, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[ApiProcess, ApiProcess]]:
    """Two API processes on one store."""
    assert bucket
    with (
        ApiProcess(server.url, tmp_path_factory.mktemp("one"), api_files=URL) as one,
        ApiProcess(server.url, tmp_path_factory.mktemp("two"), api_files=URL) as two,
    ):
        yield one, two


@pytest.fixture
def store(bucket: Store, both: tuple[ApiProcess, ApiProcess]) -> Iterator[Store]:
    """The store, well again afterwards."""
    yield bucket
    bucket.network.delay(0)
    bucket.network.let_through()
    bucket.network.up()
    bucket.require_rights(False)
    for api in both:
        http = api.http("well")
        eventually(lambda h=http: upload(h, b"well?").status_code == 200, "files are stored again")


def upload(http: httpx.Client, content: bytes, name: str = "in.jsonl") -> httpx.Response:
    return http.post("/v1/files", files={"file": (name, content)}, data={"purpose": "batch"}, timeout=120)


def refused(answer: httpx.Response) -> bool:
    """With one clear error."""
    assert answer.status_code == 503, answer.text
    assert answer.json()["error"]["code"] == "unavailable"
    assert "Traceback" not in answer.text
    assert "bucket" not in answer.text
    return True


@pytest.mark.parametrize("size", [0, 5, (8 << 20) - 1, 8 << 20, 20_000_001])
def test_what_one_process_stores_the_other_reads_and_deletes(
    both: tuple[ApiProcess, ApiProcess], store: Store, size: int
) -> None:
    one, two = (api.http("a") for api in both)
    content = os.urandom(size)
    before = store.names()
    file = upload(one, content).json()
    assert file["bytes"] == size
    assert file["id"] in [f["id"] for f in two.get("/v1/files").json()["data"]]
    for http in (two, one):
        assert http.get(f"/v1/files/{file['id']}/content").content == content
    assert two.delete(f"/v1/files/{file['id']}").json()["deleted"]
    assert one.get(f"/v1/files/{file['id']}/content").status_code == 404
    assert store.names() == before
    assert store.unfinished() == 0


def test_names_are_no_paths(both: tuple[ApiProcess, ApiProcess], store: Store) -> None:
    for tenant in ("a", "a/../b", "a/b", "A.B:c@d+e"):
        http = both[0].http(tenant)
        for name in ("ü ñ 漢.jsonl", "a*?[b]#%41&=+", "..."):
            file = upload(http, name.encode(), name).json()
            assert file["filename"] == name
            assert both[1].http(tenant).get(f"/v1/files/{file['id']}/content").content == name.encode()
            assert len([n for n in store.names() if file["id"] in n]) == 1
            assert http.delete(f"/v1/files/{file['id']}").status_code == 200
            assert not [n for n in store.names() if file["id"] in n]


# --- batches


def begin_batch(http: httpx.Client, lines: int) -> str:
    content = b"".join(json.dumps({"custom_id": f"c{n}", **LINE}).encode() + b"\n" for n in range(lines)) + b"{}\n"
    file = upload(http, content).json()
    body = {"input_file_id": file["id"], "endpoint": "/v1/completions", "completion_window": "24h"}
    answer = http.post("/v1/batches", json=body)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["id"])


def complete(ledger: Ledger, count: int) -> None:
    """End so many tasks, once they wait."""
    epoch = ledger.lead("me", 60)
    assert epoch is not None
    ledger.register(node_info("n"))
    eventually(lambda: len(ledger.ids(State.PENDING, limit=count)) == count, "the batch's tasks wait")
    for task_id in ledger.ids(State.PENDING, limit=count):
        ledger.dispatch(epoch, [Dispatch(task_id, 1, "n", "boot-1", "emulated", "edge.n", "{}", why())])
        ledger.claim(task_id, 1, "n", "token")
        ledger.complete(task_id, 1, "token", "succeeded", output(task_id), receipt("n"))


def ended(http: httpx.Client, batch: str) -> dict[str, Any]:
    def look() -> dict[str, Any] | None:
        found: dict[str, Any] = http.get(f"/v1/batches/{batch}").json()
        return found if found["status"] in ("completed", "failed") else None

    return eventually(look, "the batch has ended")


def check_files(http: httpx.Client, batch: dict[str, Any], lines: int) -> None:
    assert batch["status"] == "completed", batch
    for field, count in (("output_file_id", lines), ("error_file_id", 1)):
        content = http.get(f"/v1/files/{batch[field]}/content").content
        assert len([json.loads(line) for line in content.splitlines()]) == count


def test_a_batch_and_its_files(both: tuple[ApiProcess, ApiProcess], store: Store) -> None:
    one, two = (api.http("batches") for api in both)
    batch = begin_batch(one, 20)
    complete(both[0].ledger, 20)
    check_files(two, ended(two, batch), 20)
    eventually(lambda: not [n for n in store.names() if "/batch_" in n], "its parts are removed")


def test_a_batch_outlasts_an_outage(both: tuple[ApiProcess, ApiProcess], store: Store) -> None:
    http = both[0].http("outage")
    batch = begin_batch(http, 10)
    eventually(lambda: len(both[0].ledger.ids(State.PENDING, limit=10)) == 10, "its tasks wait")
    store.network.down()
    complete(both[0].ledger, 10)
    time.sleep(20)  # it has been tried more often than a bug of ours would be
    assert http.get(f"/v1/batches/{batch}").json()["status"] in ("validating", "in_progress", "finalizing")
    store.network.up()
    check_files(http, ended(http, batch), 10)


# --- a store that fails


def test_a_store_that_is_gone_is_one_clear_error(both: tuple[ApiProcess, ApiProcess], store: Store) -> None:
    http, log = both[0].http("gone"), both[0].log
    kept = upload(http, b"kept").json()["id"]
    logged = len(log.read_text())
    store.network.down()
    began = time.monotonic()
    assert refused(upload(http, b"lost"))
    assert refused(http.get(f"/v1/files/{kept}/content"))
    assert [f["id"] for f in http.get("/v1/files").json()["data"]] == [kept]
    assert http.delete(f"/v1/files/{kept}").status_code == 200  # its content goes later
    assert time.monotonic() - began < 20
    assert http.get("/v1/files").json()["data"] == []
    assert "Traceback" not in log.read_text()[logged:]


def test_a_silent_store_stops_nothing_else(both: tuple[ApiProcess, ApiProcess], store: Store) -> None:
    http, other = both[0].http("silent"), both[0].http("other")
    store.network.hold()
    began = time.monotonic()
    with ThreadPoolExecutor(40) as many:
        uploads = [many.submit(upload, http, b"x") for _ in range(8)]
        uploads += [many.submit(upload, both[0].http(f"silent{n}"), b"x") for n in range(24)]
        slowest = 0.0
        while not all(u.done() for u in uploads):
            asked = time.monotonic()
            assert other.post("/v1/tasks", json={"prompt": "Hi"}).status_code == 200
            assert other.get("/v1/files").status_code == 200
            slowest = max(slowest, time.monotonic() - asked)
            time.sleep(0.2)
        assert slowest < 5
        assert all(refused(u.result()) for u in uploads)
    assert time.monotonic() - began < 100
    store.network.let_through()
    eventually(lambda: upload(other, b"again").status_code == 200, "it works again")


def test_a_slow_store_is_only_slow(both: tuple[ApiProcess, ApiProcess], store: Store) -> None:
    http, content = both[0].http("slow"), os.urandom(1 << 20)
    store.network.delay(1.5)
    file = upload(http, content)
    assert file.status_code == 200, file.text
    assert http.get(f"/v1/files/{file.json()['id']}/content").content == content


def test_a_connection_lost_half_way_leaves_nothing_or_all(both: tuple[ApiProcess, ApiProcess], store: Store) -> None:
    http, content = both[0].http("lost"), os.urandom(30_000_000)
    for lost_after in (0.05, 0.2, 0.5):
        before = set(store.names())
        stop = threading.Event()

        def lose(after: float = lost_after, stop: threading.Event = stop) -> None:
            while not stop.wait(after):
                store.network.reset()

        losing = threading.Thread(target=lose)
        losing.start()
        try:
            answer = upload(http, content)
        finally:
            stop.set()
            losing.join()
        if answer.status_code == 200:
            assert http.get(f"/v1/files/{answer.json()['id']}/content").content == content
            continue
        assert refused(answer)
        assert set(store.names()) == before


def test_a_download_cut_off_is_not_taken_for_whole(both: tuple[ApiProcess, ApiProcess], store: Store) -> None:
    http, content = both[0].http("cut"), os.urandom(30_000_000)
    file = upload(http, content).json()["id"]
    with http.stream("GET", f"/v1/files/{file}/content") as answer:
        parts = answer.iter_raw(1 << 16)
        next(parts)
        store.network.down()
        with pytest.raises(httpx.RemoteProtocolError):
            list(parts)


def test_rights_withdrawn_are_an_error_of_ours(both: tuple[ApiProcess, ApiProcess], store: Store) -> None:
    http = both[0].http("rights")
    store.require_rights(True)
    assert refused(upload(http, b"x"))
    assert store.unfinished() == 0


# --- at the start


def start(url: str, folder: Path, **environment: str) -> tuple[int, str]:
    """How an API process ends that cannot begin."""
    variables = {"PERLLM_REDIS_URL": url, "PERLLM_DATA_DIR": str(folder), "PERLLM_API_PORT": str(free_port())}
    done = subprocess.run(
        [sys.executable, "-m", "perllm.broker.api"],
        env={**os.environ, **variables, **environment}, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    return done.returncode, done.stderr


def test_what_the_store_refuses_is_said_at_the_start(server: EmbeddedServer, store: Store, tmp_path: Path) -> None:
    code, said = start(server.url, tmp_path, PERLLM_API_FILES="s3://no-such-bucket/x")
    assert (code, "PERLLM_API_FILES" in said, "Traceback" in said) == (2, True, False), said
    store.require_rights(True)
    code, said = start(server.url, tmp_path, PERLLM_API_FILES=URL)
    assert (code, "PERLLM_API_FILES" in said, "Traceback" in said) == (2, True, False), said


def test_no_credentials_are_said_at_the_start(
    server: EmbeddedServer, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert store
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    code, said = start(server.url, tmp_path, PERLLM_API_FILES=URL, AWS_EC2_METADATA_DISABLED="true", HOME=str(tmp_path))
    assert (code, "PERLLM_API_FILES" in said, "Traceback" in said) == (2, True, False), said


def test_the_api_starts_without_its_store(server: EmbeddedServer, store: Store, tmp_path: Path) -> None:
    store.network.down()
    with ApiProcess(server.url, tmp_path, api_files=URL) as api:
        http = api.http("early")
        assert http.post("/v1/tasks", json={"prompt": "Hi"}).status_code == 200
        assert refused(upload(http, b"x"))
        store.network.up()
        eventually(lambda: upload(http, b"x").status_code == 200, "files are stored once it is there")


# --- what lies there


def test_what_another_process_writes_is_seen_and_orphans_go(
    server: EmbeddedServer, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ApiSettings.model_validate({"redis_url": server.url, "api_files": URL})
    of_settings = ApiStore(settings)
    one, two = Files(settings, of_settings), Files(settings, of_settings)
    name = one.path("t", "batch_0.out.0")
    list(one.sweep_orphans(set()))
    assert not one.exists(name)
    subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys, io; from perllm.broker.api.files.store import *; s = ApiSettings();"
            "Files(s, ApiStore(s)).write(sys.argv[1], [io.BytesIO(b'x')])",
            name,
        ],
        env={**os.environ, "PERLLM_REDIS_URL": server.url, "PERLLM_API_FILES": URL},
        check=True,
    )
    assert one.exists(name)
    monkeypatch.setattr("perllm.broker.api.files.store.ORPHAN_AGE", -60.0)
    list(two.sweep_orphans({"batch_0"}))
    assert one.exists(name)
    list(two.sweep_orphans(set()))
    assert not one.exists(name)
    assert store.names() is not None
    of_settings.close()
