"""Text into an engine, a task's prompt as it is tokenised, and out of it, as it is generated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from perllm.broker.chat import PLAIN, AnswerForm, ChatTemplate, TemplateError
from perllm.broker.engine.contract import EngineError, OnDelta, Stop
from perllm.broker.messages import Delta, Message, TaskSpec, Tool


def chat_messages(spec: TaskSpec) -> list[dict[str, Any]]:
    """The task's messages as the OpenAI API has them; its prompt as one user turn."""
    return [_chat_message(m) for m in spec.messages or ()] or [{"role": "user", "content": spec.prompt}]


def _chat_message(message: Message) -> dict[str, Any]:
    said: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.name is not None:
        said["name"] = message.name
    if message.reasoning is not None:
        said["reasoning_content"] = message.reasoning
    if message.tool_calls:
        said["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in message.tool_calls
        ]
    if message.tool_call_id is not None:
        said["tool_call_id"] = message.tool_call_id
    return said


def openai_tool(tool: Tool) -> dict[str, Any]:
    """A tool as the OpenAI API has it."""
    return {"type": "function", "function": tool.model_dump(exclude_none=True, exclude_defaults=True)}


def prompt_text(spec: TaskSpec, template: ChatTemplate | None, *, foreign: bool = False) -> tuple[str, AnswerForm]:
    """The task rendered with the model's template, and how its answer will be written (`foreign`: in a form that others
    read). Without a template a prompt is completed as it is, and messages and tools are refused. Raises EngineError
    (retry=False)."""
    if spec.prompt_ids is not None:
        raise EngineError("prompt_ids: this engine takes text only", retry=False)
    if template is None:
        if spec.prompt is None:
            raise EngineError("messages: this model has no chat template; give a prompt", retry=False)
        if spec.offered_tools:
            raise EngineError("tools: this model has no chat template", retry=False)
        return spec.prompt, PLAIN
    try:
        return template.render(spec, foreign=foreign)
    except TemplateError as error:
        raise EngineError(f"messages: the model's chat template refuses them: {error}", retry=False) from None


@dataclass(frozen=True, slots=True)
class Prompt:
    """A task's prompt in tokens, and how the answer to it is written. `controls` are the marks in answers that are
    control tokens of the model. `foreign`: the engine's own parser reads the answer."""

    tokens: list[int]
    form: AnswerForm = PLAIN
    controls: Mapping[str, int] = field(default_factory=dict)
    foreign: bool = False

    @property
    def marks(self) -> dict[int, bytes]:
        """Control tokens and what they are called."""
        return {token: name.encode() for name, token in self.controls.items()}


class DeltaSink:
    """Passes a generation's pieces on to `on_delta`, which may fail: then the generation is cancelled, and the failure
    raised at its end."""

    def __init__(self, on_delta: OnDelta, stop: Stop) -> None:
        self._on_delta, self._stop = on_delta, stop
        self._failure: BaseException | None = None

    def push(self, piece: Delta) -> None:
        """Raises nothing."""
        if self._failure is None:
            try:
                self._on_delta(piece)
            except BaseException as error:
                self._failure = error
                self._stop.cancel()

    def close(self) -> None:
        """The generation ended. Raises what `on_delta` raised."""
        if self._failure is not None:
            raise self._failure
