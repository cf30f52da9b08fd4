"""From what a producer asks for to samplers and a rendered prompt."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import llama_cpp.llama_cpp as lib
import numpy as np
from llama_cpp.llama_chat_format import Jinja2ChatFormatter
from llguidance import LLMatcher

from perllm.broker import grammar
from perllm.broker.engine.contract import EngineError
from perllm.broker.errors import InvalidTask, TryAgain
from perllm.broker.messages import TaskSpec
from perllm.edge_worker.llama import Logits, Model, Sampler

#: CPU time a request may spend on its grammar, s: so much, and so much more per token. Others in the batch wait
#: meanwhile. What people mean takes far less; one token is bounded by `perllm.broker.grammar.limits` (about 0.5 s).
GRAMMAR_BURST, GRAMMAR_RATE = 1.0, 0.005


_NOTHING = "it allows none of the model's tokens here"


class GrammarError(Exception):
    """A grammar came to its end, or to a limit, where none should be: that request is over."""


def greedy(spec: TaskSpec) -> bool:
    """Whether the most likely token is taken as it is."""
    return spec.temperature == 0 and not _penalised(spec) and spec.grammar is None and spec.json_schema is None


class Drawing:
    """How one request's tokens are drawn: by a chain of samplers, within a grammar if there is one."""

    def __init__(self, sampler: Sampler, matcher: LLMatcher | None) -> None:
        self._sampler, self._matcher = sampler, matcher
        self._allowance = GRAMMAR_BURST

    def draw(self, logits: Logits) -> int:
        """The next token. Raises GrammarError when the grammar allows none, or takes too much."""
        token = self._sampler.choose(logits) if self._matcher is None else self._draw_within(self._matcher, logits)
        self._sampler.accept(token)
        return token

    def _draw_within(self, matcher: LLMatcher, logits: Logits) -> int:
        began = time.thread_time()
        token = self._sampler.choose(logits)
        if matcher.try_consume_tokens([token]) == 0:  # cheaper than always asking for all that are allowed
            bits = np.frombuffer(matcher.compute_bitmask(), np.uint8)
            if not matcher.is_error():
                among = np.flatnonzero(np.unpackbits(bits, count=len(logits), bitorder="little"))
                if not len(among):
                    raise GrammarError(_NOTHING)
                token = self._sampler.choose(logits, among)
                matcher.consume_token(token)
        if matcher.is_error():
            raise GrammarError(_limit(matcher))
        self._allowance += GRAMMAR_RATE - (time.thread_time() - began)
        if self._allowance < 0:
            raise GrammarError("finding what it allows takes too long: simplify it")
        return token

    def close(self) -> None:
        self._sampler.close()
        self._matcher = None


def _limit(matcher: LLMatcher) -> str:
    said = matcher.get_error().split("\n", 1)[0].split(";", 1)[0][:200]
    if said.startswith("NoExtension"):
        return _NOTHING
    return f"too many possibilities to follow: simplify it, or write recursion as repetition ({said})"


def make_drawing(model: Model, spec: TaskSpec, penalty_window: int) -> Drawing:
    """What `spec` asks for. Penalties look at up to `penalty_window` generated tokens (not at the prompt, as in the
    OpenAI API). Raises EngineError (retry=False) for a grammar or schema that cannot be used.
    """
    matcher = _matcher(model, spec)
    chain: list[Callable[[], Any]] = []
    if _penalised(spec):
        chain.append(
            lambda: lib.llama_sampler_init_penalties(
                model.vocab_size, penalty_window, spec.repeat_penalty, spec.frequency_penalty, spec.presence_penalty
            )
        )
    if spec.temperature == 0:
        chain.append(lib.llama_sampler_init_greedy)
    else:
        seed = spec.seed if spec.seed is not None else int.from_bytes(os.urandom(4), "little")
        if spec.top_k:
            chain.append(lambda: lib.llama_sampler_init_top_k(spec.top_k))
        if spec.top_p < 1:
            chain.append(lambda: lib.llama_sampler_init_top_p(spec.top_p, 1))
        if spec.min_p > 0:
            chain.append(lambda: lib.llama_sampler_init_min_p(spec.min_p, 1))
        chain.append(lambda: lib.llama_sampler_init_temp(spec.temperature))
        chain.append(lambda: lib.llama_sampler_init_dist(seed))
    return Drawing(Sampler(model, chain), matcher)


def _penalised(spec: TaskSpec) -> bool:
    return spec.repeat_penalty != 1 or spec.frequency_penalty != 0 or spec.presence_penalty != 0


def _matcher(model: Model, spec: TaskSpec) -> LLMatcher | None:
    try:
        text = grammar.lark(spec)
    except TryAgain as error:
        raise EngineError(str(error), retry=True) from None
    except InvalidTask as error:
        raise EngineError(str(error), retry=False) from None
    if text is None:
        return None
    matcher = LLMatcher(model.vocabulary, text, log_level=0, limits=grammar.limits())
    if matcher.is_error():  # it passed the check, so this is about the model's vocabulary
        field = "grammar" if spec.grammar is not None else "json_schema"
        raise EngineError(f"{field}: cannot be used with this model: {_limit(matcher)}", retry=False)
    return matcher


class Prompter:
    """Renders tasks with a model's chat template. A `prompt` is one user turn, when the model has a template; without
    one it is completed as it is, and `messages` are refused."""

    def __init__(self, model: Model) -> None:
        self._model = model
        template = model.chat_template()
        self._format = template and Jinja2ChatFormatter(
            template, eos_token=model.token_text(model.eos), bos_token=model.token_text(model.bos)
        )

    def tokens(self, spec: TaskSpec) -> list[int]:
        """The prompt's tokens. Raises EngineError (retry=False) when the template refuses the messages."""
        if not self._format:
            if spec.prompt is None:
                raise EngineError("messages: this model has no chat template; give a prompt", retry=False)
            return self._model.tokenize(spec.prompt, special=False, add_bos=self._model.adds_bos)
        messages: Any = [m.model_dump() for m in spec.messages or ()] or [{"role": "user", "content": spec.prompt}]
        try:
            text = self._format(messages=messages).prompt
        except Exception as error:  # templates are programs; theirs are the errors
            raise EngineError(f"messages: the model's chat template refuses them: {error}", retry=False) from None
        return self._model.tokenize(text, special=True, add_bos=False)


def token_logprobs(model: Model, logits: Logits, token: int, top: int) -> dict[str, Any]:
    """One entry of `logprobs.content` as in the OpenAI API: the token's log-probability under the model itself (before
    penalties, temperature and grammar), and the `top` most likely ones."""
    shifted = logits - logits.max()
    logprobs = shifted - np.log(np.exp(shifted).sum())
    entry = _logprob(model, token, logprobs)
    if top:
        likeliest = np.argpartition(-logprobs, top)[:top]
        ordered = likeliest[np.argsort(-logprobs[likeliest], kind="stable")]
        entry["top_logprobs"] = [_logprob(model, int(t), logprobs) for t in ordered]
    else:
        entry["top_logprobs"] = []
    return entry


def _logprob(model: Model, token: int, logprobs: Logits) -> dict[str, Any]:
    piece = model.piece(token)
    return {
        "token": piece.decode(errors="replace") or model.token_text(token),
        "logprob": float(logprobs[token]),
        "bytes": list(piece),
    }
