"""The OpenAPI document and the API agree, both ways: what is accepted is documented and the reverse, and so for what is
answered. A new endpoint fails here until it is called below."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from openai.types import batch_create_params, completion_create_params, embedding_create_params
from openai.types.chat import completion_create_params as chat_create_params
from openai.types.responses import response_create_params
from support.api import ApiProcess, Sink
from support.cluster import Cluster
from support.wait import eventually

from perllm.broker.api.openapi.document import TASK_HEADERS
from perllm.broker.api.openapi.schemas import TaskRequest
from perllm.broker.local.server import EmbeddedServer
from perllm.broker.messages import Sampling, TaskSpec
from perllm.broker.openai.requests import OpenAIRequest

SINK = "127.0.0.2"
ASK = [{"role": "user", "content": "Why is the sky blue?"}]
BATCH = {"input_file_id": "f", "endpoint": "/v1/completions", "completion_window": "1h"}
#: Every endpoint that takes a JSON body, and the least it takes.
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": ASK},
    "/v1/completions": {"prompt": "hi"},
    "/v1/responses": {"input": "hi"},
    "/v1/embeddings": {"input": "hi"},
    "/v1/rerank": {"query": "hi", "documents": ["hi"]},
    "/v1/tasks": {"prompt": "hi"},
    "/v1/batches": BATCH,
    "/v1/webhooks": {"url": f"http://{SINK}/"},
}
#: Fields of OpenAI's own requests, as its client knows them.
OPENAI_FIELDS = {
    name
    for parameters in (
        chat_create_params.CompletionCreateParamsBase,
        completion_create_params.CompletionCreateParamsBase,
        response_create_params.ResponseCreateParamsBase,
        embedding_create_params.EmbeddingCreateParams,
        batch_create_params.BatchCreateParams,
    )
    for name in parameters.__annotations__
}


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiProcess]:
    folder = tmp_path_factory.mktemp("document")
    with EmbeddedServer(folder) as server, Cluster(server.url, folder) as cluster:
        cluster.scheduler()
        cluster.start_nodes("one", slots=8)
        with ApiProcess(server.url, folder, webhooks=server.url, webhook_allow=f'["{SINK}/32"]') as running:
            yield running


@pytest.fixture(scope="module")
def document(api: ApiProcess) -> dict[str, Any]:
    return dict(httpx.get(f"{api.base}/openapi.json").json())


def operations(document: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield f"{method.upper()} {path}", operation


def resolve(document: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    while "$ref" in schema:
        schema = document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    return schema


def body_schema(document: dict[str, Any], path: str, kind: str = "application/json") -> dict[str, Any]:
    return resolve(document, document["paths"][path]["post"]["requestBody"]["content"][kind]["schema"])


# --- requests


def test_every_json_body_is_looked_at(document: dict[str, Any]) -> None:
    taking = {w for w, o in operations(document) if "application/json" in o.get("requestBody", {}).get("content", {})}
    assert taking == {f"POST {path}" for path in BODIES}


@pytest.mark.parametrize("path", BODIES)
def test_a_field_is_accepted_if_and_only_if_it_is_documented(
    api: ApiProcess, document: dict[str, Any], path: str
) -> None:
    http, body = api.http("fields"), BODIES[path]
    documented = set(body_schema(document, path)["properties"])
    every = {name for other in BODIES for name in body_schema(document, other)["properties"]}
    accepted = set(body)
    for name in every | OPENAI_FIELDS | set(TaskSpec.model_fields) | {"nonsense"}:
        if name in body:
            continue
        answer = http.post(path, json={**body, name: [{}]})  # what few fields take, so the value may be refused
        assert answer.status_code in (200, 400, 404), (name, answer.text)
        said = answer.json()["error"]["message"] if answer.status_code == 400 else ""
        if "not a field of this request" not in said and "Extra inputs are not permitted" not in said:
            accepted.add(name)
    assert accepted == documented


@pytest.mark.parametrize("path", BODIES)
def test_what_is_required_is_documented_to_be(api: ApiProcess, document: dict[str, Any], path: str) -> None:
    schema = body_schema(document, path)
    required = set(schema.get("required", ())) | ({"prompt"} if path == "/v1/tasks" else set())  # or messages
    assert required == set(BODIES[path])
    for name in required:
        answer = api.http("fields").post(path, json={k: v for k, v in BODIES[path].items() if k != name})
        assert answer.status_code == 400, (name, answer.text)


def test_the_fields_of_an_upload_are_the_documented_ones(api: ApiProcess, document: dict[str, Any]) -> None:
    http = api.http("fields")
    documented = body_schema(document, "/v1/files", "multipart/form-data")["properties"]
    values = {"purpose": "batch", "expires_after[anchor]": "created_at", "expires_after[seconds]": "3600"}
    assert set(documented) == {"file", *values}
    assert http.post("/v1/files", files={"file": ("a", b"x")}, data=values).status_code == 200
    for name in values:
        wrong = http.post("/v1/files", files={"file": ("a", b"x")}, data={**values, name: "nonsense"})
        assert wrong.json()["error"]["param"] == name
    unknown = http.post("/v1/files", files={"file": ("a", b"x")}, data={**values, "nonsense": "x"})
    assert unknown.json()["error"]["param"] == "nonsense"


def test_sampling_fields_have_the_ranges_that_are_checked() -> None:
    wider = {"stop", "grammar", "seed", "top_k", "logit_bias", "json_schema"}  # other forms, which are translated
    for name in Sampling.model_fields.keys() & OpenAIRequest.model_fields.keys() - wider:
        documented, checked = OpenAIRequest.model_fields[name], Sampling.model_fields[name]
        assert (documented.annotation, documented.metadata) == (checked.annotation, checked.metadata), name


def test_a_tasks_fields_are_a_taskspecs_but_for_its_tenant() -> None:
    assert set(TaskRequest.model_fields) == set(TaskSpec.model_fields) - {"tenant", "request"}


def test_task_headers_are_taken_where_they_are_documented(api: ApiProcess, document: dict[str, Any]) -> None:
    http = api.http("headers")
    names = {header["name"]: field for field, header in TASK_HEADERS.items()}
    for where, operation in operations(document):
        headers = {p["name"] for p in operation.get("parameters", ()) if p["in"] == "header"}
        path = where.partition(" ")[2]
        assert headers in (set(), set(names)), where
        if headers:
            wrong = {"X-PerLLM-Deadline": "-1", "X-PerLLM-Value": "-1", "X-PerLLM-Service": "?", "Idempotency-Key": ""}
            for name in headers:
                answer = http.post(path, json=BODIES[path], headers={name: wrong[name]})
                assert answer.json()["error"]["param"] == names[name], (where, name)


# --- answers


class Comparison:
    """Compares bodies with the document's schemas, and notes which fields there were."""

    def __init__(self, document: dict[str, Any]) -> None:
        self._document = document
        self.seen: defaultdict[str, set[str]] = defaultdict(set)
        self.wrong: list[str] = []

    def compare(self, schema: dict[str, Any], value: Any, where: str) -> None:
        schema = self._alternative(schema, value)
        name = schema.get("$ref", "").rpartition("/")[2]
        schema = resolve(self._document, schema)
        if isinstance(value, list):
            for item in value:
                self.compare(schema.get("items", {}), item, f"{where}[]")
        if not isinstance(value, dict) or "properties" not in schema:
            return
        if extra := set(value) - set(schema["properties"]):
            self.wrong.append(f"{where}: not documented: {sorted(extra)}")
        if missing := set(schema.get("required", ())) - set(value):
            self.wrong.append(f"{where}: not answered: {sorted(missing)}")
        self.seen[name] |= set(value)
        for field, inner in schema["properties"].items():
            if field in value:
                self.compare(inner, value[field], f"{where}.{field}")

    def _alternative(self, schema: dict[str, Any], value: Any) -> dict[str, Any]:
        """Of several schemas, the one for such a value: by its `object`, or the one that is not null."""
        for one in schema.get("anyOf", ()):
            properties = resolve(self._document, one).get("properties", {})
            if isinstance(value, dict) and properties.get("object", {}).get("const") in (None, value.get("object")):
                return dict(one)
        return schema

    def lacking(self) -> list[str]:
        """Documented fields that no body had."""
        schemas = self._document["components"]["schemas"]
        return [f"{n}.{f}" for n, seen in self.seen.items() for f in sorted(set(schemas[n]["properties"]) - seen)]


def answer_schema(operation: dict[str, Any]) -> dict[str, Any] | None:
    found = operation["responses"]["200"].get("content", {}).get("application/json", {}).get("schema")
    return dict(found) if found is not None else None


def test_examples_are_what_the_document_says(document: dict[str, Any]) -> None:
    comparison = Comparison(document)
    for where, operation in operations(document):
        for status, answer in operation["responses"].items():
            content = answer.get("content", {}).get("application/json", {})
            if "schema" in content:
                comparison.compare(content["schema"], content["example"], f"{where} {status}")
        for content in operation.get("requestBody", {}).get("content", {}).values():
            properties = resolve(document, content["schema"])["properties"]
            for example in content.get("examples", {}).values():
                assert set(example["value"]) <= set(properties), where
    assert comparison.wrong == []


def test_answers_are_what_the_document_says(api: ApiProcess, document: dict[str, Any]) -> None:
    http, comparison, called = api.http("answers"), Comparison(document), set()
    described = dict(operations(document))

    def call(operation: str, *, body: Any = None, **parts: Any) -> Any:
        """Call an endpoint, and compare its answer."""
        method, path = operation.format(**parts).split(" ")
        more = {k: v for k, v in parts.items() if k in ("files", "data")}
        answer = http.request(method, path, json=body, **more)
        assert answer.status_code == 200, (operation, answer.text)
        called.add(operation)
        schema = answer_schema(described[operation])
        assert schema is not None, operation
        comparison.compare(schema, answer.json(), operation)
        return answer.json()

    with Sink(SINK, 204) as sink:
        hook = call("POST /v1/webhooks", body={"url": sink.url, "events": ["task.succeeded"]})["id"]
        chat = {"messages": ASK, "max_tokens": 2}
        call("POST /v1/chat/completions", body=chat)
        call("POST /v1/completions", body={"prompt": "hi", "max_tokens": 2})
        call("POST /v1/embeddings", body={"input": ["hi", "ho"]})
        call("POST /v1/rerank", body={"query": "hi", "documents": ["hi", "ho"]})
        made = call("POST /v1/responses", body={"input": "hi", "max_output_tokens": 2})["id"]
        call("GET /v1/responses/{id}", id=made)
        call("GET /v1/responses/{id}/input_items", id=made)
        call("POST /v1/responses/{id}/cancel", id=made)
        call("DELETE /v1/responses/{id}", id=made)
        task = call("POST /v1/tasks", body={"prompt": "hi"})["id"]
        call("POST /v1/tasks", body={"tasks": [{"prompt": "hi"}]})
        eventually(lambda: http.get(f"/v1/tasks/{task}").json()["state"] == "succeeded", "it is done")
        call("GET /v1/tasks")
        call("GET /v1/tasks/{id}", id=task)
        call("GET /v1/tasks/{id}/explain", id=task)
        call("POST /v1/tasks/{id}/cancel", id=task)
        call("DELETE /v1/tasks/{id}", id=task)
        eventually(lambda: http.get("/v1/nodes").json()["data"][0]["generated"], "the node has beaten")
        call("GET /v1/nodes")
        model = call("GET /v1/models")["data"][0]["id"]
        call("GET /v1/models/{id}", id=model)
        lines = b'nonsense\n{"custom_id": "a", "url": "/v1/completions", "body": {"prompt": "hi"}}\n'
        file = call("POST /v1/files", files={"file": ("a.jsonl", lines)}, data={"purpose": "batch"})["id"]
        call("GET /v1/files")
        call("GET /v1/files/{id}", id=file)
        batch = call("POST /v1/batches", body={**BATCH, "input_file_id": file})["id"]
        eventually(lambda: http.get(f"/v1/batches/{batch}").json()["status"] == "completed", "the batch is done")
        call("GET /v1/batches")
        call("GET /v1/batches/{id}", id=batch)
        call("POST /v1/batches/{id}/cancel", id=batch)
        call("DELETE /v1/files/{id}", id=file)
        page = f"/v1/webhooks/{hook}/deliveries"
        delivered = eventually(
            lambda: [d["id"] for d in http.get(page).json()["data"] if d["attempts"]], "something is delivered"
        )
        call("GET /v1/webhooks/{id}/deliveries", id=hook)
        call("POST /v1/webhooks/{id}/deliveries/{delivery_id}/replay", id=hook, delivery_id=delivered[0])
        call("GET /v1/webhooks")
        call("GET /v1/webhooks/{id}", id=hook)
        call("POST /v1/webhooks/{id}/enable", id=hook)
        call("DELETE /v1/webhooks/{id}", id=hook)
        call("GET /health")
        eventually(lambda: http.get("/ready").status_code == 200, "it is ready")
        call("GET /ready")
    schema = described["GET /v1/tasks/{id}"]["responses"]["404"]["content"]["application/json"]["schema"]
    comparison.compare(schema, http.get("/v1/tasks/nobody").json(), "404")
    assert comparison.wrong == []
    assert comparison.lacking() == []
    assert called == {where for where, operation in described.items() if answer_schema(operation) is not None}


def test_the_document_is_json_all_through(document: dict[str, Any]) -> None:
    assert json.loads(json.dumps(document, allow_nan=False)) == document
