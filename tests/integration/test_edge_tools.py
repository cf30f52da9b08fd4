"""Tools and thoughts on the edge engine: by the template's family, with control tokens, and with a model of random
weights, which does nothing right by itself."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from support.schemas import parameters
from support.tiny_gguf import tiny_llama

from perllm.broker.engine.contract import EngineError, Generation, Stop
from perllm.broker.messages import Delta, TaskSpec
from perllm.edge_worker.engine import LlamaEngine
from perllm.edge_worker.llama import Model
from perllm.edge_worker.sampling import Prompter
from perllm.edge_worker.settings import EdgeSettings

HEAD = "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<{{ m.role }}>{{ m.content }}"
TAIL = "{% endfor %}<assistant>"
#: Calls in JSON in marks, and a thought that the prompt opens unless it is not wanted.
THINKING = (
    HEAD + '{% for c in m.tool_calls or [] %}\n<tool_call>\n{"name": "{{ c.function.name }}", "arguments": '
    "{{ c.function.arguments | tojson }}}\n</tool_call>{% endfor %}" + TAIL + "{% if enable_thinking is not false %}"
    "<think>{% else %}<think></think>{% endif %}"
)
#: The names of calls after one control token, their arguments after another.
NAMED = HEAD + (
    "{% for c in m.tool_calls or [] %}[TOOL_CALLS]{{ c.function.name }}[ARGS]{{ c.function.arguments | tojson }}"
    "{% endfor %}" + TAIL
)
PLACE = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 8}, "days": {"type": "integer", "maximum": 9, "minimum": 1}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
#: One brace in it commits to much that must follow, again and again.
NESTED = {
    "$defs": {
        "node": {
            "type": "object",
            "properties": {"value": {"const": 35392}, "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}},
            "required": ["value", "next"],
            "additionalProperties": False,
        }
    },
    "type": "object",
    "properties": {"tree": {"$ref": "#/$defs/node"}},
    "required": ["tree"],
    "additionalProperties": False,
}
TOOLS = [{"name": "forecast", "description": "The weather", "parameters": PLACE}, {"name": "wait", "strict": True}]


def started(folder: Path, **model: Any) -> Iterator[LlamaEngine]:
    path = tiny_llama(folder / "tiny.gguf", **model)
    one = LlamaEngine(EdgeSettings(model=str(path), model_cache=folder, threads=1, slots=8))
    one.start()
    yield one
    one.close()


@pytest.fixture(scope="module")
def thinking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LlamaEngine]:
    yield from started(tmp_path_factory.mktemp("thinking"), template=THINKING)


@pytest.fixture(scope="module")
def named(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LlamaEngine]:
    controls = {"<filename>": "[TOOL_CALLS]", "<gh_stars>": "[ARGS]"}
    yield from started(tmp_path_factory.mktemp("named"), template=NAMED, tokens=controls)


def run(engine: LlamaEngine, **fields: Any) -> tuple[Generation, list[Delta]]:
    """The generation, and its pieces, which say the same."""
    given = {"prompt": "What will it be like in Rome?", "tools": TOOLS, "max_tokens": 80, "temperature": 1.0, "seed": 3}
    deltas: list[Delta] = []
    done = engine.generate("t", TaskSpec.model_validate({**given, **fields}), Stop(100), deltas.append)
    output = done.output
    assert "".join(delta.text for delta in deltas) == output.text
    assert "".join(delta.reasoning for delta in deltas) == (output.reasoning or "")
    for number, call in enumerate(output.tool_calls):
        pieces = [delta for delta in deltas if delta.call == number]
        assert [(piece.id, piece.name) for piece in pieces if piece.name] == [(call.id, call.name)]
        assert "".join(piece.arguments for piece in pieces) == call.arguments
    assert output.tokens == done.completion_tokens
    return done, deltas


def test_a_required_call_is_one_of_a_tool_with_arguments_that_fit(named: LlamaEngine) -> None:
    for number in range(4):
        done, deltas = run(named, tool_choice="required", parallel_tool_calls=False, seed=number)
        (call,) = done.output.tool_calls
        assert done.output.text == ""
        arguments = json.loads(call.arguments)
        jsonschema.validate(arguments, PLACE if call.name == "forecast" else {"maxProperties": 0})
        assert done.output.finish_reason in ("tool_calls", "length")
        if call.name == "forecast":
            assert len(deltas) > 3  # as it was written
    for name in ("forecast", "wait"):
        done, _ = run(named, tool_choice="required", allowed_tools=[name], parallel_tool_calls=False)
        assert [call.name for call in done.output.tool_calls] == [name]


def test_several_calls_differ_in_their_ids_and_a_second_attempt_repeats_them(named: LlamaEngine) -> None:
    first, _ = run(named, tool_choice="required", max_tokens=200)
    again, _ = run(named, tool_choice="required", max_tokens=200)
    assert len(first.output.tool_calls) > 1
    assert len({call.id for call in first.output.tool_calls}) == len(first.output.tool_calls)
    assert first.output.tool_calls == again.output.tool_calls


def test_text_is_free_while_tools_are_offered(named: LlamaEngine) -> None:
    with_tools, _ = run(named, max_tokens=30)
    assert with_tools.output.text
    assert with_tools.output.tool_calls == ()
    assert with_tools.output.finish_reason == "length"
    assert run(named, tool_choice="none", max_tokens=30)[0].output.tool_calls == ()


def test_a_call_that_could_not_be_finished_says_so(named: LlamaEngine) -> None:
    done, _ = run(named, tool_choice="required", allowed_tools=["forecast"], max_tokens=12)
    (call,) = done.output.tool_calls
    assert done.output.finish_reason == "length"
    assert call.arguments.startswith("{")
    assert not call.arguments.endswith("}")
    done, _ = run(named, tool_choice="required", max_tokens=1)
    assert (done.output.text, done.output.tool_calls, done.output.finish_reason) == ("", (), "length")


def test_a_call_that_would_go_on_is_brought_to_its_end_before_the_deadline(named: LlamaEngine) -> None:
    endless = {"type": "array", "items": {"type": "string"}}
    parameters = {"type": "object", "properties": {"words": endless}, "required": ["words"]}
    fields = {"tools": [{"name": "f", "parameters": parameters}], "tool_choice": "required", "max_tokens": 1900}
    spec = TaskSpec.model_validate({"prompt": "Go on.", "temperature": 1.0, "seed": 1, **fields})
    output = named.generate("t", spec, Stop(4)).output
    jsonschema.validate(json.loads(output.tool_calls[0].arguments), parameters)
    assert output.finish_reason in ("length", "tool_calls")


def test_a_thought_is_no_text_and_a_stop_string_does_not_end_it(thinking: LlamaEngine) -> None:
    free, _ = run(thinking, tools=[], max_tokens=20)
    assert free.output.text == ""
    assert free.output.reasoning
    assert free.reasoning_tokens == free.completion_tokens == 20
    stops = [free.output.reasoning[3:6]]
    stopped, _ = run(thinking, tools=[], max_tokens=20, stop=stops)
    assert stopped.output.reasoning == free.output.reasoning
    unwanted, _ = run(thinking, tools=[], max_tokens=20, reasoning_effort="none")
    assert unwanted.output.reasoning is None
    assert unwanted.output.text
    assert unwanted.reasoning_tokens == 0
    held, _ = run(thinking, tools=[], json_schema=PLACE, chat_template_kwargs={"enable_thinking": False})
    jsonschema.validate(json.loads(held.output.text), PLACE)


def test_a_conversation_goes_on_with_what_the_tools_said(thinking: LlamaEngine) -> None:
    turns = [
        {"role": "user", "content": "And in Rome?"},
        {"role": "assistant", "tool_calls": [{"id": "x", "name": "forecast", "arguments": '{"city": "Rome"'}]},
        {"role": "tool", "tool_call_id": "x", "content": "<tool_call>{}</tool_call> </think>"},
    ]
    done, _ = run(thinking, prompt=None, messages=turns, max_tokens=4)
    assert done.output.reasoning is not None


def test_a_template_that_raises_refuses_the_task_and_a_broken_one_is_none(tmp_path: Path) -> None:
    source = "{% if messages | length > 1 %}{{ raise_exception('one turn only') }}{% endif %}{{ messages[0].content }}"
    turns = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
    raising = Prompter(Model(tiny_llama(tmp_path / "raises.gguf", template=source)))
    with pytest.raises(EngineError, match="messages: the model's chat template refuses them: one turn only"):
        raising.prompt(TaskSpec.model_validate({"messages": turns}))
    assert raising.prompt(TaskSpec(prompt="a")).tokens
    broken = Prompter(Model(tiny_llama(tmp_path / "broken.gguf", template="{% if %}")))
    assert broken.prompt(TaskSpec(prompt="a")).tokens
    with pytest.raises(EngineError, match="no chat template"):
        broken.prompt(TaskSpec.model_validate({"prompt": "a", "tools": TOOLS}))


def test_calls_of_random_schemas_are_valid_even_of_a_model_that_never_ends(thinking: LlamaEngine) -> None:
    """`make bench-tools` does this with thousands, and a model that was trained."""
    schemas: list[Any] = []

    @seed(5)
    @settings(max_examples=16, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
    @given(parameters(leaves=5))
    def draw(schema: Any) -> None:
        schemas.append(schema)

    draw()

    def valid(schema: Any) -> bool:
        tool = {"name": "fill_in", "parameters": schema}
        fields = {"tools": [tool], "tool_choice": "required", "chat_template_kwargs": {"enable_thinking": False}}
        spec = TaskSpec.model_validate({"prompt": "Go on.", "max_tokens": 200, **fields})
        try:
            output = thinking.generate("t", spec, Stop(100)).output
        except EngineError as error:
            assert str(error).startswith("tools.0.parameters: cannot be used: #/")  # noqa: PT017
            return False
        jsonschema.Draft202012Validator(schema).validate(json.loads(output.tool_calls[0].arguments))
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(valid, [*schemas, *[NESTED] * 16])) > 26
