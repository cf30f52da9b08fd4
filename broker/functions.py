"""Lua on the server, as Redis Functions (valkey.io, "Functions"): loaded once by who may, called by everybody else.

A user who may run scripts of his own can stop the server with one line, and write whatever his rights let him write
without any check. So no role may: the roles have FCALL, and what they can call is what the server's administrator has
loaded (`perllm ledger load`; the embedded server does it by itself, and where one user may do everything, whoever comes
first). Functions are kept with the data: restarts and FLUSHALL leave them.

A library's name has a digest of its text in it. Versions lie side by side, and every program calls its own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import import_module
from typing import Any, ClassVar, TypeVar

import redis

Argument = str | bytes | int | float
T = TypeVar("T")

_PREFIX = "perllm_"
#: Where libraries are defined.
_MODULES = (
    "perllm.broker.ledger.script",
    "perllm.broker.queues.transport",
    "perllm.broker.inbox.results",
    "perllm.broker.api.leased_worker",
    "perllm.broker.api.keys",
)


class Library:
    """Lua that registers functions. `@name@` in it stands for the library's name, with which its functions' begin."""

    known: ClassVar[dict[str, Library]] = {}

    def __init__(self, title: str, text: str) -> None:
        digest = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()[:12]
        self.name = f"{_PREFIX}{title}_{digest}"
        self.source = f"#!lua name={self.name}\n{text.replace('@name@', self.name)}"
        self.known[self.name] = self

    def load(self, client: redis.Redis) -> None:
        """Put it on the server; harmless where it is already."""
        client.execute_command("FUNCTION", "LOAD", "REPLACE", self.source)  # type: ignore[no-untyped-call]


class Function(Library):
    """One function, whose `body` sees KEYS and ARGV as a script does. `full`: it also runs on a server that is full."""

    def __init__(self, title: str, body: str, *, full: bool = False) -> None:
        flags = "'allow-oom'" if full else ""
        register = f"redis.register_function{{function_name = '@name@', flags = {{{flags}}}"
        super().__init__(title, f"{register}, callback = function(KEYS, ARGV)\n{body}\nend}}\n")

    def on(self, client: redis.Redis) -> Callable[..., Any]:
        """To be called with `keys` and `args`."""

        def call(keys: Sequence[str], args: Sequence[Argument]) -> Any:
            words = ("FCALL", self.name, len(keys), *keys, *args)
            return with_library(client, [self], lambda: client.execute_command(*words))  # type: ignore[no-untyped-call]

        return call


def with_library(client: redis.Redis, libraries: Sequence[Library], call: Callable[[], T]) -> T:
    """Call, and once more after loading these where the server has them not. Raises what `missing` tells of where this
    user may not load them."""
    try:
        return call()
    except redis.exceptions.ResponseError as error:
        if not missing(error):
            raise
        load_or_raise(client, libraries, error)
        return call()


def missing(error: object) -> bool:
    """Whether the server has no such function."""
    return isinstance(error, redis.exceptions.ResponseError) and "Function not found" in str(error)


def load_or_raise(client: redis.Redis, libraries: Sequence[Library], error: redis.exceptions.ResponseError) -> None:
    """Load these; where this user may not, it is their being missing that is to be told."""
    try:
        for library in libraries:
            library.load(client)
    except redis.exceptions.NoPermissionError:
        raise error from None


def load_all(client: redis.Redis, *, only: bool = False) -> list[str]:
    """Put every library of this version on the server; returns their names. `only`: and drop those of others."""
    for module in _MODULES:
        with suppress(ModuleNotFoundError):  # of an extra that is not installed here
            import_module(module)
    for library in Library.known.values():
        library.load(client)
    if only:
        for name in others(client):
            client.execute_command("FUNCTION", "DELETE", name)  # type: ignore[no-untyped-call]
    return sorted(Library.known)


def others(client: redis.Redis) -> list[str]:
    """Names of PerLLM's libraries on the server that are of another version."""
    listed = client.execute_command("FUNCTION", "LIST", "LIBRARYNAME", f"{_PREFIX}*")  # type: ignore[no-untyped-call]
    names = [_text(entry) for entry in _names(listed)]
    return sorted(name for name in names if name not in Library.known)


def _names(listed: Any) -> list[Any]:
    """The libraries' names of FUNCTION LIST's reply, a map or a flat list for each."""
    return [
        (entry.get(b"library_name") or entry.get("library_name"))
        if isinstance(entry, dict)
        else entry[[_text(word) for word in entry[::2]].index("library_name") * 2 + 1]
        for entry in listed
    ]


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
