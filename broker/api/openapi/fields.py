"""Every field of the OpenAI endpoints as a table (`perllm api fields`, docs/http-api.md): taken, ignored or refused."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import BaseModel

from perllm.broker.api.openapi.schemas import BatchRequest
from perllm.broker.api.routes.files import UPLOAD_FIELDS
from perllm.broker.openai.requests import (
    ChatRequest,
    CompletionRequest,
    Ignored,
    Refused,
    ResponseRequest,
    marked,
)

#: The endpoints that answer with text, which have most of their fields in common.
TEXT: Mapping[str, type[BaseModel]] = {
    "chat": ChatRequest,
    "completions": CompletionRequest,
    "responses": ResponseRequest,
}
#: The others.
OTHERS: Mapping[str, Mapping[str, str]] = {
    "Files": {name: field["description"] for name, field in UPLOAD_FIELDS.items()},
    "Batches": {name: field.description or "" for name, field in BatchRequest.model_fields.items()},
}


def markdown() -> str:
    """The tables."""
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for endpoint, model in TEXT.items():
        for name, mark, text in marked(model):
            rows.setdefault((name, _meaning(mark, text)), {})[endpoint] = _word(mark)
    lines = [f"| field | {' | '.join(TEXT)} | |", f"|---|{'---|' * len(TEXT)}---|"]
    for (name, meaning), words in sorted(rows.items()):
        cells = " | ".join(words.get(endpoint, "–") for endpoint in TEXT)
        lines.append(f"| `{name}` | {cells} | {meaning} |")
    for title, fields in OTHERS.items():
        lines += ["", f"| {title.lower()} | |", "|---|---|"]
        lines += [f"| `{name}` | {text} |" for name, text in fields.items()]
    return "\n".join(lines) + "\n"


def _word(mark: Ignored | Refused | None) -> str:
    return "ignored" if isinstance(mark, Ignored) else "refused" if isinstance(mark, Refused) else "yes"


def _meaning(mark: Ignored | Refused | None, text: str) -> str:
    if not isinstance(mark, Refused) or not mark.usual:
        return text
    return f"{text} ({' and '.join(f'`{usual!r}`' for usual in mark.usual)} asks for nothing else)"
