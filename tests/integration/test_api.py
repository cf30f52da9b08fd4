"""The HTTP API as its users meet it: the official client, a running system, the real small model."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import httpx
import openai
import pytest
from openai import OpenAI
from openai.types import Batch
from prometheus_client.parser import text_string_to_metric_families
from standardwebhooks.webhooks import Webhook
from support import users
from support.api import ApiProcess, Sink
from support.make import node_info
from support.raw import redis_of
from support.wait import eventually

from perllm.broker.local.supervisor import Supervisor
from perllm.broker.settings import Settings

#: Where the tests' webhook receiver listens: private, and allowed by setting; 127.0.0.1 is not.
SINK = "127.0.0.2"
#: Words without an end: they last for as many tokens as are allowed, many more than any test waits for.
ENDLESS = {"grammar": 'root ::= "word " root', "max_tokens": 1900}
FOREVER = {"grammar": ENDLESS["grammar"], "deadline": 600}
LONG = {"messages": [{"role": "user", "content": "Say words."}], **ENDLESS}
ASK = [{"role": "user", "content": "Why is the sky blue?"}]


SETTINGS = {"webhook_allow": f'["{SINK}/32"]', "api_patience": 2}


@contextlib.contextmanager
def api_users(url: str) -> Iterator[dict[str, Any]]:
    """The users of compose/users.acl for the API and its webhooks, which suffice for all that is done here."""
    users.create(url)
    yield {"redis_url": users.url_of("api", url), "webhooks": users.url_of("webhooks", url)}
    assert users.denied(url) == []


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiProcess]:
    folder = tmp_path_factory.mktemp("api")
    with (
        mock.patch.dict(os.environ, PERLLM_LOG_JSON="true"),
        Supervisor(Settings(data_dir=folder), edges=("one",), clouds=()) as stack,
        api_users(stack.url) as users_of_api,
        ApiProcess(stack.url, folder, **users_of_api, **SETTINGS) as running,
    ):
        eventually(lambda: not stack.waiting_for(), "the node is up")
        eventually(lambda: running.http().get("/ready").status_code == 200, "a scheduler leads")
        yield running


@pytest.fixture(scope="module")
def client(api: ApiProcess) -> OpenAI:
    return api.openai()


# --- completions


def test_a_chat_is_completed_with_its_receipt(client: OpenAI) -> None:
    done = client.chat.completions.create(
        model="auto", messages=ASK, max_tokens=8, temperature=0, extra_body={"deadline": 30, "service": "sky"}
    )
    assert done.choices[0].message.content
    assert done.choices[0].finish_reason == "length"
    assert done.usage is not None
    assert done.usage.completion_tokens == 8
    assert done.usage.total_tokens == done.usage.prompt_tokens + 8
    extra = done.model_extra or {}
    assert extra["node"] == "one"
    assert extra["on_time"] is True
    energy = extra["energy"]
    assert energy["total"] == pytest.approx(energy["transfer"] + energy["inference"] + energy["idle"])
    assert energy["total"] > 0
    assert energy["method"]
    assert isinstance(energy["estimated"], bool)


def test_a_chat_streams_what_it_would_have_answered(client: OpenAI) -> None:
    asked = {"model": "auto", "messages": ASK, "max_tokens": 24, "temperature": 0}
    whole = client.chat.completions.create(**asked).choices[0].message.content
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    texts = [c.choices[0].delta.content for c in chunks if c.choices]
    assert "".join(t or "" for t in texts) == whole
    assert len([t for t in texts if t]) > 2
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 24
    assert {c.id for c in chunks} == {chunks[0].id}


def test_a_legacy_completion(client: OpenAI) -> None:
    asked = {"model": "auto", "prompt": "Say hello.", "max_tokens": 5, "temperature": 0}
    whole = client.completions.create(**asked).choices[0].text
    assert whole
    streamed = [c.choices[0].text for c in client.completions.create(**asked, stream=True)]
    assert "".join(streamed) == whole


# --- responses


def test_a_background_response_is_polled_to_its_end(client: OpenAI) -> None:
    made = client.responses.create(
        model="auto", input="Count to three.", instructions="Be brief.", max_output_tokens=6, background=True
    )
    assert made.status in ("queued", "in_progress")
    done = eventually(
        lambda: r if (r := client.responses.retrieve(made.id)).status not in ("queued", "in_progress") else None, "done"
    )
    assert done.id == made.id
    assert done.status in ("completed", "incomplete")
    assert done.output_text
    assert done.instructions == "Be brief."
    assert done.usage is not None
    assert done.usage.output_tokens <= 6
    assert (done.model_extra or {})["energy"]["total"] > 0


def test_a_background_response_is_cancelled(client: OpenAI) -> None:
    made = client.responses.create(
        model="auto", input="Say words.", max_output_tokens=1900, background=True, extra_body=FOREVER
    )
    cancelled = client.responses.cancel(made.id)
    assert cancelled.status == "cancelled"
    assert client.responses.retrieve(made.id).status == "cancelled"
    assert client.responses.cancel(made.id).status == "cancelled"


def test_a_deleted_response_is_gone_and_its_node_free(client: OpenAI, api: ApiProcess) -> None:
    made = client.responses.create(
        model="auto", input="Say words.", max_output_tokens=1900, background=True, extra_body=FOREVER
    )
    eventually(lambda: client.responses.retrieve(made.id).status == "in_progress", "it runs")
    with pytest.raises(openai.NotFoundError):
        api.openai("another").responses.delete(made.id)
    client.responses.delete(made.id)
    for gone in (client.responses.retrieve, client.responses.delete):
        with pytest.raises(openai.NotFoundError):
            gone(made.id)
    eventually(lambda: api.http().get("/v1/nodes").json()["data"][0]["active"] == 0, "its node is free")
    assert not list(redis_of(api.ledger).scan_iter(f"*{made.id}*"))


def test_a_running_response_is_watched_from_where_one_left(client: OpenAI) -> None:
    stream = client.responses.create(
        model="auto", input="Count to fifty.", max_output_tokens=100, background=True, stream=True, temperature=0
    )
    seen = []
    for event in stream:
        seen.append(event)
        if event.type == "response.output_text.delta":
            break
    stream.close()  # it goes on without us
    first = seen[0]
    assert first.type == "response.created"
    rest = list(client.responses.retrieve(first.response.id, stream=True, starting_after=seen[-1].sequence_number))
    numbers = [e.sequence_number for e in seen + rest]
    assert numbers == sorted(set(numbers))
    text = "".join(e.delta for e in seen + rest if e.type == "response.output_text.delta")
    final = rest[-1]
    assert final.type in ("response.completed", "response.incomplete")
    assert final.response.output_text == text
    whole = list(client.responses.retrieve(first.response.id, stream=True))
    assert [e.sequence_number for e in whole] == numbers
    assert client.responses.retrieve(first.response.id).output_text == text


def test_a_response_is_waited_for_and_continued(client: OpenAI) -> None:
    first = client.responses.create(model="auto", input="My name is Ann. Say hi.", max_output_tokens=8, temperature=0)
    assert first.output_text
    second = client.responses.create(
        model="auto", input="What is my name?", previous_response_id=first.id, max_output_tokens=8, temperature=0
    )
    assert second.usage is not None
    assert first.usage is not None
    assert second.usage.input_tokens > first.usage.input_tokens + 8


# --- what is wrong is said


def test_a_wrong_key_is_refused(api: ApiProcess, client: OpenAI) -> None:
    good = client.api_key
    for wrong in ("sk-nonsense", good[:-1] + ("A" if good[-1] != "A" else "B"), ""):
        with pytest.raises((openai.AuthenticationError, openai.APIConnectionError)):
            api.openai(api_key=wrong or "x").models.list()


def test_a_model_nobody_serves_is_not_found(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-99", messages=ASK)
    assert caught.value.code == "model_not_found"
    assert caught.value.param == "model"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-99")


def test_models_are_what_live_nodes_offer(client: OpenAI) -> None:
    (model,) = client.models.list().data
    assert client.models.retrieve(model.id) == model
    assert client.chat.completions.create(model=model.id, messages=ASK, max_tokens=1).model == model.id


# --- batches


def jsonl(*lines: object) -> bytes:
    return "".join(x if isinstance(x, str) else json.dumps(x) + "\n" for x in lines).encode()


def chat_line(custom_id: str, **more: Any) -> dict[str, Any]:
    body = {"messages": ASK, "max_tokens": 2, "temperature": 0, **more.pop("body", {})}
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": body, **more}


def ended(client: OpenAI, batch_id: str) -> Batch:
    def look() -> Batch | None:
        batch = client.batches.retrieve(batch_id)
        return batch if batch.status in ("failed", "completed", "expired", "cancelled") else None

    return eventually(look, f"batch {batch_id} has ended")


def run_batch(client: OpenAI, content: bytes, window: str = "2m", endpoint: str = "/v1/chat/completions") -> Batch:
    file = client.files.create(file=("lines.jsonl", content), purpose="batch")
    batch = client.batches.create(
        input_file_id=file.id,
        endpoint=endpoint,  # type: ignore[arg-type]
        completion_window=window,  # type: ignore[arg-type]
    )
    return ended(client, batch.id)


def entries(client: OpenAI, file_id: str | None) -> dict[str | None, dict[str, Any]]:
    if file_id is None:
        return {}
    found = [json.loads(line) for line in client.files.content(file_id).text.splitlines()]
    return {entry["custom_id"]: entry for entry in found}


def test_a_batch_from_upload_to_output(client: OpenAI) -> None:
    content = jsonl(*(chat_line(f"c{n}", deadline=60) for n in range(5)))
    file = client.files.create(file=("nightly.jsonl", content), purpose="batch")
    assert (file.bytes, file.filename) == (len(content), "nightly.jsonl")
    assert client.files.retrieve(file.id) == file
    assert client.files.content(file.id).read() == content
    assert file.id in [f.id for f in client.files.list(purpose="batch")]
    made = client.batches.create(
        input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h", metadata={"night": "1"}
    )
    assert made.status == "validating"
    batch = ended(client, made.id)
    assert batch.status == "completed"
    assert batch.request_counts is not None
    assert batch.request_counts.model_dump() == {"total": 5, "completed": 5, "failed": 0}
    assert batch.metadata == {"night": "1"}
    assert batch.error_file_id is None
    output = entries(client, batch.output_file_id)
    assert set(output) == {f"c{n}" for n in range(5)}
    for entry in output.values():
        assert entry["error"] is None
        body = entry["response"]["body"]
        assert body["choices"][0]["message"]["content"]
        assert body["energy"]["total"] > 0
        assert body["node"] == "one"
    assert made.id in [b.id for b in client.batches.list(limit=1)]
    assert client.files.delete(file.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(file.id)


@pytest.mark.parametrize(
    ("endpoint", "body", "where"),
    [
        ("/v1/completions", {"prompt": "Hi."}, lambda body: body["choices"][0]["text"]),
        ("/v1/responses", {"input": "Hi."}, lambda body: body["output"][0]["content"][0]["text"]),
    ],
)
def test_a_batch_of_another_endpoint(client: OpenAI, endpoint: str, body: dict[str, Any], where: Any) -> None:
    limit = {"max_output_tokens": 2} if endpoint == "/v1/responses" else {"max_tokens": 2}
    batch = run_batch(client, jsonl({"custom_id": "a", "url": endpoint, "body": {**body, **limit}}), endpoint=endpoint)
    assert batch.status == "completed"
    assert where(entries(client, batch.output_file_id)["a"]["response"]["body"])


def test_good_lines_run_beside_bad_ones_which_are_named(client: OpenAI) -> None:
    content = jsonl(
        chat_line("good-1"),
        '{"custom_id": "cut", "body": {"messages"\n',
        chat_line("good-1"),
        "\n",
        chat_line("embed", url="/v1/audio/speech"),
        {"custom_id": "other", "url": "/v1/completions", "body": {"prompt": "Hi."}},
        chat_line("model", body={"model": "gpt-99"}),
        chat_line("past", deadline="2020-01-01T00:00:00Z"),
        chat_line("negative", body={"max_tokens": -1}),
        chat_line("tools", body={"tools": [{"type": "function"}]}),
        chat_line("good-2"),
    )
    batch = run_batch(client, content)
    assert batch.status == "completed"
    assert batch.request_counts is not None
    assert batch.request_counts.model_dump() == {"total": 10, "completed": 2, "failed": 8}
    assert set(entries(client, batch.output_file_id)) == {"good-1", "good-2"}
    lines = client.files.content(batch.error_file_id or "").text.splitlines()
    said = {e["custom_id"]: e["error"]["message"] for e in map(json.loads, lines)}
    assert len(lines) == 8
    assert "line 2: not JSON" in said[None]
    for custom_id, words in {
        "good-1": ("line 3", "custom_id", "earlier line"),
        "embed": ("line 5", "url", "/v1/audio/speech"),
        "other": ("line 6", "url"),
        "model": ("line 7", "model", "gpt-99"),
        "past": ("line 8", "deadline", "has passed"),
        "negative": ("line 9", "max_tokens"),
        "tools": ("line 10", "tools"),
    }.items():
        for word in words:
            assert word in said[custom_id]
    assert batch.errors is not None
    assert [e.line for e in batch.errors.data or []] == [2, 3, 5, 6, 7, 8, 9, 10]


@pytest.mark.parametrize(("content", "named"), [(b"", "no lines"), (b"\n\n", "no lines"), (b"nonsense\n", "line 1")])
def test_a_batch_without_a_good_line_fails_and_says_why(client: OpenAI, content: bytes, named: str) -> None:
    batch = run_batch(client, content)
    assert batch.status == "failed"
    assert batch.errors is not None
    assert named in (batch.errors.data or [])[0].message


def test_a_batch_whose_window_is_over_returns_what_was_done(client: OpenAI) -> None:
    quick = [chat_line(f"quick{n}") for n in range(2)]
    slow = [chat_line(f"slow{n}", body=LONG) for n in range(40)]
    batch = run_batch(client, jsonl(*quick, *slow), window="3s")
    assert batch.status == "expired"
    assert batch.expired_at is not None
    output, errors = entries(client, batch.output_file_id), entries(client, batch.error_file_id)
    assert {"quick0", "quick1"} <= set(output)
    assert set(output) | set(errors) == {line["custom_id"] for line in [*quick, *slow]}
    assert {e["error"]["code"] for e in errors.values()} == {"batch_expired"}


def test_a_batch_is_cancelled_half_way(client: OpenAI) -> None:
    content = jsonl(*(chat_line(f"c{n}", body=LONG) for n in range(20)))
    file = client.files.create(file=("long.jsonl", content), purpose="batch")
    made = client.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h")
    eventually(lambda: client.batches.retrieve(made.id).status == "in_progress", "it runs")
    with pytest.raises(openai.BadRequestError, match="not ended"):
        client.files.delete(file.id)
    assert client.batches.cancel(made.id).status in ("cancelling", "cancelled")
    batch = ended(client, made.id)
    assert batch.status == "cancelled"
    assert batch.cancelled_at is not None
    outcomes = {**entries(client, batch.output_file_id), **entries(client, batch.error_file_id)}
    assert len(outcomes) == 20
    assert client.batches.cancel(made.id).status == "cancelled"


def test_a_line_keeps_its_own_deadline(client: OpenAI, api: ApiProcess) -> None:
    batch = run_batch(client, jsonl(chat_line("hasty", deadline=0.5, body=LONG), chat_line("easy")), window="1h")
    assert batch.status == "completed"
    error = entries(client, batch.error_file_id)["hasty"]["error"]
    assert error["code"] in ("task_expired", "task_rejected")


def test_pages_of_batches_and_files_are_walked_to_the_end(api: ApiProcess) -> None:
    mine = api.openai(tenant="pager")
    ids = [mine.files.create(file=(f"{n}.txt", b"x"), purpose="user_data").id for n in range(5)]
    assert [f.id for f in mine.files.list(limit=2)] == ids[::-1]
    assert [f.id for f in mine.files.list(limit=2, order="asc")] == ids
    made = [run_batch(mine, b"nonsense\n").id for _ in range(3)]
    assert [b.id for b in mine.batches.list(limit=1)] == made[::-1]


# --- webhooks


def make_hook(http: httpx.Client, url: str, *events: str) -> dict[str, Any]:
    made = http.post("/v1/webhooks", json={"url": url, "events": list(events)})
    assert made.status_code == 200, made.text
    return dict(made.json())


def deliveries(http: httpx.Client, hook: dict[str, Any]) -> list[dict[str, Any]]:
    return list(http.get(f"/v1/webhooks/{hook['id']}/deliveries").json()["data"])


def test_a_webhook_hears_what_it_asked_for_signed(api: ApiProcess) -> None:
    http, client = api.http("hooked"), api.openai("hooked")
    with Sink(SINK, 204) as sink:
        hook = make_hook(http, sink.url, "task.succeeded", "batch.completed")
        done = client.chat.completions.create(model="auto", messages=ASK, max_tokens=1, metadata={"order": "7"})
        cancelled = client.responses.create(
            model="auto", input="Say words.", max_output_tokens=1900, background=True, extra_body=FOREVER
        )
        client.responses.cancel(cancelled.id)
        batch = run_batch(client, jsonl(chat_line("a")))
        eventually(lambda: len(sink.received) >= 2, "both are told of")
        told = [Webhook(hook["secret"]).verify(body, headers) for headers, body in sink.received]
        by_type = {t["type"]: t["data"] for t in told}
        assert set(by_type) == {"task.succeeded", "batch.completed"}  # neither the cancelled one, nor the batch's line
        assert by_type["task.succeeded"]["id"] == done.id
        assert by_type["task.succeeded"]["metadata"] == {"order": "7"}
        assert by_type["task.succeeded"]["energy"]["total"] > 0
        assert by_type["batch.completed"]["id"] == batch.id
        eventually(lambda: {d["state"] for d in deliveries(http, hook)} == {"delivered"}, "both are noted")
        first = deliveries(http, hook)[-1]
        assert first["attempts"][0]["status"] == 204
        again = http.post(f"/v1/webhooks/{hook['id']}/deliveries/{first['id']}/replay")
        assert again.json()["state"] == "pending"
        eventually(lambda: len(sink.received) >= 3, "it is told again")
        assert sink.received[-1][0]["webhook-id"] == first["event_id"]
    assert "secret" not in http.get(f"/v1/webhooks/{hook['id']}").json()
    assert http.delete(f"/v1/webhooks/{hook['id']}").json()["deleted"]
    assert http.get(f"/v1/webhooks/{hook['id']}").status_code == 404


def test_openai_reads_its_own_events(api: ApiProcess) -> None:
    http, client = api.http("theirs"), api.openai("theirs")
    names = [f"response.{end}" for end in ("completed", "failed", "cancelled", "incomplete")]
    with Sink(SINK, 204) as sink:
        hook = make_hook(http, sink.url, *names, "batch.completed")
        asked: dict[str, Any] = {"model": "auto", "input": "Say words.", "background": True}
        gone = client.responses.create(**asked, max_output_tokens=1900, extra_body=FOREVER)
        client.responses.cancel(gone.id)
        full = client.responses.create(**asked, extra_body={"grammar": 'root ::= "a"'})
        cut = client.responses.create(**asked, max_output_tokens=16, extra_body={"grammar": 'root ::= "word " root'})
        late = client.responses.create(**asked, extra_body={"deadline": 0.001})
        client.responses.create(model="auto", input="Hi", max_output_tokens=16)  # waited for: no event
        batch = run_batch(client, jsonl(chat_line("a")))
        eventually(lambda: len(sink.received) >= 5, "all are told of")
    told = [client.webhooks.unwrap(body, headers, secret=hook["secret"]) for headers, body in sink.received]
    assert {(type(t).__name__, t.data.id) for t in told} == {  # type: ignore[union-attr]
        ("ResponseCompletedWebhookEvent", full.id),
        ("ResponseIncompleteWebhookEvent", cut.id),
        ("ResponseFailedWebhookEvent", late.id),
        ("ResponseCancelledWebhookEvent", gone.id),
        ("BatchCompletedWebhookEvent", batch.id),
    }
    assert len({t.id for t in told}) == 5
    http.delete(f"/v1/webhooks/{hook['id']}")


def test_a_receiver_that_fails_is_tried_again_later_and_redirects_are_not_followed(api: ApiProcess) -> None:
    http, client = api.http("unlucky"), api.openai("unlucky")
    with Sink(SINK, 302) as sink:
        hook = make_hook(http, sink.url, "task.succeeded")
        client.chat.completions.create(model="auto", messages=ASK, max_tokens=1)

        def tried() -> dict[str, Any] | None:
            return next((d for d in deliveries(http, hook) if d["attempts"]), None)

        delivery = eventually(tried, "it is tried")
        assert delivery["state"] == "pending"
        assert delivery["attempts"][0]["error"] == "HTTP 302"
        assert delivery["next_attempt"] > delivery["attempts"][0]["at"] + 3
        assert len(sink.received) == 1  # and nobody went elsewhere
    http.delete(f"/v1/webhooks/{hook['id']}")


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:9/x", "http://localhost/x", "http://[::1]/x", "http://[::ffff:127.0.0.1]/x",
        "http://169.254.169.254/latest/meta-data", "http://10.0.0.1/", "http://0.0.0.0/", "http://2130706433/",
        "http://[64:ff9b::7f00:1]/", "http://[fe80::1]/", "ftp://example.com/", "http://user:pw@example.com/",
        "http://", "nonsense", "http://no-such-host.invalid/", "http://example.com:99999/", 5, None,
    ],
)  # fmt: skip
def test_a_webhook_into_a_private_network_is_refused(api: ApiProcess, url: object) -> None:
    answer = api.http().post("/v1/webhooks", json={"url": url})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "url"


# --- keys and tenants


def test_tenants_see_nothing_of_each_other(api: ApiProcess) -> None:
    mine, theirs = api.http("one-tenant"), api.http("another")
    task = mine.post("/v1/tasks", json={"prompt": "Hi.", "max_tokens": 1}).json()["id"]
    file = mine.post("/v1/files", files={"file": ("a.jsonl", b"nonsense\n")}, data={"purpose": "batch"}).json()["id"]
    asked = {"input_file_id": file, "endpoint": "/v1/completions", "completion_window": "1h"}
    batch = mine.post("/v1/batches", json=asked).json()["id"]
    with Sink(SINK, 200) as sink:
        hook = make_hook(mine, sink.url, "batch.failed")["id"]
    paths = {
        f"/v1/tasks/{task}": task,
        f"/v1/tasks/{task}/explain": task,
        f"/v1/responses/{task}": task,
        f"/v1/files/{file}": file,
        f"/v1/files/{file}/content": file,
        f"/v1/batches/{batch}": batch,
        f"/v1/webhooks/{hook}": hook,
        f"/v1/webhooks/{hook}/deliveries": hook,
    }
    for path, identity in paths.items():
        assert mine.get(path).status_code == 200, path
        seen, unknown = theirs.get(path), theirs.get(path.replace(identity, "nobody"))
        assert seen.status_code == unknown.status_code == 404
        assert seen.text.replace(identity, "nobody") == unknown.text  # not even that it exists
    for path in (f"/v1/tasks/{task}/cancel", f"/v1/responses/{task}/cancel", f"/v1/batches/{batch}/cancel"):
        assert theirs.post(path).status_code == 404
    assert theirs.post("/v1/batches", json=asked).status_code == 404
    assert theirs.post("/v1/responses", json={"input": "x", "previous_response_id": task}).status_code == 404
    assert theirs.delete(f"/v1/files/{file}").status_code == 404
    assert theirs.delete(f"/v1/webhooks/{hook}").status_code == 404
    for kind in ("tasks", "files", "batches", "webhooks"):
        assert [x["id"] for x in mine.get(f"/v1/{kind}").json()["data"]]
        assert theirs.get(f"/v1/{kind}").json()["data"] == []
    mine.delete(f"/v1/webhooks/{hook}")


def test_a_revoked_key_is_refused(api: ApiProcess) -> None:
    environment = {**os.environ, "PERLLM_REDIS_URL": api.settings.url}

    def keys(*arguments: str) -> Any:
        command = [sys.executable, "-m", "perllm.broker.api", "keys", *arguments, "--json"]
        return json.loads(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)

    made = keys("make", "--tenant", "short", "--name", "ci")
    assert httpx.get(f"{api.base}/v1/models", headers={"Authorization": f"Bearer {made['key']}"}).status_code == 200
    listed = {row["id"]: row for row in keys("list")}
    assert listed[made["id"]]["tenant"] == "short"
    assert made["key"] not in json.dumps(listed)
    stored = b"".join(api.store.client.get(k) or b"" for k in api.store.client.keys("*api:key:*"))
    assert made["key"].split("_", 2)[2].encode() not in stored
    assert keys("revoke", made["id"])["revoked"]

    def refused() -> bool:
        headers = {"Authorization": f"Bearer {made['key']}"}
        return httpx.get(f"{api.base}/v1/models", headers=headers).status_code == 401

    eventually(refused, "it is refused")


def test_limits_of_a_key_say_when_to_try_again(api: ApiProcess) -> None:
    rated = httpx.Client(base_url=api.base, headers={"Authorization": f"Bearer {api.key('limited', rate=2)}"})
    answers = [rated.get("/v1/models") for _ in range(6)]
    refused = [a for a in answers if a.status_code == 429]
    assert 1 <= len(refused) < 6
    assert int(refused[0].headers["retry-after"]) >= 1
    assert refused[0].json()["error"]["code"] == "rate_limit_exceeded"
    few = httpx.Client(base_url=api.base, headers={"Authorization": f"Bearer {api.key('limited', in_flight=2)}"})
    long = {"prompt": "Say words.", **ENDLESS, "deadline": 600}
    ids = [few.post("/v1/tasks", json=long).json()["id"] for _ in range(2)]
    third = few.post("/v1/tasks", json=long)
    assert third.status_code == 429
    assert third.json()["error"]["code"] == "in_flight_limit_exceeded"
    assert int(third.headers["retry-after"]) >= 1
    for task_id in ids:
        few.post(f"/v1/tasks/{task_id}/cancel")
    last = few.post("/v1/tasks", json={"tasks": [{"prompt": "Hi.", "max_tokens": 1}] * 2})
    assert last.status_code == 200


# --- the native endpoints


def test_tasks_are_submitted_listed_cancelled_and_explained(api: ApiProcess) -> None:
    http = api.http("native")
    tasks = [{"prompt": f"Say {n}.", "max_tokens": 1, "service": f"s{n % 2}"} for n in range(4)]
    many = http.post("/v1/tasks", json={"tasks": tasks}).json()["data"]
    ids = [task["id"] for task in many]
    assert [t["id"] for t in http.get("/v1/tasks").json()["data"]] == ids[::-1]
    assert [t["id"] for t in http.get("/v1/tasks", params={"service": "s1"}).json()["data"]] == [ids[3], ids[1]]
    page = http.get("/v1/tasks", params={"limit": 3}).json()
    assert page["has_more"]
    rest = http.get("/v1/tasks", params={"after": page["last_id"]}).json()
    assert [t["id"] for t in rest["data"]] == ids[:1]
    for task_id in ids:
        eventually(lambda i=task_id: http.get(f"/v1/tasks/{i}").json()["state"] == "succeeded", "it is done")
    assert http.get("/v1/tasks", params={"state": "pending"}).json()["data"] == []
    assert http.get(f"/v1/tasks/{ids[0]}").json()["result"]["output"]["text"]
    assert http.delete(f"/v1/tasks/{ids[3]}").json() == {"id": ids[3], "object": "task", "deleted": True}
    assert http.get(f"/v1/tasks/{ids[3]}").status_code == 404
    assert [t["id"] for t in http.get("/v1/tasks").json()["data"]] == ids[2::-1]
    explained = http.get(f"/v1/tasks/{ids[0]}/explain").json()
    assert explained["node"] == "one"
    assert explained["sentence"]
    long = http.post("/v1/tasks", json={"prompt": "Say words.", **ENDLESS, "deadline": 600}).json()["id"]
    assert http.post(f"/v1/tasks/{long}/cancel").json()["state"] == "cancelled"
    api.ledger.register(node_info("mortal"))
    redis_of(api.ledger).zadd("{perllm}:nodes", {"mortal": 1})
    states = eventually(
        lambda: "dead" in (s := {n["name"]: n["state"] for n in http.get("/v1/nodes").json()["data"]}).values() and s,
        "it is found dead",
    )
    redis_of(api.ledger).hdel("{perllm}:gone", "mortal")
    assert states == {"one": "up", "mortal": "dead"}


def test_a_repeated_request_is_the_first_one(api: ApiProcess) -> None:
    http = api.http("again")
    body = {"model": "auto", "messages": ASK, "max_tokens": 2, "temperature": 0}
    answers = [http.post("/v1/chat/completions", json=body, headers={"Idempotency-Key": "k1"}) for _ in range(2)]
    assert answers[0].json()["id"] == answers[1].json()["id"]
    other = http.post("/v1/chat/completions", json={**body, "max_tokens": 3}, headers={"Idempotency-Key": "k1"})
    assert other.status_code == 422
    assert other.json()["error"]["param"] == "idempotency_key"


def test_extensions_travel_as_headers_too(api: ApiProcess) -> None:
    http = api.http("headers")
    headers = {"X-PerLLM-Deadline": "45", "X-PerLLM-Value": "0.5", "X-PerLLM-Service": "front"}
    task_id = http.post("/v1/responses", json={"input": "Hi.", "background": True}, headers=headers).json()["id"]
    task = http.get(f"/v1/tasks/{task_id}").json()
    assert (task["value"], task["service"]) == (0.5, "front")
    assert task["deadline"] - task["submitted"] == pytest.approx(45)


def test_who_goes_away_does_not_keep_a_node_busy(api: ApiProcess) -> None:
    http = api.http("hasty")
    body = {**LONG, "deadline": 600}
    with pytest.raises(httpx.ReadTimeout):
        http.post("/v1/chat/completions", json=body, timeout=0.5)
    with http.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as stream:
        next(stream.iter_lines())
    eventually(
        lambda: {t["state"] for t in http.get("/v1/tasks").json()["data"]} == {"cancelled"}, "both are cancelled"
    )


# --- bad input


IMAGE = {"role": "user", "content": [{"type": "image_url"}]}
BATCH = {"input_file_id": "f", "endpoint": "/v1/completions", "completion_window": "24h"}


def failure(answer: httpx.Response, status: int, *words: str) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    error = dict(answer.json()["error"])
    assert set(error) >= {"message", "type", "param", "code"}
    for word in words:
        assert word in error["message"]
    return error


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("chat/completions", {"messages": ASK, "max_tokens": -1}, 400, "max_tokens"),
        ("chat/completions", {"messages": ASK, "deadline": -5}, 400, "deadline"),
        ("chat/completions", {"messages": ASK, "deadline": "2020-01-01T00:00:00Z"}, 400, "deadline"),
        ("chat/completions", {"messages": ASK, "deadline": "tomorrow"}, 400, "deadline"),
        ("chat/completions", {"messages": ASK, "model": "gpt-99"}, 404, "model"),
        ("chat/completions", {"messages": ASK, "model": 5}, 400, "model"),
        ("chat/completions", {"messages": ASK, "n": 17}, 400, "n"),
        ("chat/completions", {"messages": ASK, "tools": [{"type": "function"}]}, 400, "tools.0.name"),
        ("chat/completions", {"messages": ASK, "tenant": "root"}, 400, "tenant"),
        ("chat/completions", {"messages": ASK, "stream": "yes"}, 400, "stream"),
        ("chat/completions", {"messages": []}, 400, "messages"),
        ("chat/completions", {"messages": "hi"}, 400, "messages"),
        ("chat/completions", {"messages": [IMAGE]}, 400, "messages.0.content.0"),
        ("chat/completions", {"messages": [{"role": "user", "content": "\ud800"}]}, 400, None),
        ("chat/completions", {}, 400, "messages"),
        ("chat/completions", {"messages": ASK, "temperature": 9}, 400, "temperature"),
        ("chat/completions", {"messages": ASK, "max_tokens": 10**6}, 400, "max_tokens"),
        ("completions", {"prompt": []}, 400, "prompt"),
        ("completions", {"prompt": [-1]}, 400, "prompt"),
        ("completions", {"prompt": "x", "value": "much"}, 400, "value"),
        ("chat/completions", {"messages": ASK, "max_completion_tokens": 0}, 400, "max_completion_tokens"),
        ("chat/completions", {"messages": ASK, "tools": [], "tool_choice": "required"}, 400, "tool_choice"),
        ("chat/completions", {"messages": ASK, "prediction": {"type": "content"}}, 400, "prediction"),
        ("chat/completions", {"messages": [{"role": "tool", "content": "x", "tool_call_id": "y"}]}, 400, "messages.0"),
        ("responses", {"input": "x", "max_output_tokens": 0}, 400, "max_output_tokens"),
        ("responses", {"input": "x", "conversation": "y"}, 400, "conversation"),
        ("responses", {"input": "x", "tools": [{"type": "mcp"}]}, 400, "tools.0.type"),
        ("responses", {"input": [{"type": "item_reference", "id": "msg_nobody"}]}, 404, "id"),
        ("responses", {"input": "x", "previous_response_id": "nobody"}, 404, "id"),
        ("responses", {}, 400, "input"),
        ("tasks", {"prompt": "x", "messages": ASK}, 400, None),
        ("tasks", {"tasks": [{"prompt": "x"}, {"prompt": ""}]}, 400, "tasks.1.prompt"),
        ("tasks", {"tasks": []}, 400, "tasks"),
        ("tasks", {"tasks": [{"prompt": "x"}], "deadline": 5}, 400, "deadline"),
        ("batches", {**BATCH, "input_file_id": None}, 400, "input_file_id"),
        ("batches", {**BATCH, "endpoint": "/v1/audio/speech"}, 400, "endpoint"),
        ("batches", {**BATCH, "completion_window": "90d"}, 400, "completion_window"),
        ("batches", {**BATCH, "output_expires_after": {"seconds": 5}}, 400, "output_expires_after"),
        ("batches", BATCH, 404, "input_file_id"),
        ("webhooks", {"url": "https://example.com", "events": ["task.begun"]}, 400, "events"),
    ],
)  # fmt: skip
def test_a_bad_field_is_named(api: ApiProcess, path: str, body: dict[str, Any], status: int, param: str | None) -> None:
    raw = json.dumps(body).encode()
    error = failure(api.http().post(f"/v1/{path}", content=raw), status)
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize("raw", [b"", b"nonsense", b"[1]", b"\xff\xfe", b"[" * 100_000, b'{"a": NaN}', b"1" * 5000])
def test_a_body_that_is_no_json_object_is_refused(api: ApiProcess, raw: bytes) -> None:
    failure(api.http().post("/v1/chat/completions", content=raw), 400, "body")


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "a/b.jsonl", "..\\b", "..", "", "a\x00b", "x" * 300, "line\nbreak"]
)
def test_a_file_name_that_is_a_path_is_refused(api: ApiProcess, name: str) -> None:
    head = f'Content-Disposition: form-data; name="file"; filename="{name}"\r\n\r\nx'
    purpose = 'Content-Disposition: form-data; name="purpose"\r\n\r\nbatch'
    body = f"--b\r\n{head}\r\n--b\r\n{purpose}\r\n--b--\r\n".encode()
    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    answer = api.http().post("/v1/files", content=body, headers=headers)
    assert answer.status_code == 400, answer.text


def test_an_upload_that_was_cut_short_is_refused_and_nothing_is_kept(api: ApiProcess) -> None:
    http = api.http("cut")
    purpose = b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
    half = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n{"custom_id": '
    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    failure(http.post("/v1/files", content=purpose + half, headers=headers), 400, "file")
    key = http.headers["Authorization"]
    with socket.create_connection(("127.0.0.1", api.port)) as connection:
        head = f"POST /v1/files HTTP/1.1\r\nHost: x\r\nAuthorization: {key}\r\nContent-Length: 100000\r\n"
        connection.sendall(head.encode() + b"Content-Type: multipart/form-data; boundary=b\r\n\r\n" + purpose + half)
    assert http.get("/v1/files").json()["data"] == []


def test_more_than_200_mb_is_refused_before_it_is_read(api: ApiProcess) -> None:
    with socket.create_connection(("127.0.0.1", api.port)) as connection:
        key = api.http().headers["Authorization"]
        head = f"POST /v1/files HTTP/1.1\r\nHost: x\r\nAuthorization: {key}\r\nContent-Length: 201000000\r\n\r\n"
        connection.sendall(head.encode())
        assert connection.recv(4096).startswith(b"HTTP/1.1 413")


def test_more_than_is_allowed_is_refused_though_no_length_was_given(api: ApiProcess) -> None:
    def endless() -> Iterator[bytes]:
        for _ in range(10):
            yield b"x" * (1 << 20)

    failure(api.http().post("/v1/tasks", content=endless()), 413, "bytes")


def test_a_huge_header_is_refused(api: ApiProcess) -> None:
    with socket.create_connection(("127.0.0.1", api.port)) as connection, contextlib.suppress(OSError):
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nX-Big: ")
        for _ in range(160):
            connection.sendall(b"x" * 65_536)
    assert api.http().get("/health").status_code == 200
    with socket.create_connection(("127.0.0.1", api.port)) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nX-Big: " + b"x" * 40_000)
        assert connection.recv(4096).startswith(b"HTTP/1.1 4")


@pytest.mark.parametrize("sent", [b"", b"POST /v1/tasks HTTP/1.1\r\nHo", b"HEAD"])
def test_who_sends_nothing_for_long_is_hung_up_on(api: ApiProcess, sent: bytes) -> None:
    with socket.create_connection(("127.0.0.1", api.port), timeout=30) as connection:
        connection.sendall(sent)
        assert connection.recv(4096) == b""


def test_a_body_that_does_not_come_is_given_up(api: ApiProcess) -> None:
    key = api.http().headers["Authorization"]
    with socket.create_connection(("127.0.0.1", api.port), timeout=30) as connection:
        head = f"POST /v1/tasks HTTP/1.1\r\nHost: x\r\nAuthorization: {key}\r\nContent-Length: 1000\r\n\r\n"
        connection.sendall(head.encode() + b"{")
        answer = connection.makefile("rb").read()
    assert answer.startswith(b"HTTP/1.1 408")
    assert b'"error"' in answer


def test_cors_is_off(api: ApiProcess) -> None:
    answer = api.http().get("/v1/models", headers={"Origin": "https://evil.example"})
    assert "access-control-allow-origin" not in answer.headers


# --- metrics


def scraped(client: httpx.Client) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Every sample of `/metrics` by its name and labels."""
    answer = client.get("/metrics")
    assert answer.status_code == 200
    families = text_string_to_metric_families(answer.text)
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}


def test_metrics_tell_of_tasks_nodes_and_requests(api: ApiProcess) -> None:
    assert httpx.get(f"{api.base}/metrics").status_code == 401
    client = api.http("watcher", operator=True)
    before = scraped(client)
    submitted = client.post("/v1/tasks", json={"prompt": "hi", "max_tokens": 2, "deadline": 60}).json()["id"]
    client.get(f"/v1/tasks/{submitted}")
    client.get("/no/such/path")
    eventually(lambda: client.get(f"/v1/tasks/{submitted}").json()["state"] == "succeeded", "it is done")
    after = scraped(client)

    def grown(name: str, **labels: str) -> float:
        key = name, tuple(sorted(labels.items()))
        return after[key] - before.get(key, 0.0)

    assert grown("perllm_tasks_ever_total", event="submitted") == 1
    assert grown("perllm_tasks_ever_total", event="succeeded") == 1
    assert grown("perllm_tasks", state="succeeded") == 1
    assert after["perllm_scheduler_leads", ()] == 1
    of_node = {"node": "one", "tier": "edge"}
    eventually(lambda: scraped(client)["perllm_node_tokens_total", tuple(of_node.items())] > 0, "it beats")
    assert after["perllm_node_slots", tuple(of_node.items())] == api.ledger.nodes()[0][0].slots
    assert after["perllm_node_silent_seconds", tuple(of_node.items())] < 60
    requests = "perllm_api_request_seconds_count"
    assert grown(requests, method="POST", route="/v1/tasks", status="200") == 1
    assert grown(requests, method="GET", route="/v1/tasks/{id}", status="200") >= 2
    assert grown(requests, method="GET", route="none", status="404") == 1
    plain = api.http("watcher")
    name = "perllm_generation_tokens_total"
    own = eventually(lambda: (s := scraped(plain)) and (name in {n for n, _ in s}) and s, "it is counted")
    assert {dict(labels)["tenant"] for _, labels in own} == {"watcher"}
    assert sum(value for (n, _), value in own.items() if n == name) == 2
    assert own.items() <= scraped(client).items()
    assert scraped(api.http("nobody")) == {}


# --- logs


def logged(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Every line of every part's log, by the part's name."""
    logs = [*folder.glob("logs/*.log"), *folder.glob("api-*.log"), folder / "webhooks.log"]
    return {log.stem.partition("-")[0]: [json.loads(line) for line in log.read_text().splitlines()] for log in logs}


def test_a_request_is_found_in_every_parts_log_by_its_name_its_trace_and_its_task(api: ApiProcess) -> None:
    folder, trace = api.log.parent, "0af7651916cd43dd8448eb211c80319c"
    headers = {"x-request-id": "mine:1", "traceparent": f"00-{trace}-b7ad6b7169203331-01"}
    done = api.openai().chat.completions.create(model="auto", messages=ASK, max_tokens=1, extra_headers=headers)
    assert done._request_id == "mine:1"
    told = {"api": ["task_submitted"], "scheduler": ["task_decided"], "edge.one": ["task_claimed", "task_ended"]}

    def of_it() -> dict[str, list[str]]:
        found = {part: [x for x in lines if x.get("task_id") == done.id] for part, lines in logged(folder).items()}
        assert all((x["request_id"], x["trace_id"]) == ("mine:1", trace) for lines in found.values() for x in lines)
        return {part: [x["event"] for x in lines] for part, lines in found.items() if lines}

    eventually(lambda: of_it() == told, "all have told of it")  # and every line they ever wrote was JSON
    other = api.openai().chat.completions.create(model="auto", messages=ASK, max_tokens=1)
    assert other._request_id
    assert other._request_id.startswith("req_")


def test_a_batchs_tasks_have_the_name_of_the_request_that_made_it(api: ApiProcess) -> None:
    client = api.openai("named", default_headers={"x-request-id": "a-batch"})
    batch = run_batch(client, jsonl(chat_line("a"), chat_line("b")))
    made = [x for x in logged(api.log.parent)["api"] if x.get("task_id", "").startswith(batch.id)]
    assert [x["request_id"] for x in made] == ["a-batch", "a-batch"]
