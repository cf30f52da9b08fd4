"""Instructor: typed answers through a call of a tool, strict schemas and JSON; lists, and partial ones as a stream."""

from __future__ import annotations

from typing import Literal

import instructor
from openai import OpenAI
from pydantic import BaseModel

ASK = [{"role": "user", "content": "Ann is 41 years old."}]


class Person(BaseModel):
    name: str
    age: int
    kind: Literal["adult", "child"]


for mode in (instructor.Mode.TOOLS, instructor.Mode.TOOLS_STRICT, instructor.Mode.JSON_SCHEMA):
    client = instructor.from_openai(OpenAI(), mode=mode)
    person, completion = client.chat.completions.create_with_completion(
        model="auto", messages=ASK, response_model=Person, max_retries=0
    )
    assert isinstance(person, Person)
    assert completion.usage.completion_tokens > 0

client = instructor.from_openai(OpenAI(), mode=instructor.Mode.TOOLS_STRICT)
parts = list(client.chat.completions.create_partial(model="auto", messages=ASK, response_model=Person))
assert parts[-1].kind in ("adult", "child")
