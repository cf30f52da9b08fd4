"""PerLLM: a queue for LLM work with deadlines. What a producer needs is here; each name is loaded at its first use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from perllm.broker.client import AsyncClient, AsyncHandle, Client, Handle
    from perllm.broker.errors import (
        BadSetting,
        InvalidTask,
        PerLLMError,
        TaskExpired,
        TaskFailed,
        TaskNotFound,
        TaskRejected,
        Unreachable,
        WaitTimeout,
    )
    from perllm.broker.messages import Message, Receipt, Result, State, TaskSpec

_HOMES = {
    "perllm.broker.client": (
        "AsyncClient",
        "AsyncHandle",
        "Client",
        "Handle",
    ),
    "perllm.broker.errors": (
        "BadSetting",
        "InvalidTask",
        "PerLLMError",
        "TaskExpired",
        "TaskFailed",
        "TaskNotFound",
        "TaskRejected",
        "Unreachable",
        "WaitTimeout",
    ),
    "perllm.broker.messages": (
        "Message",
        "Receipt",
        "Result",
        "State",
        "TaskSpec",
    ),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "AsyncClient",
    "AsyncHandle",
    "BadSetting",
    "Client",
    "Handle",
    "InvalidTask",
    "Message",
    "PerLLMError",
    "Receipt",
    "Result",
    "State",
    "TaskExpired",
    "TaskFailed",
    "TaskNotFound",
    "TaskRejected",
    "TaskSpec",
    "Unreachable",
    "WaitTimeout",
]


def __getattr__(name: str) -> Any:
    if (home := _HOME_OF.get(name)) is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(home), name)
