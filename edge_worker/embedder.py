"""Embedding and rerank tasks as a model's tokens."""

from __future__ import annotations

import re
from collections.abc import Sequence

from perllm.broker.engine.contract import EngineError
from perllm.broker.engine.embedding import check_dimensions, check_input
from perllm.broker.messages import TaskSpec
from perllm.edge_worker.llama import Model


class Embedder:
    """Tokenises the inputs of tasks for one model, in the caller's thread."""

    def __init__(self, model: Model, pooling: str, context: int) -> None:
        """`context` is the longest input, tokens."""
        self._model, self._context = model, context
        self._reranks = pooling == "rank"
        self._pair = model.chat_template("rerank") if self._reranks else None

    def inputs(self, spec: TaskSpec) -> list[Sequence[int]]:
        """The tokens of each input. Raises EngineError (retry=False) for one that cannot be embedded."""
        check_dimensions(spec.dimensions, self._model.width)
        tokens: list[Sequence[int]] = list(spec.input_ids)
        if not tokens:
            query = spec.query or ""
            tokens = [self._pair_of(query, text) if self._reranks else self._text(text) for text in spec.inputs]
        for number, ids in enumerate(tokens):
            check_input(number, len(ids), self._context)
            if spec.input_ids and max(ids) >= self._model.vocab_size:
                known = self._model.vocab_size
                raise EngineError(f"input {number}: {max(ids)} is no token; the model knows {known}", retry=False)
        return tokens

    def _text(self, text: str) -> list[int]:
        return self._model.tokenize(text, special=False, add_bos=True)

    def _pair_of(self, query: str, text: str) -> list[int]:
        """A query and what may answer it, as the model was trained to see them: in the template its file has for that,
        or one after the other with the vocabulary's separators."""
        model = self._model
        if self._pair is not None:
            given = {"{query}": query, "{document}": text}
            whole = re.sub(r"\{query\}|\{document\}", lambda found: given[found[0]], self._pair)
            return model.tokenize(whole, special=True, add_bos=False)
        asked, answered = (model.tokenize(each, special=False, add_bos=False) for each in (query, text))
        return [*model.opening, *asked, *model.separator, *answered, *model.closing]
