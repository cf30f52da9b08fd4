"""Text into an engine, a task's prompt as it is tokenised, and out of it, as it is generated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from perllm.broker.engine.contract import EngineError, OnText, Stop
from perllm.broker.messages import TaskSpec

#: A chat template: messages (role and content) to text.
Template = Callable[[list[dict[str, Any]]], str]


def chat_messages(spec: TaskSpec) -> list[dict[str, Any]]:
    """The task's messages; its prompt as one user turn."""
    return [m.model_dump() for m in spec.messages or ()] or [{"role": "user", "content": spec.prompt}]


def prompt_text(spec: TaskSpec, template: Template | None) -> str:
    """The messages rendered with the model's template. Without one a prompt is completed as it is, and messages are
    refused. Raises EngineError (retry=False)."""
    if template is None:
        if spec.prompt is None:
            raise EngineError("messages: this model has no chat template; give a prompt", retry=False)
        return spec.prompt
    try:
        return template(chat_messages(spec))
    except Exception as error:  # templates are programs; theirs are the errors
        raise EngineError(f"messages: the model's chat template refuses them: {error}", retry=False) from None


class TextSink:
    """Passes a generation's text on to `on_text`, which may fail: then the generation is cancelled, and the failure
    raised at its end."""

    def __init__(self, on_text: OnText, stop: Stop) -> None:
        self._on_text, self._stop = on_text, stop
        self._failure: BaseException | None = None

    def push(self, piece: str) -> None:
        """Raises nothing."""
        if self._failure is None:
            try:
                self._on_text(piece)
            except BaseException as error:
                self._failure = error
                self._stop.cancel()

    def close(self) -> None:
        """The generation ended. Raises what `on_text` raised."""
        if self._failure is not None:
            raise self._failure
