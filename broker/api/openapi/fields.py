"""Every field of the OpenAI endpoints as a table (`perllm api fields`, docs/http-api.md): taken, ignored or refused."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import BaseModel

from perllm.broker.api.openapi.schemas import BatchRequest
from perllm.broker.api.routes.files import UPLOAD_FIELDS
from perllm.broker.openai.requests import (
    ChatRequest,
    CompletionRequest,
    EmbeddingsRequest,
    Ignored,
    Refused,
    RerankRequest,
    ResponseRequest,
    marked,
)

#: The endpoints that answer with text, which have most of their fields in common.
TEXT: Mapping[str, type[BaseModel]] = {
    "chat": ChatRequest,
    "completions": CompletionRequest,
    "responses": ResponseRequest,
}
#: Those that answer with numbers.
NUMBERS: Mapping[str, type[BaseModel]] = {"embeddings": EmbeddingsRequest, "rerank": RerankRequest}
#: The others.
OTHERS: Mapping[str, Mapping[str, str]] = {
    "Files": {name: field["description"] for name, field in UPLOAD_FIELDS.items()},
    "Batches": {name: field.description or "" for name, field in BatchRequest.model_fields.items()},
}


def markdown() -> str:
    """The tables."""
    lines = [*_table(TEXT), "", *_table(NUMBERS)]
    for title, fields in OTHERS.items():
        lines += ["", f"| {title.lower()} | |", "|---|---|"]
        lines += [f"| `{name}` | {text} |" for name, text in fields.items()]
    return "\n".join(lines) + "\n"


def _table(endpoints: Mapping[str, type[BaseModel]]) -> list[str]:
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for endpoint, model in endpoints.items():
        for name, mark, text in marked(model):
            rows.setdefault((name, _meaning(mark, text)), {})[endpoint] = _word(mark)
    lines = [f"| field | {' | '.join(endpoints)} | |", f"|---|{'---|' * len(endpoints)}---|"]
    for (name, meaning), words in sorted(rows.items()):
        cells = " | ".join(words.get(endpoint, "–") for endpoint in endpoints)
        lines.append(f"| `{name}` | {cells} | {meaning} |")
    return lines


def _word(mark: Ignored | Refused | None) -> str:
    return "ignored" if isinstance(mark, Ignored) else "refused" if isinstance(mark, Refused) else "yes"


def _meaning(mark: Ignored | Refused | None, text: str) -> str:
    if not isinstance(mark, Refused) or not mark.usual:
        return text
    return f"{text} ({' and '.join(f'`{usual!r}`' for usual in mark.usual)} asks for nothing else)"
