"""What one tenant sends is stored so that it can be read again, or refused by name; and a record that cannot be read,
whoever spoilt it, stops nobody else's work and ends itself."""

from __future__ import annotations

import asyncio
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as fuzz
from hypothesis import strategies as st
from support.api import ApiProcess
from support.cluster import Cluster
from support.make import node_info, why
from support.raw import prefix_of, redis_of
from support.wait import eventually
from typer.testing import CliRunner

from perllm.broker.api import cli as api_cli
from perllm.broker.api.batches.store import BatchDocument, Batches
from perllm.broker.api.settings import ApiSettings
from perllm.broker.api.store import ApiStore
from perllm.broker.api.submit_coalescer import SubmitCoalescer
from perllm.broker.api.webhooks.store import Webhooks
from perllm.broker.client import Client
from perllm.broker.errors import BadSetting, InvalidTask, Unreadable
from perllm.broker.ledger import Dispatch, Ledger, Stored
from perllm.broker.local.server import EmbeddedServer
from perllm.broker.messages import (
    MAX_DEPTH,
    Counters,
    Explanation,
    Heartbeat,
    Output,
    State,
    Submitted,
    TaskSpec,
    new_id,
)
from perllm.broker.queues.app import node_message
from perllm.broker.settings import Settings
from perllm.broker.validation import TaskValidator

PERLLM = str(Path(sys.executable).with_name("perllm"))


def nested(levels: int, how: str = "object") -> Any:
    """An object of so many levels."""
    inner: Any = {}
    for _ in range(levels - 2):
        inner = {"a": inner} if how == "object" else [inner]
    return {"a": inner}


@pytest.fixture
def ledger(valkey: EmbeddedServer) -> Iterator[Ledger]:
    one = Ledger(Settings.model_validate({"redis_url": valkey.url, "lease": 300, "heartbeat": 60}))
    redis_of(one).flushall()
    yield one
    one.close()


# --- whatever is accepted can be read again

TEXT = st.text(st.characters(exclude_categories=()), max_size=12) | st.sampled_from(
    ["\x00", "\u2028", "\ud800", "\udc00\ud800", "\U0001f600", "'\"\\", "\ufeff", "@preview@", "k" * 300, "%s"]
)
NUMBER = (
    st.integers()
    | st.floats()
    | st.sampled_from([-0.0, 5e-324, math.inf, math.nan, 10**400, -(10**4200), 2**64, 1e308])
)
LEAF = st.none() | st.booleans() | NUMBER | TEXT
VALUE = st.recursive(
    LEAF,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner)
        | st.dictionaries(TEXT, inner, max_size=3)
        | st.dictionaries(st.integers() | st.booleans(), inner, max_size=2)
    ),
    max_leaves=6,
)
DEEP = st.builds(nested, st.integers(2, 2 * MAX_DEPTH) | st.just(250), st.sampled_from(["object", "list"]))
INPUT = st.builds(lambda text: {"prompt": text}, TEXT) | st.builds(
    lambda texts: {"messages": [{"role": "user", "content": text} for text in texts]}, st.lists(TEXT, max_size=3)
)
FIELDS = st.fixed_dictionaries(
    {},
    optional={
        "json_schema": st.dictionaries(TEXT, VALUE | DEEP, max_size=3) | DEEP,
        "metadata": st.dictionaries(TEXT, TEXT, max_size=2),
        "stop": st.lists(TEXT, max_size=2),
        "idempotency_key": TEXT,
        "service": TEXT,
        "deadline": NUMBER | st.just(60),
        "value": NUMBER | st.just(1e-300),
        "temperature": NUMBER,
        "seed": NUMBER,
        "expected_tokens": NUMBER,
    },
)
MANY = fuzz(max_examples=150, suppress_health_check=list(HealthCheck))


@MANY
@given(given_input=INPUT, fields=FIELDS)
def test_what_is_accepted_is_read_back_the_same_by_every_reader(
    ledger: Ledger, given_input: dict[str, Any], fields: dict[str, Any]
) -> None:
    try:
        spec = TaskValidator(ledger.settings, ledger).accept({**given_input, **fields})
    except InvalidTask as error:
        str(error).encode()  # which can be shown, too
        return
    before = ledger.first_and_last_event()[1]
    task_id = new_id()
    (in_force,) = ledger.submit([(task_id, spec)])
    record = ledger.task(in_force)
    assert record is not None
    if in_force == task_id:
        assert record.spec == spec
        ((_, event),) = ledger.events(before)
        assert isinstance(event, Submitted)
        assert (event.id, event.service, event.value) == (task_id, spec.service, spec.value)
        (placement,) = ledger.features([task_id])
        assert placement is not None
        assert placement.submitted == event
    json.dumps(record.spec.model_dump(mode="json"), allow_nan=False).encode()
    ledger.forget(in_force)


@MANY
@given(text=TEXT, logprobs=st.none() | st.lists(st.dictionaries(TEXT, VALUE, max_size=3), max_size=3), number=NUMBER)
def test_what_engines_and_policies_say_can_be_read_again(text: str, logprobs: Any, number: float) -> None:
    try:
        said = Output(text=text, finish_reason="stop", logprobs=logprobs)
    except ValueError:
        return  # nested too deeply, or keys that are none: the attempt fails
    again = Output.model_validate_json(said.model_dump_json(exclude_none=True))
    assert again == said
    json.dumps(again.model_dump(mode="json"), allow_nan=False).encode()
    look = {"node": "n", "index": float(number) if abs(number) < 1e300 else math.inf, "slacks": {"deadline": math.nan}}
    made = Explanation.model_validate({**why().model_dump(), "candidates": [look]})
    assert Explanation.model_validate_json(made.model_dump_json(exclude_defaults=True)).candidates[0].node == "n"


def test_an_integer_of_too_many_digits_is_refused_by_name(ledger: Ledger) -> None:
    validator = TaskValidator(ledger.settings, ledger)
    for fields in ({"json_schema": {"a": 10**4400}}, {"seed": 10**4400}, {"max_tokens": [10**4400]}):
        with pytest.raises(InvalidTask, match=next(iter(fields))):
            validator.accept({"prompt": "hi", **fields})


def test_halves_of_pairs_from_an_engine_are_joined_and_lone_ones_replaced() -> None:
    assert Output(text="a\ud83d" + "\ude00b\ud800", finish_reason="stop").text == "a\U0001f600b\ufffd"


@pytest.mark.parametrize("how", ["object", "list"])
@pytest.mark.parametrize(("levels", "taken"), [(MAX_DEPTH, True), (MAX_DEPTH + 1, False), (220, False), (300, False)])
def test_nesting_is_bounded_at_the_door(how: str, levels: int, taken: bool) -> None:
    schema = nested(levels, how)
    if taken:
        assert TaskSpec(prompt="x", json_schema=schema).json_schema == schema
    else:
        with pytest.raises(ValueError, match=f"nested deeper than {MAX_DEPTH} levels"):
            TaskSpec(prompt="x", json_schema=schema)


# --- one bad record among good ones


def unchecked(**fields: Any) -> TaskSpec:
    """A task as no check lets it in."""
    return TaskSpec(prompt="x").model_copy(update=fields)


def test_one_task_that_cannot_be_written_fails_alone_in_a_group_of_requests(
    ledger: Ledger, settings: ApiSettings
) -> None:
    class Unready(Ledger):
        """Fails as a whole while the group is together, as one whose script call fails would."""

        def store(self, entries: Any) -> list[Stored]:
            together = list(entries)
            if any("spoilt" in e.payload for e in together) and len(together) > 1:
                raise RuntimeError("one of them")
            return super().store(together)

    async def all_at_once(one: Ledger, bad: TaskSpec) -> list[Any]:
        coalescer = SubmitCoalescer(settings, one)
        specs = [TaskSpec(prompt="hi")] * 5 + [bad] + [TaskSpec(prompt="hi")] * 5
        # the first call is under way while the rest gathers to one group
        calls = [coalescer.submit(spec.tenant, [(new_id(), spec)]) for spec in specs]
        return list(await asyncio.gather(*calls, return_exceptions=True))

    for one, bad in ((ledger, unchecked(json_schema=nested(300))), (ledger, unchecked(prompt="\ud800"))):
        outcomes = asyncio.run(all_at_once(one, bad))
        assert isinstance(outcomes[5], InvalidTask)
        assert all(isinstance(o, list) for i, o in enumerate(outcomes) if i != 5)
    unready = Unready(ledger.settings)
    outcomes = asyncio.run(all_at_once(unready, TaskSpec(prompt="spoilt")))
    assert all(isinstance(o, list) for o in outcomes)  # alone, even that one was stored
    unready.close()
    with pytest.raises(InvalidTask):
        ledger.submit([(new_id(), unchecked(json_schema=nested(300)))])


SPOILT: dict[str, dict[str, bytes]] = {
    "a payload that is no JSON": {"payload": b"{"},
    "a payload of another version": {"payload": b'{"prompt": "x", "of_the_future": 1}'},
    "a payload nested beyond reading": {"payload": json.dumps({"prompt": "x", "json_schema": nested(250)}).encode()},
    "features that are no JSON": {"features": b"\xff{"},
    "features that are no object": {"features": b"[1]"},
    "features that are nonsense": {"features": b'{"type":"submitted","prompt_tokens":-1}'},
    "a time that is none": {"submitted": b"soon"},
    "a deadline that is none": {"deadline": b"later"},
    "strikes that are none": {"strikes": b"x"},
}


def spoil(ledger: Ledger, task_id: str, how: str) -> None:
    key = f"{prefix_of(ledger)}task:{task_id}"
    if how == "another kind of thing":
        redis_of(ledger).delete(key)
        redis_of(ledger).set(key, "x")
    else:
        redis_of(ledger).hset(key, mapping=SPOILT[how])


@pytest.mark.parametrize("state", ["pending", "dispatched", "running"])
@pytest.mark.parametrize("how", [*SPOILT, "another kind of thing"])
def test_a_spoilt_record_does_not_stop_the_sweep_and_ends(ledger: Ledger, how: str, state: str) -> None:
    epoch = ledger.lead("me", 60)
    assert epoch is not None
    assert ledger.register(node_info("n", slots=4)) is None
    bad, good = ledger.submit([(new_id(), TaskSpec(prompt="hi", deadline=600)) for _ in range(2)])
    if state != "pending":
        sent = [
            Dispatch(i, 1, "n", "boot-1", "emulated", "edge.n", node_message(i, 1, "edge.n"), why())
            for i in (bad, good)
        ]
        assert ledger.dispatch(epoch, sent) == ["ok", "ok"]
    if state == "running":
        assert ledger.claim(bad, 1, "n", "token")
        assert ledger.claim(good, 1, "n", "token")
    spoil(ledger, bad, how)
    redis_of(ledger).zadd(f"{prefix_of(ledger)}in:{state}", {bad: 1, good: 2})  # the time of both has come
    for _ in range(4):
        ledger.sweep()
    assert ledger.states([good])[0] in (State.EXPIRED, State.PENDING)
    assert redis_of(ledger).zscore(f"{prefix_of(ledger)}in:{state}", bad) is None or state == "pending"
    assert ledger.states([bad])[0] in (State.FAILED, State.EXPIRED, State.PENDING, None)
    # and what has ended is read, listed and waited for beside it
    client = Client(settings=ledger.settings)
    ledger.cancel(good)
    for result in client.wait([good], timeout=30):
        assert result.id == good
    assert [r.id for r in ledger.legible([bad, good])][-1] == good
    client.close()


def test_spoilt_records_do_not_cost_a_node_its_leases_nor_keep_it_from_going(ledger: Ledger) -> None:
    epoch = ledger.lead("me", 60)
    assert epoch is not None
    assert ledger.register(node_info("n", slots=4)) is None
    ids = ledger.submit([(new_id(), TaskSpec(prompt="hi", deadline=600)) for _ in range(3)])
    sent = [Dispatch(i, 1, "n", "boot-1", "emulated", "edge.n", node_message(i, 1, "edge.n"), why()) for i in ids]
    spoil(ledger, ids[0], "features that are no JSON")
    assert ledger.dispatch(epoch, sent) == ["ok"] * 3  # what people see of the prompt is not worth a dispatch
    for task_id in ids:
        assert ledger.claim(task_id, 1, "n", "token")
    spoil(ledger, ids[0], "another kind of thing")
    spoil(ledger, ids[1], "a deadline that is none")
    heartbeat = Heartbeat(at=0.0, node="n", boot="boot-1", counters=Counters())
    running = f"{prefix_of(ledger)}in:running"
    before = redis_of(ledger).zscore(running, ids[2])
    assert ledger.beat(heartbeat, [(i, 1, "token") for i in ids]) == ids[:1]
    assert redis_of(ledger).zscore(running, ids[1]) < before  # its deadline counts as passed, so its lease lapses
    assert redis_of(ledger).zscore(running, ids[2]) > before
    ledger.leave("n", "boot-1", "gone")
    assert ledger.states([ids[2]]) == [State.PENDING]
    assert ledger.nodes() == []


def test_one_dispatch_that_fails_on_its_record_is_refused_and_the_next_one_goes(ledger: Ledger) -> None:
    epoch = ledger.lead("me", 60)
    assert epoch is not None
    ledger.register(node_info("n"))
    bad, good = ledger.submit([(new_id(), TaskSpec(prompt="hi", deadline=600)) for _ in range(2)])
    spoil(ledger, bad, "another kind of thing")
    sent = [
        Dispatch(i, 1, "n", "boot-1", "emulated", "edge.n", node_message(i, 1, "edge.n"), why()) for i in (bad, good)
    ]
    assert ledger.dispatch(epoch, sent) == ["refused", "ok"]
    placements = ledger.features([bad, good])
    assert placements[0] is None
    assert placements[1] is not None


def test_a_result_that_cannot_be_read_is_one_that_says_so(ledger: Ledger) -> None:
    bad, good = ledger.submit([(new_id(), TaskSpec(prompt="hi")) for _ in range(2)])
    ledger.cancel_many([bad, good])
    redis_of(ledger).set(f"{prefix_of(ledger)}result:{bad}", "{")
    results = ledger.results([bad, good])
    assert [r.id for r in results if r] == [bad, good]
    assert results[0] is not None
    assert (results[0].state, results[0].reason) == (State.FAILED, "what is stored of its result cannot be read")
    with Client(settings=ledger.settings) as client:
        assert {r.id for r in client.wait([bad, good], timeout=30)} == {bad, good}


def test_documents_that_cannot_be_read_are_passed_over(ledger: Ledger, store: ApiStore) -> None:
    batches = Batches(store)
    common = {"tenant": "t", "endpoint": "/v1/completions", "input_file_id": "f", "window": "1h", "expires": 1.0}
    for n in range(3):
        batches.add(BatchDocument(id=f"b{n}", created=n, **common))
    store.client.set(batches.documents.key("b1"), json.dumps({"id": "b1", "tenant": "t"}))
    assert [b.id for b in batches.documents.page("t", after=None, limit=10)[0]] == ["b2", "b0"]
    assert {b.id for b in batches.open()} == {"b0", "b2"}
    assert batches.documents.get("b1") is None
    assert batches.documents.change("b1", lambda b: b) is None


def test_ids_that_are_no_text_are_ids_of_nothing(ledger: Ledger) -> None:
    assert ledger.task("\ud800") is None
    assert ledger.results(["\udcff"]) == [None]
    assert ledger.cancel("\ud800") is None
    redis_of(ledger).zadd(f"{prefix_of(ledger)}in:pending", {b"\xff": 1})
    assert [i for _, i in ledger.unfinished()] == ["\ufffd"]


# --- through the doors of a running system


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiProcess]:
    folder = tmp_path_factory.mktemp("records")
    with EmbeddedServer(folder) as server, Cluster(server.url, folder) as cluster:
        # One that nobody can place, from before the scheduler came
        (bad,) = cluster.submit(prompt="bad")
        spoil(cluster.ledger, bad, "features that are no JSON")
        redis_of(cluster.ledger).set("bad", bad)
        cluster.start_inbox()
        cluster.scheduler()
        cluster.start_nodes("one", slots=8)
        with ApiProcess(server.url, folder) as running:
            running.cluster = cluster  # type: ignore[attr-defined]
            yield running


def ended(http: httpx.Client, task_id: str) -> dict[str, Any]:
    def final() -> Any:
        task = http.get(f"/v1/tasks/{task_id}").json()
        return task if task.get("result") else None

    return eventually(final, f"{task_id} ends")  # type: ignore[no-any-return]


def test_a_task_that_cannot_be_placed_ends_and_the_others_run(api: ApiProcess) -> None:
    bad = redis_of(api.ledger).get("bad").decode()  # type: ignore[union-attr]
    eventually(lambda: api.ledger.states([bad])[0] is State.REJECTED, "it is refused")
    result = api.ledger.results([bad])[0]
    assert result is not None
    assert result.reason == "what is stored of it cannot be read"
    assert api.cluster.result(api.cluster.submit()[0]).state is State.SUCCEEDED  # type: ignore[attr-defined]


@pytest.mark.parametrize("levels", [MAX_DEPTH + 1, 220, 300])
def test_a_deep_schema_is_refused_by_name_and_harms_nobody(api: ApiProcess, levels: int) -> None:
    http = api.http("deep")
    given = {"type": "json_schema", "json_schema": {"schema": nested(levels)}}
    ask = {"model": "auto", "messages": [{"role": "user", "content": "hi"}], "response_format": given}
    for path, body in (
        ("/v1/chat/completions", ask),
        ("/v1/tasks", {"prompt": "hi", "json_schema": nested(levels)}),
        ("/v1/responses", {"input": "hi", "text": {"format": {"type": "json_schema", "schema": nested(levels)}}}),
    ):
        answer = http.post(path, json=body)
        assert answer.status_code == 400, answer.text
        said = answer.json()["error"]["message"]
        assert "nested deeper" in said or "recursion limit" in said
    assert http.get("/v1/tasks").json()["data"] == []
    sent = api.cluster.producer().send_task(  # type: ignore[attr-defined]
        "perllm.generate", kwargs={"prompt": "hi", "json_schema": nested(levels)}, queue="inbox"
    )
    with pytest.raises(Exception, match="nested deeper"):
        sent.get(timeout=30)


def test_a_record_that_cannot_be_read_stops_no_webhook_and_no_list(api: ApiProcess) -> None:
    http, other = api.http("spoilt"), api.http("victim")
    hooks = Webhooks(api.store, api.ledger)
    mine = {t: hooks.make(t, "https://example.com/", ["task.cancelled"]) for t in ("spoilt", "victim")}
    # of a model that nobody serves, so that they wait
    bad, good, theirs = api.ledger.submit(
        (new_id(), TaskSpec(prompt="hi", deadline=600, model="nobodys", tenant=tenant))
        for tenant in ("spoilt", "spoilt", "victim")
    )
    spoil(api.ledger, bad, "a payload nested beyond reading")
    api.ledger.cancel(bad)
    assert other.post(f"/v1/tasks/{theirs}/cancel").status_code == 200

    def told(tenant: str) -> list[str]:
        hook = mine[tenant]
        assert hook is not None
        found, _ = hooks.deliveries.page(hook.id, after=None, limit=10)
        return [json.loads(d.payload)["data"]["id"] for d in found]

    eventually(lambda: theirs in told("victim"), "the other tenant's webhook is told")
    assert bad in told("spoilt")  # as far as it can be
    assert [t["id"] for t in http.get("/v1/tasks").json()["data"]] == [good]
    refused = http.get(f"/v1/tasks/{bad}")
    assert (refused.status_code, refused.json()["error"]["code"]) == (500, "unreadable")
    with pytest.raises(Unreadable):
        api.ledger.task(bad)
    for tenant, hook in mine.items():
        assert hook is not None, tenant
        hooks.remove(hook)


def batch(http: httpx.Client, lines: list[bytes]) -> dict[str, dict[str, Any]]:
    """Run lines as a batch; its entries by custom_id, and by line number those without."""
    file = http.post("/v1/files", files={"file": ("in.jsonl", b"\n".join(lines))}, data={"purpose": "batch"}).json()
    body = {"input_file_id": file["id"], "endpoint": "/v1/completions", "completion_window": "1h"}
    made = http.post("/v1/batches", json=body).json()

    def done() -> Any:
        now = http.get(f"/v1/batches/{made['id']}").json()
        return now if now["status"] in ("completed", "failed", "expired", "cancelled") else None

    ran = eventually(done, "the batch ends")
    assert ran["status"] == "completed", ran
    entries: dict[str, dict[str, Any]] = {}
    for file_id in filter(None, (ran["output_file_id"], ran["error_file_id"])):
        for line in http.get(f"/v1/files/{file_id}/content").text.splitlines():
            entry = json.loads(line)
            entries[entry["custom_id"] or entry["error"]["message"].split(":")[0]] = entry
    return entries


def line(custom_id: str, **fields: Any) -> bytes:
    request = {"custom_id": custom_id, "url": "/v1/completions", "body": {"prompt": "hi", "max_tokens": 1, **fields}}
    return json.dumps(request).encode()


ODD_LINES = [
    line("good-1"),
    line("half").replace(b"hi", b"\\ud800"),
    line("x").replace(b'"x"', b'"\\udfff"'),
    b"\xff\xfe" + line("bytes"),
    line("deep", response_format={"type": "json_schema", "schema": nested(220)}),
    line("deeper", response_format={"type": "json_schema", "schema": nested(70)}),
    line("huge").replace(b'"max_tokens": 1', b'"max_tokens": ' + b"9" * 5000),
    line("endless").replace(b'"max_tokens": 1', b'"temperature": 1e400'),
    line("nan").replace(b'"max_tokens": 1', b'"temperature": NaN'),
    line("nul", prompt="\0 \u2028"),
    line("good-2"),
]


def test_an_odd_line_is_refused_alone(api: ApiProcess) -> None:
    entries = batch(api.http("lines"), ODD_LINES)
    done = {name for name, entry in entries.items() if entry["response"]}
    assert done == {"good-1", "nul", "good-2"}
    assert len(entries) == len(ODD_LINES)
    assert "nested deeper" in entries["deeper"]["error"]["message"]


def perllm(url: str, *arguments: str | bytes, code: int) -> subprocess.CompletedProcess[bytes]:
    environment = {**os.environ, "PERLLM_REDIS_URL": url, "PYTHONUTF8": "1"}
    done = subprocess.run([PERLLM, *arguments], env=environment, capture_output=True, timeout=120, check=False)
    assert b"Traceback" not in done.stdout + done.stderr, done.stderr.decode(errors="replace")
    assert done.returncode == code, done.stderr
    return done


def keys(url: str, *arguments: str) -> Any:
    """`perllm api keys`, in this process: what it raised, or what it said."""
    done = CliRunner().invoke(api_cli.keys, [*arguments, "--json"], env={"PERLLM_REDIS_URL": url})
    return json.loads(done.stdout) if done.exit_code == 0 else done.exception


def test_a_file_with_an_odd_name_and_odd_lines_from_the_command_line(api: ApiProcess, tmp_path: Path) -> None:
    file = os.fsencode(tmp_path) + b"/caf\xe9.jsonl"
    with open(file, "wb") as target:  # noqa: PTH123  its name is no text
        target.write(b"\n".join(ODD_LINES))
    done = perllm(api.settings.url, "submit", file, "--wait", "--json", code=1)
    report = json.loads(done.stdout)
    assert (report["submitted"], report["bad_lines"]) == (3, len(ODD_LINES) - 3)
    assert b"caf\\udce9.jsonl:2: not JSON" in done.stderr


def test_arguments_that_are_no_text(api: ApiProcess) -> None:
    perllm(api.settings.url, "status", b"\xff", code=1)
    assert isinstance(keys(api.settings.url, "make", "--tenant", "a b"), BadSetting)
    assert isinstance(keys(api.settings.url, "make", "--name", "\udcff"), BadSetting)


@pytest.mark.parametrize("charset", ["utf-8", "utf-7", "unicode_escape", "undefined", "punycode"])
def test_odd_names_of_files(api: ApiProcess, charset: str) -> None:
    http = api.http("names")
    part = 'Content-Disposition: form-data; name="file"; filename="{}"\r\n\r\n{{}}\r\n--b'
    for name in ("a\\ud800.jsonl", "+2AA-", "\udcff"):
        purpose = '--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--b\r\n'
        body = (purpose + part.format(name) + "--\r\n").encode(errors="surrogateescape")
        kind = f"multipart/form-data; boundary=b; charset={charset}"
        answer = http.post("/v1/files", content=body, headers={"Content-Type": kind})
        assert answer.status_code < 500, answer.text
        assert http.get("/v1/files").status_code == 200


def test_odd_headers_queries_and_paths(api: ApiProcess) -> None:
    http = api.http("odd")
    for method, path, headers in (
        ("GET", "/v1/tasks/%ff%00%ed%a0%80", {}),
        ("GET", "/v1/tasks?after=%ed%a0%80&service=%00", {}),
        ("GET", "/v1/batches?after=%00%ff", {}),
        ("POST", "/v1/tasks", {"Idempotency-Key": b"\xff\xfe"}),
        ("POST", "/v1/tasks", {"X-PerLLM-Service": b"\xff"}),
        ("POST", "/v1/tasks", {"X-PerLLM-Value": "1e400"}),
        ("POST", "/v1/tasks", {"X-PerLLM-Deadline": "9" * 400}),
    ):
        answer = http.request(method, path, headers=headers, json={"prompt": "hi"} if method == "POST" else None)
        assert answer.status_code < 500, (path, headers, answer.text)
    for raw in (b"[" * 100_000, b'{"prompt": "\\ud800"}', b'{"prompt": "hi", "deadline": 1e400}', b"\xff", b"9" * 9999):
        answer = http.post("/v1/tasks", content=raw)
        assert answer.status_code == 400, answer.text


# --- a key's highest value


def test_a_value_above_the_keys_is_refused_at_every_door(api: ApiProcess) -> None:
    http = api.http("greedy")
    for path, body in (
        ("/v1/tasks", {"prompt": "hi"}),
        ("/v1/completions", {"prompt": "hi", "model": "auto"}),
        ("/v1/responses", {"input": "hi"}),
    ):
        inside = http.post(path, json={**body, "value": 1e6})
        header = http.post(path, json=body, headers={"X-PerLLM-Value": "1.5"})
        for answer in (inside, header):
            assert answer.status_code == 400
            error = answer.json()["error"]
            assert error["param"] == "value"
            assert error["message"].endswith("is more than this key may give, 1")
    many = http.post("/v1/tasks", json={"tasks": [{"prompt": "hi"}, {"prompt": "hi", "value": 2}]})
    assert "tasks.1.value" in many.json()["error"]["message"]
    assert http.get("/v1/tasks").json()["data"] == []
    entries = batch(http, [line("modest"), line("greedy", value=1e6), line("one", value=1)])
    assert {name for name, entry in entries.items() if entry["response"]} == {"modest", "one"}
    assert "line 2: value" in entries["greedy"]["error"]["message"]


def test_a_key_may_be_given_more_or_less(api: ApiProcess) -> None:
    for most, asked, kept in ((5.0, 5, 5.0), (0.25, None, 0.25), (5.0, None, 1.0)):
        headers = {"Authorization": f"Bearer {api.key('valued', max_value=most)}"}
        body = {"prompt": "hi", "max_tokens": 1, **({} if asked is None else {"value": asked})}
        made = httpx.post(f"{api.base}/v1/tasks", json=body, headers=headers).json()
        task = httpx.get(f"{api.base}/v1/tasks/{made['id']}", headers=headers).json()
        assert task["value"] == kept
    made_there = keys(api.settings.url, "make", "--max-value", "2.5")
    listed = keys(api.settings.url, "list")
    assert next(k["max_value"] for k in listed if k["id"] == made_there["id"]) == 2.5
    assert isinstance(keys(api.settings.url, "make", "--max-value", "nan"), BadSetting)


def test_a_key_from_before_has_a_highest_value_too(api: ApiProcess) -> None:
    secret = api.key("old")
    name = f"{prefix_of(api.ledger)}api:key:{secret.split('_')[1]}"
    document = json.loads(redis_of(api.ledger).get(name))  # type: ignore[arg-type]
    del document["max_value"]
    redis_of(api.ledger).set(name, json.dumps(document))
    answer = httpx.post(
        f"{api.base}/v1/tasks",
        json={"prompt": "hi", "value": 2},
        headers={"Authorization": f"Bearer {secret}"},
    )
    assert answer.json()["error"]["param"] == "value"


# --- idempotency keys


def test_one_key_for_two_tasks_of_a_request(api: ApiProcess) -> None:
    http = api.http("twice")

    def post(*tasks: dict[str, Any]) -> httpx.Response:
        return http.post("/v1/tasks", json={"tasks": [{"prompt": "hi", "max_tokens": 1, **t} for t in tasks]})

    different = post({"idempotency_key": "k"}, {"idempotency_key": "k", "prompt": "other"}, {"prompt": "third"})
    assert (different.status_code, different.json()["error"]["param"]) == (422, "idempotency_key")
    assert http.get("/v1/tasks").json()["data"] == []
    same = post({"idempotency_key": "k"}, {"idempotency_key": "k"}, {"prompt": "third"}).json()["data"]
    assert same[0]["id"] == same[1]["id"] != same[2]["id"]
    assert [t["repeated"] for t in same] == [False, True, False]
    later = post({"prompt": "new"}, {"idempotency_key": "k", "prompt": "other"})
    assert later.status_code == 422
    assert len(http.get("/v1/tasks").json()["data"]) == 2


def test_one_key_for_two_requests_at_once(api: ApiProcess) -> None:
    headers = {"Authorization": f"Bearer {api.key('race')}"}

    async def race(n: int) -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=api.base, headers=headers, timeout=60) as http:
            bodies = [
                {"tasks": [{"prompt": f"{i}", "idempotency_key": f"k{n}"}, {"prompt": "beside"}]} for i in range(8)
            ]
            return list(await asyncio.gather(*(http.post("/v1/tasks", json=body) for body in bodies)))

    for n in range(3):
        statuses = sorted(answer.status_code for answer in asyncio.run(race(n)))
        assert statuses == [200] + [422] * 7
    left = httpx.get(f"{api.base}/v1/tasks?limit=100", headers=headers).json()["data"]
    assert len(left) == 6
