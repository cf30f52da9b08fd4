"""What every engine does with the vectors of a model: check what is asked for, cut, normalise, and pack them."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from perllm.broker.engine.contract import EngineError
from perllm.broker.messages import TaskSpec
from perllm.broker.vectors import pack

#: One embedding, shape (width,).
Vector = npt.NDArray[np.float32]


def check_dimensions(wanted: int | None, width: int) -> None:
    """Raises EngineError (retry=False) where longer vectors are wanted than a model of this width makes."""
    if wanted is not None and wanted > width:
        raise EngineError(f"dimensions: {wanted} is more than the model's vectors have, {width}", retry=False)


def check_input(number: int, tokens: int, context: int) -> None:
    """Raises EngineError (retry=False) for an input (by its number, from 0) that is empty or longer than the context,
    tokens: it is computed whole or not at all."""
    if not tokens:
        raise EngineError(f"input {number} has no tokens", retry=False)
    if tokens > context:
        raise EngineError(f"input {number} has {tokens} tokens; the model takes {context} in one input", retry=False)


def made_of(vectors: Sequence[Vector], spec: TaskSpec) -> dict[str, Any]:
    """The fields of an `Output` a model's vectors come to: of an embedding task each cut to its dimensions and of
    length 1, as they travel; of a rerank task the one number in each. Raises EngineError (retry=True) for what is no
    number."""
    whole = np.asarray(vectors, np.float32)
    if not np.isfinite(whole).all():
        raise EngineError("the model's vectors hold what is no number", retry=True)
    if spec.kind == "rerank":
        return {"scores": tuple(whole[:, 0].tolist())}
    whole = whole[:, : spec.dimensions]
    lengths = np.linalg.norm(whole, axis=1, keepdims=True)
    unit = (whole / np.where(lengths > 0, lengths, 1)).astype(np.float32)
    return {"vectors": tuple(pack(array("f", row.tobytes())) for row in unit)}
