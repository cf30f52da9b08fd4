"""The errors a user can meet. Each message names what is wrong, where, and what to do about it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NoReturn

from pydantic import ValidationError


class PerLLMError(Exception):
    """Base of all errors that are the caller's or the environment's to mend; shown without a traceback."""


class InvalidTask(PerLLMError):
    """A task, or one field of it, is not acceptable; nothing was stored."""


class TryAgain(InvalidTask):
    """A task could not be judged now; nothing was stored. The same one may be taken later."""


class Unreachable(PerLLMError):
    """The Redis server cannot be used: not there, wrong password, too old, or out of memory."""


class StoreUnavailable(PerLLMError, OSError):
    """Where the HTTP API keeps files cannot be used now: not there, full, or it refuses us."""


class TaskNotFound(PerLLMError):
    """No task has this id (it may have been finished and forgotten after the retention time)."""


class Unreadable(PerLLMError):
    """What is stored of a task cannot be read: it was written by another version, or spoilt from outside."""


class WaitTimeout(PerLLMError, TimeoutError):
    """The task did not reach a final state within the given time; it goes on."""


class BadSetting(PerLLMError):
    """A setting, a file it names or a node's registration is unusable."""


class TaskFailed(PerLLMError):
    """Raised by `AsyncResult.get()` in Celery producers, and by `Client.embed`, for a task that failed."""


class TaskExpired(PerLLMError):
    """Raised by the same for a task whose deadline passed."""


class TaskRejected(PerLLMError):
    """Raised by the same for a task the scheduler refused, with its reason."""


def _print_error(text: str) -> None:
    print(f"error: {text}", file=sys.stderr, flush=True)


#: Writes what a process ends with; `perllm.broker.logs` puts another here where lines are JSON.
last_words: Callable[[str], None] = _print_error


def exit_with(error: PerLLMError) -> NoReturn:
    """End a process that cannot do its work: one line, and status 2."""
    last_words(str(error))
    sys.exit(2)


def field_errors(error: ValidationError, name: Callable[[str], str] = str) -> str:
    """A validation error as one line: each field (spelt by `name`), what is wrong with it, and what was given."""
    return "; ".join(
        f"{name('.'.join(map(str, item['loc'])) or 'task')}: {item['msg'].removeprefix('Value error, ')}{_given(item)}"
        for item in error.errors(include_url=False, include_context=False)
    )


def _given(item: Any) -> str:
    if item["type"] in ("missing", "value_error") or isinstance(item.get("input"), dict | list | tuple):
        return ""
    try:
        given = repr(item.get("input"))
    except ValueError:  # an integer of too many digits
        return ""
    return f" (given {given if len(given) <= 40 else given[:39] + '…'})"
