"""Text into an engine, a task's prompt as it is tokenised, and out of it, as it is generated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from perllm.broker.engine.contract import EngineError, OnDelta, Stop
from perllm.broker.messages import Delta, Message, TaskSpec

#: A chat template: messages (role and content) to text.
Template = Callable[[list[dict[str, Any]]], str]


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


def prompt_text(spec: TaskSpec, template: Template | None) -> str:
    """The messages rendered with the model's template. Without one a prompt is completed as it is, and messages are
    refused. Raises EngineError (retry=False)."""
    if spec.prompt_ids is not None:
        raise EngineError("prompt_ids: this engine takes text only", retry=False)
    if template is None:
        if spec.prompt is None:
            raise EngineError("messages: this model has no chat template; give a prompt", retry=False)
        return spec.prompt
    try:
        return template(chat_messages(spec))
    except Exception as error:  # templates are programs; theirs are the errors
        raise EngineError(f"messages: the model's chat template refuses them: {error}", retry=False) from None


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
