"""Queue entries that are no message of ours, each in its own way."""

from __future__ import annotations

import base64
import json
from typing import Any

from perllm.broker.queues.app import node_message


def _broken(part: str | None = None, value: Any = None, **headers: Any) -> bytes:
    """A node's message with one part replaced (None: taken out)."""
    message = json.loads(node_message("poison", 1, "somewhere"))
    if part is not None:
        if value is None:
            del message[part]
        else:
            message[part] = value
    if headers:
        message["headers"] |= headers
    return json.dumps(message).encode()


def _with_body(body: Any) -> bytes:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return _broken("body", base64.b64encode(raw).decode())


def _without_header(name: str) -> bytes:
    message = json.loads(node_message("poison", 1, "somewhere"))
    del message["headers"][name]
    return json.dumps(message).encode()


def _properties(**changed: Any) -> bytes:
    properties = json.loads(node_message("poison", 1, "somewhere"))["properties"]
    return _broken("properties", {k: v for k, v in (properties | changed).items() if v is not None})


EMBED = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}

POISON: dict[str, bytes] = {
    "nothing": b"",
    "not JSON": b"hello",
    "not text": b"\x80\x04\x95 pickle?",
    "a number": b"5",
    "a string": b'"x"',
    "null": b"null",
    "a list": b"[1, 2]",
    "an empty object": b"{}",
    "another object": b'{"prompt": "hi"}',
    "too deep": b"[" * 100_000,
    "deep in the body": _with_body(b"[" * 100_000),
    "no body": _broken("body"),
    "an empty body": _broken("body", ""),
    "a body that is no base64": _broken("body", "%%%"),
    "a body that is not JSON": _with_body(b"\xff\xfe"),
    "a body of another shape": _with_body({"args": []}),
    "a body too short": _with_body([[]]),
    "arguments that are no list": _with_body([5, {"attempt": 1, "v": 1}, EMBED]),
    "arguments that are no object": _with_body([[], 5, EMBED]),
    "positional arguments": _with_body([[1, 2], {}, EMBED]),
    "an embed that is none": _with_body([[], {"attempt": 1}, None]),
    "no attempt": _with_body([[], {}, EMBED]),
    "an attempt that is text": _with_body([[], {"attempt": "1", "v": 1}, EMBED]),
    "a newer version": _with_body([[], {"attempt": 1, "v": 99}, EMBED]),
    "no headers": _broken("headers"),
    "headers that are a list": _broken("headers", [1]),
    "a task that is a list": _broken(task=[1]),
    "a task nobody knows": _broken(task="os.system"),
    "no id": _without_header("id"),
    "an id that is a number": _broken(id=5),
    "an id that is an object": _broken(id={"a": 1}),
    "no task": _without_header("task"),
    "an eta that is none": _broken(eta="tomorrow"),
    "an expiry that is none": _broken(expires="tomorrow"),
    "a time limit of text": _broken(timelimit="x"),
    "retries of text": _broken(retries="x"),
    "a compression nobody knows": _broken(compression="zip"),
    "a group that is a number": _broken(group=5),
    "stamps that are text": _broken(stamped_headers="x", stamps="y"),
    "pickle": _broken("content-type", "application/x-python-serialize"),
    "a content type nobody knows": _broken("content-type", "application/x-odd"),
    "no content type": _broken("content-type"),
    "an encoding nobody knows": _broken("content-encoding", "utf-99"),
    "no properties": _broken("properties"),
    "properties that are text": _broken("properties", "x"),
    "no delivery tag": _properties(delivery_tag=None),
    "a delivery tag that is an object": _properties(delivery_tag={"a": 1}),
    "no delivery info": _properties(delivery_info=None),
    "delivery info that is text": _properties(delivery_info="x"),
    "a body encoding nobody knows": _properties(body_encoding="rot13"),
    "a body encoding that is a number": _properties(body_encoding=5),
    "a header that is no decimal": _broken(x={"__type__": "decimal", "__value__": "x"}),
    "a reply wanted nowhere": _properties(reply_to={"a": 1}),
}
