"""The one way in: whatever a producer sends becomes a `TaskSpec` here, or one clear error."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from perllm.broker import grammar
from perllm.broker.capabilities import unserved
from perllm.broker.chat import RESERVED
from perllm.broker.engine.checks import context_excess, embeddings_excess
from perllm.broker.errors import InvalidTask, field_errors
from perllm.broker.ledger import Ledger
from perllm.broker.messages import DEADLINE, MAX_DEADLINE, MAX_DIMENSIONS, MAX_VALUE, ModelOffer, TaskSpec

if TYPE_CHECKING:  # loaded when settings are read: half of what importing a client would take
    from perllm.broker.settings import Settings

#: Seconds the list of models on offer may be old.
OFFERS_AGE = 2.0


class TaskValidator:
    """Checks producers' tasks against the settings and against what live nodes offer."""

    def __init__(self, settings: Settings, ledger: Ledger) -> None:
        self._settings = settings
        self._ledger = ledger
        self._offers: list[ModelOffer] = []  # of all nodes there are, …
        self._live: list[ModelOffer] = []  # of those that take work, …
        self._gone: list[ModelOffer] = []  # and of those that do not, or are no more
        self._as_of = float("-inf")

    def accept(self, fields: Mapping[str, Any], *, max_value: float = MAX_VALUE) -> TaskSpec:
        """The task these fields describe. Raises InvalidTask naming every field that is wrong, also for a `value` above
        `max_value`; none given is 1, or the most there may be. A grammar or schema that is new to this process is
        compiled elsewhere meanwhile (a second at most, usually milliseconds).
        """
        spec = self.accept_unchecked(fields, max_value=max_value)
        grammar.check(spec, hurried=True)
        return spec

    def accept_unchecked(self, fields: Mapping[str, Any], *, max_value: float = MAX_VALUE) -> TaskSpec:
        """The same, but without the check of a grammar or schema: that is left to the caller.

        A model nobody offers, what none can do, and more tokens than any context holds, are refused only while nodes
        are live: without any, the task waits for one. Where a task does not say `max_tokens`, it gets as many as the
        settings, its context and its deadline allow. Without a deadline, that of a task which starts later is the usual
        one from there.
        """
        if "max_tokens" not in fields and fields.get("kind", "generate") == "generate":
            fields = {"fit_context": True, **fields, "max_tokens": self._settings.max_tokens}
        if "value" not in fields and max_value < 1:
            fields = {**fields, "value": max_value}
        start = fields.get("start_after")
        if "deadline" not in fields and isinstance(start, int | float) and 0 < start < MAX_DEADLINE:
            fields = {**fields, "deadline": min(start + DEADLINE, MAX_DEADLINE)}
        try:
            spec = TaskSpec.model_validate(dict(fields))
        except ValidationError as error:
            raise InvalidTask(field_errors(error)) from None
        if spec.value > max_value:
            raise InvalidTask(f"value: {spec.value:g} is more than this key may give, {max_value:g}")
        size = spec.text_bytes()
        if size > self._settings.max_prompt_bytes:
            field, limit = _input_field(spec), self._settings.max_prompt_bytes
            raise InvalidTask(f"{field}: {size} bytes; the limit is {limit} bytes (PERLLM_MAX_PROMPT_BYTES)")
        if reserved := sorted(RESERVED & spec.chat_template_kwargs.keys()):
            raise InvalidTask(f"chat_template_kwargs: {reserved[0]!r} is not a task's to give")
        self._check_offer(spec)
        return self._checked_embedding(spec) if spec.kind == "embed" else spec

    def _checked_embedding(self, spec: TaskSpec) -> TaskSpec:
        """The task for one model, since vectors of two do not compare, and with the width of its vectors, so that the
        room they will take is known. Raises InvalidTask."""
        offers = [o for o in self._current_offers() if not o.lacks(spec.needs())]
        names = sorted({o.name for o in offers})
        if spec.model is None and len(names) > 1:
            raise InvalidTask(f"model: name one of {', '.join(names)}: their embeddings do not compare")
        offers = [o for o in offers if spec.model in (None, o.name)]
        if not offers:
            return spec
        widest = max(o.dimensions or MAX_DIMENSIONS for o in offers)
        if spec.dimensions is not None and spec.dimensions > widest:
            raise InvalidTask(f"dimensions: {spec.dimensions} is more than the model's embeddings have, {widest}")
        context = max(o.context for o in offers)
        for number, ids in enumerate(spec.input_ids):
            if len(ids) > context:
                words = f"input {number} has {len(ids)} tokens; the model takes {context} in one input"
                raise InvalidTask(f"input_ids: {words}")
        known = [o.dimensions for o in offers if o.dimensions is not None]
        if known and (excess := embeddings_excess(spec, min(known), self._settings.max_result_bytes)):
            raise InvalidTask(f"inputs: {excess}")
        named = {"model": spec.model or names[0], "dimensions": spec.dimensions or (min(known) if known else None)}
        return spec.model_copy(update=named)

    def _check_offer(self, spec: TaskSpec) -> None:
        offers = self._current_offers()
        if not offers:
            return
        serving = [o for o in offers if spec.model in (None, o.name)]
        if not serving:
            names = ", ".join(sorted({o.name for o in offers}))
            raise InvalidTask(f"model: no live node serves {spec.model!r}; on offer: {names}")
        needs = spec.needs()
        live = [o for o in self._live if spec.model in (None, o.name)]  # none: the model's nodes are back soon
        if live and (sentence := unserved(spec.model, needs, self._live, self._gone)):
            raise InvalidTask(sentence)
        context = max(o.context for o in serving if not (live and o.lacks(needs)))
        # With the shortest prompt there is
        if spec.kind == "generate" and not spec.fit_context and context_excess(1, spec.max_tokens, context):
            raise InvalidTask(f"max_tokens: {spec.max_tokens} leaves no room in the largest context, {context} tokens")

    @property
    def stale(self) -> bool:
        """Whether the next task will have it look at the server for the models on offer."""
        return time.monotonic() - self._as_of > OFFERS_AGE

    def refresh(self) -> None:
        """Look now."""
        nodes, gone = self._ledger.nodes(), self._ledger.gone()
        self._offers = [offer for info, _, _ in nodes for offer in info.models]
        self._live = [offer for info, _, draining in nodes if not draining for offer in info.models]
        self._gone = [offer for info, _, draining in nodes if draining for offer in info.models]
        self._gone += [offer for info, _, _ in gone for offer in info.models]
        self._as_of = time.monotonic()

    def _current_offers(self) -> list[ModelOffer]:
        if self.stale:
            self.refresh()
        return self._offers


def _input_field(spec: TaskSpec) -> str:
    """Where its input is."""
    fields = ("prompt", "prompt_ids", "messages", "inputs", "input_ids")
    return next(field for field in fields if getattr(spec, field))
