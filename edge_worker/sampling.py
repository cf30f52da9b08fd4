"""From what a producer asks for to llama.cpp's samplers and a rendered prompt."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

import llama_cpp.llama_cpp as lib
import numpy as np
from llama_cpp.llama_chat_format import Jinja2ChatFormatter
from llama_cpp.llama_grammar import json_schema_to_gbnf

from perllm.broker.engine.contract import EngineError
from perllm.broker.messages import Sampling, TaskSpec
from perllm.edge_worker.llama import LlamaError, Logits, Model, Sampler

#: A JSON schema's grammar may be so long, characters (as `Sampling.grammar`).
MAX_GRAMMAR = 65_536
#: llama.cpp parses a grammar by recursion: deeper nesting could overflow its stack, which would end the worker.
MAX_NESTING = 64


def greedy(spec: Sampling) -> bool:
    """Whether the most likely token is taken as it is."""
    return spec.temperature == 0 and not _penalised(spec) and spec.grammar is None and spec.json_schema is None


def make_sampler(model: Model, spec: Sampling, penalty_window: int) -> Sampler:
    """The sampler `spec` asks for. Penalties look at up to `penalty_window` generated tokens (not at the prompt, as in
    the OpenAI API). Raises EngineError (retry=False) for a grammar or schema that cannot be used.
    """
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
    try:
        return Sampler(model, chain, _grammar(spec))
    except LlamaError as error:
        raise EngineError(f"grammar: {error}", retry=False) from None


def _penalised(spec: Sampling) -> bool:
    return spec.repeat_penalty != 1 or spec.frequency_penalty != 0 or spec.presence_penalty != 0


def _grammar(spec: Sampling) -> str | None:
    if spec.grammar is not None:
        grammar, field = spec.grammar, "grammar"
    elif spec.json_schema is not None:
        field = "json_schema"
        try:
            grammar = str(json_schema_to_gbnf(json.dumps(spec.json_schema)))
        except (Exception, RecursionError) as error:  # the converter raises whatever a schema leads it into
            raise EngineError(f"json_schema: cannot be used: {type(error).__name__}: {error}", retry=False) from None
    else:
        return None
    if not grammar.strip():
        raise EngineError(f"{field}: is empty", retry=False)
    if len(grammar) > MAX_GRAMMAR:
        raise EngineError(f"{field}: its grammar is longer than {MAX_GRAMMAR} characters", retry=False)
    if "\0" in grammar:
        raise EngineError(f"{field}: contains a null character", retry=False)
    if _nesting(grammar) > MAX_NESTING:
        raise EngineError(f"{field}: nested deeper than {MAX_NESTING}", retry=False)
    return grammar


def _nesting(grammar: str) -> int:
    """Depth of parentheses, at least as the parser sees it (those inside literals count as well)."""
    depth = deepest = 0
    for character in grammar:
        if character == "(":
            depth += 1
            deepest = max(deepest, depth)
        elif character == ")":
            depth = max(0, depth - 1)
    return deepest


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
