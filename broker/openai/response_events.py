"""A response as a stream of events.

Source: OpenAI API reference, "Responses", streaming events.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from perllm.broker.messages import Delta, Result, State, TaskSpec, ToolCall
from perllm.broker.openai import items
from perllm.broker.openai.responses import is_summarised, response_object
from perllm.broker.openai.streams import Sent


class ResponseStream:
    """The events of one response: `opening`, then those of each `piece`, then those of the `end`. The same pieces and
    the same end give the same events with the same numbers.

    Items come in the order in which their first pieces do. Reasoning is done when something else begins, a call when
    another one does; the message stays open to the end, as its text may go on after a call.
    """

    def __init__(self, task_id: str, spec: TaskSpec, submitted: float) -> None:
        self._id, self._spec, self._submitted = task_id, spec, submitted
        self._thought = "summary" if is_summarised(spec) else "reasoning"
        self._sent, self._number = Sent(), 0
        self._items: dict[str, _Item] = {}  # by what they are of, in order
        self._open: dict[str, _Item] = {}

    def opening(self) -> Iterator[dict[str, Any]]:
        """That there is a response."""
        yield self._event("response.created", response=self._in_state(State.PENDING))
        yield self._event("response.in_progress", response=self._in_state(State.RUNNING))

    def piece(self, delta: Delta) -> Iterator[dict[str, Any]]:
        """A piece of the answer."""
        if self._sent.add(delta) and delta.index == 0:
            yield from self._said(delta)

    def end(self, result: Result) -> Iterator[dict[str, Any]]:
        """What is left, and how it ended."""
        final = self._in_state(result.state, result)
        if result.output is not None:
            rest = self._sent.rest(result.output.choices)
            if rest is None:
                message = "a node was lost and the answer began anew: retrieve the response to have it whole"
                yield self._event("error", code="restarted", message=message, param=None)
            else:
                for delta in rest:
                    yield from self._said(delta)
                if not self._items:
                    yield from self._begun("message")
                whole = {item["id"]: item for item in final["output"]}
                for item in list(self._open.values()):
                    yield from self._done(item, whole.get(item.id))
                places = {item.id: item.index for item in self._items.values()}
                final["output"].sort(key=lambda item: places.get(item["id"], len(places)))
        kind = {"completed": "completed", "failed": "failed"}.get(final["status"], "incomplete")
        yield self._event(f"response.{kind}", response=final)

    def _in_state(self, state: State, result: Result | None = None) -> dict[str, Any]:
        return response_object(self._id, self._spec, self._submitted, state, result)

    def _event(self, kind: str, **more: Any) -> dict[str, Any]:
        number, self._number = self._number, self._number + 1
        return {"type": kind, "sequence_number": number, **more}

    def _said(self, delta: Delta) -> Iterator[dict[str, Any]]:
        if delta.call is not None:
            what, piece = f"call {delta.call}", delta.arguments
        else:
            what, piece = (self._thought, delta.reasoning) if delta.reasoning else ("message", delta.text)
        yield from self._begun(what, delta)
        if piece and (item := self._open.get(what)):  # else more was thought after what was taken for the last of it
            item.said.append(piece)
            yield self._event(f"response.{item.form.text}.delta", **item.where, delta=piece, **item.logprobs())

    def _begun(self, what: str, delta: Delta | None = None) -> Iterator[dict[str, Any]]:
        """Have an item begun, and those ended that it follows."""
        if what in self._items:
            return
        for item in list(self._open.values()):
            if item.kind != "message":
                yield from self._done(item)
        item = self._items[what] = self._open[what] = _Item(what, self._id, len(self._items), delta)
        yield self._event("response.output_item.added", output_index=item.index, item=item.empty())
        if item.form.part:
            yield self._event(f"response.{item.form.part}.added", **item.where, part=item.part_of(item.shown()))

    def _done(self, item: _Item, final: Mapping[str, Any] | None = None) -> Iterator[dict[str, Any]]:
        del self._open[item.what]
        whole = dict(final or item.shown())
        if item.form.part:
            part = item.part_of(whole)
            said = {"text": part["text"], **item.logprobs(part)}
            yield self._event(f"response.{item.form.text}.done", **item.where, **said)
            yield self._event(f"response.{item.form.part}.done", **item.where, part=part)
        else:
            said = {"name": whole["name"], "arguments": whole["arguments"]}
            yield self._event(f"response.{item.form.text}.done", **item.where, **said)
        yield self._event("response.output_item.done", output_index=item.index, item=whole)


class _Form(NamedTuple):
    """How a kind of item is streamed: the names of the events of its text and of its one part, and where that is."""

    text: str
    part: str = ""
    place: str = ""
    parts: str = ""


_FORMS = {
    "message": _Form("output_text", "content_part", "content_index", "content"),
    "reasoning": _Form("reasoning_text", "content_part", "content_index", "content"),
    "summary": _Form("reasoning_summary_text", "reasoning_summary_part", "summary_index", "summary"),
    "call": _Form("function_call_arguments"),
}


class _Item:
    """An item while it is streamed."""

    def __init__(self, what: str, task_id: str, index: int, delta: Delta | None) -> None:
        self.what, self.index, self._task_id = what, index, task_id
        self.kind, _, number = what.partition(" ")
        self.form = _FORMS[self.kind]
        self._number, self._first = int(number or 0), delta or Delta()
        self.said: list[str] = []
        self.id: str = self.shown()["id"]
        self.where: dict[str, Any] = {"item_id": self.id, "output_index": index}
        if self.form.part:
            self.where[self.form.place] = 0

    def shown(self, status: str = "completed") -> dict[str, Any]:
        """The item with what was said of it."""
        text = "".join(self.said)
        match self.kind:
            case "message":
                return items.message_item(self._task_id, text, status)
            case "reasoning":
                return items.reasoning_item(self._task_id, text, status)
            case "summary":
                return items.summary_item(self._task_id, text, status)
        call = ToolCall.model_construct(id=self._first.id or "", name=self._first.name or "", arguments=text)
        return items.call_item(self._task_id, self._number, call, status)

    def empty(self) -> dict[str, Any]:
        """The item before anything was said of it."""
        return self.shown("in_progress") | ({self.form.parts: []} if self.form.part else {})

    def part_of(self, item: Mapping[str, Any]) -> dict[str, Any]:
        """The item's one part."""
        part: dict[str, Any] = item[self.form.parts][0]
        return part

    def logprobs(self, part: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """What events of a message's text have beside it."""
        return {"logprobs": part["logprobs"] if part else []} if self.kind == "message" else {}
