"""PerLLM's broker: what travels, where it rests, and the doors for producers."""

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
