"""The HTTP API as its users meet it: the official client, a running system, the real small model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai import OpenAI
from openai.types import Batch
from support.api import ApiProcess
from support.wait import eventually

from broker.settings import Settings
from broker.stack import Stack

ASK = [{"role": "user", "content": "Why is the sky blue?"}]


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiProcess]:
    folder = tmp_path_factory.mktemp("api")
    with (
        Stack(Settings(data_dir=folder), edges=("one",), clouds=()) as stack,
        ApiProcess(stack.url, folder) as running,
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
        model="auto", input="Tell me a very long story.", max_output_tokens=1500, background=True
    )
    cancelled = client.responses.cancel(made.id)
    assert cancelled.status == "cancelled"
    assert client.responses.retrieve(made.id).status == "cancelled"
    assert client.responses.cancel(made.id).status == "cancelled"


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
        chat_line("embed", url="/v1/embeddings"),
        chat_line("other", url="/v1/completions"),
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
        "embed": ("line 5", "url", "/v1/embeddings"),
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
    slow = [chat_line(f"slow{n}", body={"max_tokens": 1500}) for n in range(30)]
    batch = run_batch(client, jsonl(*quick, *slow), window="5s")
    assert batch.status == "expired"
    assert batch.expired_at is not None
    output, errors = entries(client, batch.output_file_id), entries(client, batch.error_file_id)
    assert {"quick0", "quick1"} <= set(output)
    assert set(output) | set(errors) == {line["custom_id"] for line in [*quick, *slow]}
    assert {e["error"]["code"] for e in errors.values()} <= {"batch_expired", "task_rejected"}
    assert "batch_expired" in {e["error"]["code"] for e in errors.values()}


def test_a_batch_is_cancelled_half_way(client: OpenAI) -> None:
    content = jsonl(*(chat_line(f"c{n}", body={"max_tokens": 1500}) for n in range(20)))
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
    slow = {"max_tokens": 1500}
    batch = run_batch(client, jsonl(chat_line("hasty", deadline=0.5, body=slow), chat_line("easy")), window="1h")
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
