"""Embeddings and reranking through the whole system, by every way in: two nodes with tiny real models, one that does
neither."""

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

import openai
import pytest
from openai import OpenAI
from support import users
from support.api import ApiProcess
from support.cluster import Cluster
from support.tiny_gguf import RANK, tiny_bert
from support.wait import eventually

from perllm import AsyncClient, Client
from perllm.broker.engine.contract import EngineError, Stop
from perllm.broker.errors import InvalidTask, TaskFailed
from perllm.broker.ledger import query
from perllm.broker.local.server import EmbeddedServer
from perllm.broker.messages import State, TaskSpec
from perllm.broker.vectors import unpack
from perllm.cloud_worker.remote_engine import RemoteEngine
from perllm.cloud_worker.settings import CloudSettings

TEXTS = ["the sky", "word", "hello world, the sky is 42!"]
#: What the embedding model's vectors have, and its longest input.
WIDTH, CONTEXT = 32, 128


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiProcess]:
    folder = tmp_path_factory.mktemp("embeddings")
    bert, rank = tiny_bert(folder / "bert.gguf"), tiny_bert(folder / "rank.gguf", pooling=RANK)
    with EmbeddedServer(folder, users=users.rules()) as server, Cluster(server.url, folder) as cluster:
        cluster.scheduler()
        nodes = [
            cluster.start_node("b", engine="llama", model=bert, threads=1),
            cluster.start_node("r", engine="llama", model=rank, threads=1),
        ]
        for node in nodes:
            cluster.await_node(node)
        with ApiProcess(users.url_of("api", server.url), folder, max_result_bytes=200_000) as running:
            yield running
        assert users.denied(server.url) == []


@pytest.fixture(scope="module")
def client(api: ApiProcess) -> OpenAI:
    return api.openai()


@pytest.fixture(scope="module")
def producer(api: ApiProcess) -> Iterator[Client]:
    with Client(users.url_of("producer", api.settings.url)) as one:
        yield one


def is_unit(vector: list[float]) -> bool:
    return math.isclose(math.sqrt(sum(x * x for x in vector)), 1, abs_tol=1e-5)


# --- the HTTP API


def test_the_official_client_gets_vectors_in_order(client: OpenAI) -> None:
    made = client.embeddings.create(model="auto", input=TEXTS)
    assert [item.index for item in made.data] == [0, 1, 2]
    assert all(len(item.embedding) == WIDTH and is_unit(item.embedding) for item in made.data)
    assert made.model == "bert:f32"
    assert made.usage.prompt_tokens == made.usage.total_tokens > 0
    assert made.model_extra is not None
    assert made.model_extra["energy"]["inference"] > 0
    assert made.model_extra["node"] == "b"
    plain = client.embeddings.create(model="bert:f32", input=TEXTS[2], encoding_format="float").data[0].embedding
    assert plain == pytest.approx(made.data[2].embedding, abs=1e-3)


def test_token_arrays_and_dimensions(client: OpenAI) -> None:
    one, two = (client.embeddings.create(model="auto", input=i, dimensions=5) for i in ([5, 6], [[5, 6], [7]]))
    assert len(one.data) == 1
    assert len(two.data) == 2
    assert two.data[0].embedding == pytest.approx(one.data[0].embedding, abs=1e-3)
    assert len(one.data[0].embedding) == 5
    assert is_unit(one.data[0].embedding)
    assert two.usage.prompt_tokens == 3


@pytest.mark.parametrize(
    ("body", "status", "param", "words"),
    [
        ({"input": ["a", ""]}, 400, "input.1", "empty"),
        ({"input": []}, 400, "input", "required"),
        ({"input": "a", "dimensions": WIDTH + 1}, 400, "dimensions", "32"),
        ({"input": "a", "encoding_format": "int8"}, 400, "encoding_format", "base64"),
        ({"input": "a", "colour": "blue"}, 400, "colour", "not a field"),
        ({"input": [[5] * (CONTEXT + 1)]}, 400, "input", "input 0 has 129 tokens"),
        ({"input": ["a" * 9] * 2049}, 400, "input", "2048"),
        ({"input": "x" * (1 << 20) + "y"}, 400, "input", "PERLLM_MAX_PROMPT_BYTES"),
        ({"input": "a", "model": "rank:f32"}, 400, "embeddings", "bert:f32 does"),
        ({"input": "a", "model": "gpt-99"}, 404, "model", "on offer"),
        ({"input": ["a", "word " * CONTEXT]}, 422, None, "input 1 has 130 tokens; the model takes 128"),
    ],
)
def test_what_is_wrong_is_named(api: ApiProcess, body: dict[str, Any], status: int, param: Any, words: str) -> None:
    answer = api.http().post("/v1/embeddings", json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (status, param), error
    assert words in error["message"]


def test_documents_are_ranked(api: ApiProcess) -> None:
    asked = {"query": "the sky", "documents": [TEXTS[1], {"text": TEXTS[2]}, "z"]}
    answer = api.http().post("/v1/rerank", json=asked).json()
    scores = [found["relevance_score"] for found in answer["results"]]
    assert scores == sorted(scores, reverse=True)
    assert {found["index"]: found["document"]["text"] for found in answer["results"]} == dict(
        enumerate([TEXTS[1], TEXTS[2], "z"])
    )
    assert answer["model"] == "rank:f32"
    assert answer["usage"]["total_tokens"] > 0
    best = api.http().post("/v1/rerank", json={**asked, "top_n": 1, "return_documents": False}).json()["results"]
    assert [set(found) for found in best] == [{"index", "relevance_score"}]
    assert best[0]["index"] == answer["results"][0]["index"]


def test_many_inputs_are_one_request_up_to_what_may_be_stored(api: ApiProcess) -> None:
    http = api.http()
    answer = http.post("/v1/embeddings", json={"input": ["word"] * 1000})
    assert len(answer.json()["data"]) == 1000
    refused = http.post("/v1/embeddings", json={"input": ["word"] * 2048})
    assert refused.status_code == 400
    assert "give at most 1171 inputs, or fewer 'dimensions'" in refused.json()["error"]["message"]
    assert http.post("/v1/embeddings", json={"input": ["word"] * 2048, "dimensions": 8}).status_code == 200


def test_a_batch_of_embeddings_and_one_of_ranks(client: OpenAI) -> None:
    def run(endpoint: Any, *bodies: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        lines = [{"custom_id": f"c{n}", "url": endpoint, "body": body} for n, body in enumerate(bodies)]
        content = "".join(json.dumps(line) + "\n" for line in lines).encode()
        file = client.files.create(file=("lines.jsonl", content), purpose="batch")
        made = client.batches.create(input_file_id=file.id, endpoint=endpoint, completion_window="24h")
        batch = eventually(
            lambda: b if (b := client.batches.retrieve(made.id)).status == "completed" else None, "the batch is done"
        )
        files = (batch.output_file_id, batch.error_file_id)
        texts = (client.files.content(f).text.splitlines() if f else [] for f in files)
        output, errors = ({entry["custom_id"]: entry for entry in map(json.loads, lines)} for lines in texts)
        return output, errors

    output, errors = run(
        "/v1/embeddings",
        {"input": TEXTS, "model": "bert:f32"},
        {"input": TEXTS[0], "encoding_format": "base64", "dimensions": 3},
        {"input": ["a", ""]},
        {"input": "word " * CONTEXT},
    )
    assert [len(item["embedding"]) for item in output["c0"]["response"]["body"]["data"]] == [WIDTH] * 3
    assert len(unpack(output["c1"]["response"]["body"]["data"][0]["embedding"])) == 3
    assert "input.1" in errors["c2"]["error"]["message"]
    assert "input 0 has" in errors["c3"]["error"]["message"]
    output, errors = run("/v1/rerank", {"query": "the sky", "documents": TEXTS, "top_n": 2})
    assert len(output["c0"]["response"]["body"]["results"]) == 2
    assert errors == {}


def test_it_is_a_task_like_any_other(api: ApiProcess) -> None:
    http = api.http()
    made = http.post("/v1/tasks", json={"kind": "embed", "inputs": TEXTS, "service": "docs"}).json()["id"]
    seen = eventually(
        lambda: t if (t := http.get(f"/v1/tasks/{made}").json())["state"] == "succeeded" else None, "it is done"
    )
    assert len(seen["result"]["output"]["vectors"]) == 3
    assert seen["prompt"] == TEXTS[0]
    assert "dispatch" in http.get(f"/v1/tasks/{made}/explain").text
    listed = http.get("/v1/tasks", params={"service": "docs"}).json()["data"]
    assert "vectors" not in json.dumps(listed)


# --- our own client and command


def test_the_client_embeds_as_many_as_there_are(producer: Client) -> None:
    many = [f"word {number}" for number in range(600)]
    vectors = producer.embed(many, dimensions=4)
    assert [len(vector) for vector in vectors] == [4] * 600
    assert vectors[599] == pytest.approx(producer.embed([many[599]], dimensions=4)[0], abs=1e-3)
    with pytest.raises(TaskFailed, match="input 1 has 130 tokens"):
        producer.embed(["a", "word " * CONTEXT])
    for wrong in ("a text", [], [""]):
        with pytest.raises(InvalidTask, match="inputs"):
            producer.embed(wrong)
    result = producer.submit(kind="rerank", query="the sky", inputs=TEXTS).result(timeout=60)
    assert result.output is not None
    assert result.output.scores is not None
    assert len(result.output.scores) == 3


def test_the_asynchronous_client_embeds(producer: Client) -> None:
    async def embed() -> list[list[float]]:
        async with AsyncClient(settings=producer.settings) as client:
            return await client.embed(TEXTS, dimensions=4)

    assert asyncio.run(embed()) == [pytest.approx(vector, abs=1e-3) for vector in producer.embed(TEXTS, dimensions=4)]


def test_large_results_are_read_some_at_a_time(producer: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    handles = producer.submit_many([{"kind": "embed", "inputs": ["a"] * 20}] * 9)
    assert all(h.result(timeout=60).state is State.SUCCEEDED for h in handles)
    monkeypatch.setattr(query, "READ_BYTES", 10_000)
    groups = list(producer.ledger.readable_at_once([h.id for h in handles]))
    assert 1 < len(groups) < 9
    assert {result.id for result in producer.wait(h.id for h in handles)} == {h.id for h in handles}
    found = producer.ledger.results([*(h.id for h in handles), "nobody"])
    assert [r and r.id for r in found] == [*(h.id for h in handles), None]


def command(api: ApiProcess, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PERLLM_REDIS_URL": users.url_of("producer", api.settings.url)}
    perllm = str(Path(sys.executable).with_name("perllm"))
    done = subprocess.run(
        [perllm, *arguments], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert "Traceback" not in done.stdout + done.stderr
    return done


def test_the_command_embeds_texts_and_files(api: ApiProcess, tmp_path: Path) -> None:
    done = command(api, "embed", *TEXTS, "--dimensions", "3")
    assert [len(json.loads(line)) for line in done.stdout.splitlines()] == [3, 3, 3]
    assert "3 vector(s)" in done.stderr
    (task_id,) = api.ledger.ids(State.SUCCEEDED, newest=True, limit=1)
    assert command(api, "result", task_id).stdout == done.stdout
    refused = command(api, "embed", "a", "--dimensions", "99")
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "dimensions: 99" in refused.stderr
    lines = ['"a text"', '{"text": "b"}', '{"input": ["c", "d"], "custom_id": "mine"}', "nonsense", "", "[1]"]
    lines.append('{"custom_id": "whole", "url": "/v1/embeddings", "body": {"input": "e", "encoding_format": "base64"}}')
    file = tmp_path / "texts.jsonl"
    file.write_text("\n".join(lines))
    report = json.loads(command(api, "embed", str(file), "--dimensions", "2", "--json").stdout)
    assert (report["submitted"], report["bad_lines"]) == (4, 2)
    written = [json.loads(line) for line in (tmp_path / "texts.output.jsonl").read_text().splitlines()]
    assert [entry["custom_id"] for entry in written] == ["line-1", "line-2", "mine", "whole"]
    data = [entry["response"]["body"]["data"] for entry in written]
    assert [len(each) for each in data] == [1, 1, 2, 1]
    assert len(data[2][1]["embedding"]) == 2
    assert len(unpack(data[3][0]["embedding"])) == 2
    errors = map(json.loads, (tmp_path / "texts.errors.jsonl").read_text().splitlines())
    messages = [entry["error"]["message"] for entry in errors]
    assert [message.partition(":")[0] for message in messages] == ["line 4", "line 6"]


# --- as a remote server of another system


@pytest.fixture
def remote(api: ApiProcess) -> Iterator[RemoteEngine]:
    given: dict[str, Any] = {
        "openai_joules_per_token": 0.5,
        "openai_joules_per_prompt_token": 0.01,
        "model": "bert:f32",
    }
    engine = RemoteEngine(
        CloudSettings(engine="openai", openai_base_url=f"{api.base}/v1", openai_api_key=api.key("remote"), **given)
    )
    engine.start()
    yield engine
    engine.close()


def test_a_node_in_front_of_a_server_that_embeds(remote: RemoteEngine, producer: Client) -> None:
    (offer,) = remote.offers()
    assert (offer.name, offer.capabilities, offer.dimensions) == ("bert:f32", ("embeddings", "tokens"), WIDTH)
    inputs = [f"word {number}" for number in range(200)]  # several requests
    done = remote.generate("t", TaskSpec(kind="embed", inputs=tuple(inputs), dimensions=4), Stop(60))
    assert done.output.vectors is not None
    vectors = [unpack(vector).tolist() for vector in done.output.vectors]
    assert vectors == [pytest.approx(vector, abs=1e-3) for vector in producer.embed(inputs, dimensions=4)]
    assert done.energy.total == pytest.approx(done.prompt_tokens * 0.01)
    assert done.after.prefilled - done.before.prefilled == done.prompt_tokens
    with pytest.raises(EngineError, match=r"input 150: the server refuses it: .*130 tokens") as refused:
        remote.generate("t", TaskSpec(kind="embed", inputs=(*inputs[:150], "word " * CONTEXT)), Stop(60))
    assert not refused.value.retry
    with pytest.raises(EngineError, match="is not one to generate with"):
        remote.generate("t", TaskSpec(prompt="hi"), Stop(60))


# --- when nobody embeds


def test_a_capability_nobody_offers_is_refused_by_its_name(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="generate"):
        client.completions.create(model="auto", prompt="hi")
