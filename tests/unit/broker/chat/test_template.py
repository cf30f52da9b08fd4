"""What a model's template takes, and how it has calls written, is found by running it; whatever it is, tools work."""

from __future__ import annotations

import json
from typing import Any

import pytest
from llama_cpp.llama_chat_format import Jinja2ChatFormatter

from perllm.broker.chat import ChatTemplate, TemplateError
from perllm.broker.messages import TaskSpec

HEAD = "{% for m in messages %}<{{ m.role }}>"
TAIL = "</>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
TOOLS = "{% if tools %}{{ tools | tojson }}{% endif %}"
PLAIN = HEAD + "{{ m.content }}" + TAIL
HERMES = (
    TOOLS
    + HEAD
    + """{{ m.content }}{% for c in m.tool_calls or [] %}
<tool_call>
{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}
</tool_call>{% endfor %}"""
    + TAIL
)
LLAMA = (
    TOOLS
    + HEAD
    + """{% if m.tool_calls %}{% if m.tool_calls | length != 1 %}{{ raise_exception("one at a time") }}
{%- endif %}{"name": "{{ m.tool_calls[0].function.name }}", "parameters":
{{- " " + m.tool_calls[0].function.arguments | tojson }}}{% else %}{{ m.content }}{% endif %}"""
    + TAIL
)
MISTRAL_LIST = (
    TOOLS
    + HEAD
    + """{% if m.tool_calls %}[TOOL_CALLS][{% for c in m.tool_calls %}
{%- if c.id | length != 9 %}{{ raise_exception("ids are 9 characters") }}{% endif -%}
{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}, "id": "{{ c.id }}"}
{%- if not loop.last %}, {% endif %}{% endfor %}]{% else %}{{ m.content }}{% endif %}{{ m.tool_call_id or "" }}"""
    + TAIL
)
MISTRAL = (
    TOOLS
    + HEAD
    + """{{ m.content }}{% for c in m.tool_calls or [] -%}
[TOOL_CALLS]{{ c.function.name }}[ARGS]{{ c.function.arguments | tojson }}{% endfor %}"""
    + TAIL
)
FUNCTIONARY = (
    TOOLS
    + HEAD
    + """{% if m.role == "assistant" %}{% if m.content %}>>>all
{{ m.content }}{% endif %}{% for c in m.tool_calls or [] %}>>>{{ c.function.name }}
{{ c.function.arguments + "" }}{% endfor %}{% else %}{{ m.content }}{% endif %}"""
    + TAIL.replace("istant>", "istant>>>>")
)
OTHER = (
    TOOLS
    + HEAD
    + """{{ m.content }}{% for c in m.tool_calls or [] %}<call {{ c.function.name }}
{%- for name, value in c.function.arguments.items() %} {{ name }}={{ value }}{% endfor %}>{% endfor %}"""
    + TAIL
)
NO_SYSTEM = '{% if messages[0].role == "system" %}{{ raise_exception("no system turns") }}{% endif %}' + PLAIN
THINKING = PLAIN.replace(
    "<assistant>", "<assistant>{% if enable_thinking is false %}<think></think>{% else %}<think>\n{% endif %}"
)

TOOL = {
    "name": "look",
    "description": "Looks",
    "parameters": {"type": "object", "properties": {"at": {"type": "string"}}},
}
CALL = {"id": "call_1", "name": "look", "arguments": '{"at": "the \\"sea\\""}'}
TURNS: list[dict[str, Any]] = [
    {"role": "user", "content": "What is there?"},
    {"role": "assistant", "tool_calls": [CALL, {**CALL, "id": "call_2"}]},
    {"role": "tool", "tool_call_id": "call_1", "content": "Water"},
    {"role": "tool", "tool_call_id": "call_2", "content": "Salt"},
]


def template(source: str) -> ChatTemplate:
    formatter: Any = Jinja2ChatFormatter(source, eos_token="</s>", bos_token="<s>")
    return ChatTemplate(source, lambda messages, tools, more: formatter(messages=messages, tools=tools, **more).prompt)


def spec(**fields: Any) -> TaskSpec:
    return TaskSpec.model_validate({"messages": TURNS, "tools": [TOOL], **fields})


@pytest.mark.parametrize(
    ("source", "family", "written"),
    [
        (HERMES, "hermes", '<tool_call>\n{"name": "look", "arguments": {"at": "the \\"sea\\""}}\n</tool_call>'),
        (LLAMA, "llama", '{"name": "look", "parameters": {"at": "the \\"sea\\""}}'),
        (MISTRAL_LIST, "mistral-list", '{"name": "look", "arguments": {"at": "the \\"sea\\""}, "id": "'),
        (MISTRAL, "mistral", '[TOOL_CALLS]look[ARGS]{"at": "the \\"sea\\""}'),
        (FUNCTIONARY, "functionary", '>>>look\n{"at": "the \\"sea\\""}'),
        (PLAIN, "generic", '<tool_call>\n{"name": "look", "arguments": {"at": "the \\"sea\\""}}\n</tool_call>'),
        (NO_SYSTEM, "generic", '<tool_call>\n{"name": "look", "arguments": {"at": "the \\"sea\\""}}\n</tool_call>'),
        (OTHER, "generic", '<tool_call>\n{"name": "look", "arguments": {"at": "the \\"sea\\""}}\n</tool_call>'),
    ],
)
def test_a_conversation_with_tools_is_rendered_as_the_family_has_it(source: str, family: str, written: str) -> None:
    one = template(source)
    assert one.calls.family == family
    text, form = one.render(spec())
    assert text.count(written) == 2
    assert all(part in text for part in ("What is there?", "Water", "Salt", '"description": "Looks"'))
    assert (form.tools, form.calls) == (("look",), one.calls)
    assert form.naming == (family == "functionary")
    without, form = one.render(spec(tools=[]))
    assert written in without
    assert "Looks" not in without
    assert form.plain or family == "functionary"


def test_ids_are_shortened_alike_where_the_template_wants_them_short() -> None:
    text, _ = template(MISTRAL_LIST).render(spec())
    ids = [part[:9] for part in text.split('"id": "')[1:]]
    assert len(set(ids)) == 2
    assert all(text.count(short) == 2 for short in ids)  # the call, and its answer


def test_only_the_tools_that_may_be_called_are_shown() -> None:
    both = [TOOL, {"name": "listen"}]
    for source in (HERMES, PLAIN):
        text, form = template(source).render(spec(tools=both, allowed_tools=["listen"]))
        assert "listen" in text
        assert "Looks" not in text
        assert form.tools == ("listen",)
        assert "listen" not in template(source).render(spec(tools=both, tool_choice="none"))[0]


def test_tools_are_added_to_the_systems_turn_or_where_there_is_none_to_the_users() -> None:
    turns = [{"role": "system", "content": "Be brief."}, *TURNS]
    text, _ = template(PLAIN).render(spec(messages=turns))
    assert text.startswith("<system>Be brief.\n\nYou can call tools.")
    assert template(PLAIN).render(spec())[0].startswith("<system>You can call tools.")
    text, _ = template(NO_SYSTEM).render(spec())
    assert text.startswith("<user>You can call tools.")
    assert "</tools>\n\nWhat is there?</>" in text


def test_arguments_that_are_no_json_are_sent_back_as_they_were_written() -> None:
    turns = [*TURNS[:1], {"role": "assistant", "tool_calls": [{**CALL, "arguments": '{"at": "the s'}]}, TURNS[2]]
    assert '"{\\"at\\": \\"the s"' in template(HERMES).render(spec(messages=turns))[0]


def test_the_end_of_the_prompt_says_whether_the_model_thinks_already() -> None:
    one = template(THINKING)
    assert one.thought is not None
    _, form = one.render(spec(tools=[]))
    assert form.thinking
    _, form = one.render(spec(tools=[], reasoning_effort="none"))
    assert form.plain
    _, form = one.render(spec(tools=[], chat_template_kwargs={"enable_thinking": False}))
    assert form.plain
    _, form = one.render(spec(tools=[], reasoning_effort="low"))
    assert form.thinking


def test_what_the_system_gives_a_template_cannot_be_replaced() -> None:
    given = {"messages": [], "tools": "x", "raise_exception": "x", "bos_token": "x", "add_generation_prompt": False}
    plain = template(HERMES)
    assert plain.render(spec(chat_template_kwargs=given)) == plain.render(spec())


@pytest.mark.parametrize(
    "source", ["{{ raise_exception('no\nmessages') }}", "{{ 1 / 0 }}", "{{ messages.nothing.more }}"]
)
def test_a_template_that_raises_refuses_the_task(source: str) -> None:
    with pytest.raises(TemplateError) as error:
        template(source).render(spec())
    assert "\n" not in str(error.value)


def test_templates_run_in_a_sandbox() -> None:
    for source in ("{{ messages.__class__.__mro__ }}", "{{ ''.__class__ }}", "{{ messages.append(1) }}"):
        try:
            text, _ = template(source).render(spec())
        except TemplateError:
            continue
        assert "class" not in text


def test_a_tool_cannot_have_the_name_that_means_text() -> None:
    with pytest.raises(TemplateError, match="no tool can have that name"):
        template(FUNCTIONARY).render(spec(messages=TURNS[:1], tools=[{"name": "all"}]))


def test_a_foreign_form_is_rendered_by_the_template_itself() -> None:
    one = template(OTHER)
    assert one.takes_tools
    text, form = one.render(spec(), foreign=True)
    assert text.count('<call look at=the "sea">') == 2
    assert form.plain
    assert json.dumps(TOOL["description"]) in text
