"""The HTTP API as its users meet it: the official client, a running system, the real small model."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest
from openai import OpenAI
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
