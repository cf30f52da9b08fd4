"""What a producer asks for, as samplers and a tokenised prompt."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import llama_cpp.llama_cpp as lib
import numpy as np
import structlog
from llama_cpp.llama_chat_format import Jinja2ChatFormatter
from llguidance import LLMatcher

from perllm.broker import grammar
from perllm.broker.chat import ChatTemplate
from perllm.broker.engine.answers import answer_seed
from perllm.broker.engine.checks import check_echo, check_tokens
from perllm.broker.engine.contract import EngineError
from perllm.broker.engine.text import Prompt, prompt_text
from perllm.broker.errors import InvalidTask, TryAgain
from perllm.broker.messages import TaskSpec
from perllm.edge_worker.llama import Logits, Model, SamplerChain
from perllm.edge_worker.wind_down import WindDown, allowed_tokens, endings

log = structlog.get_logger(__name__)

#: CPU time a request may spend on its grammar, s: so much, and so much more per token. Others in the batch wait
#: meanwhile. What people mean takes far less; one token is bounded by `perllm.broker.grammar.limits` (about 0.5 s).
GRAMMAR_BURST, GRAMMAR_RATE = 1.0, 0.005

_NOTHING = "it allows none of the model's tokens here"


class GrammarError(Exception):
    """A grammar came to its end, or to a limit, where none should be: that request is over."""


def constraint(spec: TaskSpec) -> str | None:
    """The field that constrains what may be generated; None where nothing does."""
    if spec.grammar is not None:
        return "grammar"
    if spec.json_schema is not None:
        return "json_schema"
    return "tools" if spec.offered_tools else None


class Allowance:
    """The CPU time, s, a request still has for its grammar, all its answers together."""

    def __init__(self) -> None:
        self.left = GRAMMAR_BURST


class Sampler:
    """Samples one answer's tokens: by a chain of samplers, within a grammar if there is one."""

    def __init__(
        self, chain: SamplerChain, matcher: LLMatcher | None, allowance: Allowance, wind_down: WindDown | None = None
    ) -> None:
        self._chain, self._matcher, self._allowance, self._wind_down = chain, matcher, allowance, wind_down

    @property
    def shortened(self) -> bool:
        """Whether what the model wrote was brought to an end for want of tokens."""
        return self._wind_down is not None and self._wind_down.begun

    def sample(self, logits: Logits, left: int) -> int:
        """The next token, of at most `left`. Raises GrammarError when the grammar allows none, or takes too much."""
        if self._matcher is None:
            token = self._chain.choose(logits)
        else:
            token = self._sample_within(self._matcher, logits, left)
        self._chain.accept(token)
        return token

    def _sample_within(self, matcher: LLMatcher, logits: Logits, left: int) -> int:
        ending = self._wind_down.ending(matcher, left) if self._wind_down is not None else None
        began = time.thread_time()
        token = self._chain.choose(logits) if ending is None else ending
        if matcher.try_consume_tokens([token]) == 0:  # cheaper than always asking for all that are allowed
            allowed = allowed_tokens(matcher, len(logits))
            if not matcher.is_error():
                among = np.flatnonzero(allowed)
                if not len(among):
                    raise GrammarError(_NOTHING)
                token = self._chain.choose(logits, among)
                matcher.consume_token(token)
        if matcher.is_error():
            raise GrammarError(_limit(matcher))
        if self._wind_down is not None and not self._wind_down.take(matcher, token, left - 1):
            matcher.rollback(1)
            return self._sample_within(matcher, logits, left)
        self._allowance.left += GRAMMAR_RATE - (time.thread_time() - began)
        if self._allowance.left < 0:
            raise GrammarError("finding what it allows takes too long: simplify it")
        return token

    def close(self) -> None:
        self._chain.close()
        self._matcher = None


def _limit(matcher: LLMatcher) -> str:
    error = matcher.get_error().split("\n", 1)[0].split(";", 1)[0][:200]
    if error.startswith("NoExtension"):
        return _NOTHING
    return f"too many possibilities to follow: simplify it, or write recursion as repetition ({error})"


def make_samplers(model: Model, spec: TaskSpec, penalty_window: int, prompt: Prompt) -> list[Sampler | None]:
    """The samplers `spec` asks for, one per answer to `prompt`; None takes the most likely token as it is. Penalties
    look at up to `penalty_window` generated tokens (not at the prompt, as in the OpenAI API). Raises EngineError
    (retry=False) for a grammar, schema or tools that cannot be used, and for a bias on a token that the model does not
    have.
    """
    check_tokens("logit_bias", spec.logit_bias, model.vocab_size)
    matcher, allowance = _matcher(model, spec, prompt), Allowance()
    if matcher is None and spec.temperature == 0 and not spec.logit_bias and not _penalised(spec):
        return [None] * spec.n
    seed = spec.seed if spec.seed is not None else int.from_bytes(os.urandom(4), "little")
    return [
        Sampler(
            SamplerChain(model, _chain(model, spec, penalty_window, answer_seed(seed, i)), spec.logit_bias),
            None if matcher is None else matcher.deep_copy(),
            allowance,
            WindDown(endings(model)) if matcher is not None and spec.grammar is None else None,
        )
        for i in range(spec.n)
    ]


def _chain(model: Model, spec: TaskSpec, penalty_window: int, seed: int) -> list[Callable[[], Any]]:
    """What makes the samplers, in order."""
    chain: list[Callable[[], Any]] = []
    if _penalised(spec):
        chain.append(
            lambda: lib.llama_sampler_init_penalties(
                model.vocab_size, penalty_window, spec.repeat_penalty, spec.frequency_penalty, spec.presence_penalty
            )
        )
    if spec.temperature == 0:
        chain.append(lib.llama_sampler_init_greedy)
        return chain
    if spec.top_k:
        chain.append(lambda: lib.llama_sampler_init_top_k(spec.top_k))
    if spec.top_p < 1:
        chain.append(lambda: lib.llama_sampler_init_top_p(spec.top_p, 1))
    if spec.min_p > 0:
        chain.append(lambda: lib.llama_sampler_init_min_p(spec.min_p, 1))
    chain.append(lambda: lib.llama_sampler_init_temp(spec.temperature))
    chain.append(lambda: lib.llama_sampler_init_dist(seed))
    return chain


def _penalised(spec: TaskSpec) -> bool:
    return spec.repeat_penalty != 1 or spec.frequency_penalty != 0 or spec.presence_penalty != 0


def _matcher(model: Model, spec: TaskSpec, prompt: Prompt) -> LLMatcher | None:
    try:
        text = grammar.lark(spec, prompt.form, prompt.controls)
    except InvalidTask as error:
        raise EngineError(str(error), retry=isinstance(error, TryAgain)) from None
    if text is None:
        return None
    matcher = LLMatcher(model.vocabulary, text, log_level=0, limits=grammar.limits())
    if matcher.is_error():  # it passed the check, so this is about the model's vocabulary
        raise EngineError(f"{constraint(spec)}: cannot be used with this model: {_limit(matcher)}", retry=False)
    return matcher


class Prompter:
    """Renders tasks with a model's chat template, and tokenises them."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self.template = _chat_template(model)
        self._controls = _controls(model, self.template) if self.template is not None else {}

    def prompt(self, spec: TaskSpec) -> Prompt:
        """Raises EngineError (retry=False)."""
        if spec.prompt_ids is not None:
            check_tokens("prompt_ids", spec.prompt_ids, self._model.vocab_size)
            return Prompt(list(spec.prompt_ids))
        if spec.suffix is not None:
            tokens = self._model.tokenize_gap(spec.prompt or "", spec.suffix)
            if tokens is None:
                raise EngineError("suffix: this model has no tokens to fill in with; leave it out", retry=False)
            return Prompt(tokens)
        text, form = prompt_text(spec, self.template)
        if self.template is None:
            return Prompt(self._model.tokenize(text, special=False, add_bos=self._model.adds_bos))
        return Prompt(self._model.tokenize(text, special=True, add_bos=False), form, self._controls)

    def echo(self, spec: TaskSpec) -> str:
        """What the text is to begin with. Raises EngineError (retry=False)."""
        if not spec.echo:
            return ""
        if spec.prompt_ids is not None:
            return b"".join(map(self._model.piece, spec.prompt_ids)).decode(errors="replace")
        check_echo(spec, as_it_is=self.template is None and spec.suffix is None)
        return spec.prompt or ""


def _chat_template(model: Model) -> ChatTemplate | None:
    source = model.chat_template()
    if source is None:
        return None
    template = gguf_template(source, eos=model.token_text(model.eos), bos=model.token_text(model.bos))
    if template is None:
        log.warning("chat_template_unusable", hint="the model completes prompts, and takes no chats")
    return template


def gguf_template(source: str, *, eos: str = "", bos: str = "") -> ChatTemplate | None:
    """The template in a model's file, run in Jinja's sandbox as Hugging Face's libraries run it. None for one that
    cannot be used."""
    try:
        formatter: Any = Jinja2ChatFormatter(source, eos, bos)
    except Exception:  # it is whatever the file's makers wrote
        return None

    def render(messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, more: dict[str, Any]) -> str:
        return str(formatter(messages=messages, tools=tools, **more).prompt)

    template = ChatTemplate(source, render)
    return template if template.chats else None


def _controls(model: Model, template: ChatTemplate) -> dict[str, int]:
    """Those of the marks in answers that are, or contain, control tokens: text never has them."""
    tokens = {t for mark in template.marks for t in model.tokenize(mark, special=True, add_bos=False)}
    return {model.token_text(token): token for token in sorted(tokens) if not model.piece(token)}


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


def first_logprobs(model: Model, token: int) -> dict[str, Any]:
    """The entry of a text's first token, which nothing foretells."""
    return _named(model, token, None) | {"top_logprobs": []}


def _logprob(model: Model, token: int, logprobs: Logits) -> dict[str, Any]:
    return _named(model, token, float(logprobs[token]))


def _named(model: Model, token: int, logprob: float | None) -> dict[str, Any]:
    piece = model.piece(token)
    return {
        "token": piece.decode(errors="replace") or model.token_text(token),
        "logprob": logprob,
        "bytes": list(piece),
    }
