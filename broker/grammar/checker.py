"""The check of users' grammars and schemas: each distinct text once per process, in a child that may die of it.

One tenant's slow grammars keep nobody else's waiting: each tenant has one of the children at a time, few of his may
wait, and the time his slow ones took is held against him for a while.
"""

from __future__ import annotations

import asyncio
import atexit
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from queue import LifoQueue
from typing import Any

from perllm.broker.chat import AnswerForm
from perllm.broker.errors import InvalidTask, TryAgain
from perllm.broker.grammar import child
from perllm.broker.grammar.answer import AnswerGrammar, answer_grammar, is_held, keeps
from perllm.broker.messages import TaskSpec

#: Children, and threads of an event loop's process that wait for them.
CHILDREN, THREADS = 2, 32
#: Verdicts cached.
CACHED_VERDICTS = 20_000
#: Checks of one tenant that may wait, where nobody can be kept waiting.
MAX_WAITING = 4
#: CPU time a tenant's checks may take, where nobody can be kept waiting: so much at once and so much per s. The first
#: 20 ms of each are free: what people mean takes less.
BURST, RATE, FREE = 5.0, 0.1, 0.02
#: Seconds after which a child counts as hung, however busy the machine is.
HUNG = 20.0


def lark(spec: TaskSpec, form: AnswerForm | None = None, controls: Mapping[str, int] | None = None) -> str | None:
    """The grammar of the task's answer as llguidance takes it, checked; None where any text will do. `form` is how the
    model writes answers, `controls` are marks that are control tokens of it. Waits (seconds at most). Raises
    InvalidTask, naming the field."""
    check(spec)
    made = answer_grammar(spec, form, controls)
    return made.text if made is not None else None


def check(spec: TaskSpec, *, hurried: bool = False) -> None:
    """Whether the task's grammar, schema and tools can be used. Waits for a child; `hurried` says that nobody must be
    kept waiting for long. Raises InvalidTask, naming the field; TryAgain, if hurried and the tenant has too much
    checked."""
    checker = _checker
    if (key := _key(spec)) is not None and not checker.known(key):
        with checker.waiting(spec.tenant, hurried=hurried):
            checker.check(key, spec)


async def check_from_loop(spec: TaskSpec) -> None:
    """`check`, hurried, for an event loop: it waits in threads of its own."""
    checker = _checker
    if (key := _key(spec)) is not None and not checker.known(key):
        with checker.waiting(spec.tenant, hurried=True):
            await asyncio.get_running_loop().run_in_executor(checker.threads, checker.check, key, spec)


# --- the text


def _key(spec: TaskSpec) -> bytes | None:
    """None where there is nothing to check, or nothing to check it with: then the worker does."""
    if not is_held(spec) or find_spec("llguidance") is None:
        return None
    tools = [(tool.name, tool.parameters if keeps(spec, tool) else None) for tool in spec.offered_tools]
    source = [spec.grammar, spec.json_schema, tools, spec.tool_choice, spec.parallel_tool_calls]
    return hashlib.sha256(json.dumps(source, ensure_ascii=False).encode()).digest()


# --- the children


class _Died(Exception):
    """The child died of what it was given. The message says why."""


class _Hung(Exception):
    """The child did not answer, or was ended by others: this says nothing of what it was given."""


class _Child:
    """One process, started when it is first needed, and anew when it has died. One thread at a time."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def judge(self, lark: str) -> tuple[str, float]:
        """What is wrong ("": nothing), and the CPU time it took, s. Raises _Died, _Hung."""
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(Path(child.__file__))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        process, text = self._process, lark.encode()
        assert process.stdin is not None
        assert process.stdout is not None
        watch = threading.Timer(HUNG, process.kill)
        watch.daemon = True
        watch.start()
        try:
            process.stdin.write(len(text).to_bytes(4, "big") + text)
            process.stdin.flush()
            reply = process.stdout.readline()
        except OSError:
            reply = b""
        finally:
            watch.cancel()
        if reply.endswith(b"\n"):
            said = json.loads(reply)
            return str(said["error"]), float(said["seconds"])
        raise self._cause(self.end())

    @staticmethod
    def _cause(status: int | None) -> Exception:
        match status:
            case int() if status == -signal.SIGPROF:
                return _Died(f"takes longer than {child.CPU:g} s to compile: simplify it")
            case int() if status in (-signal.SIGSEGV, -signal.SIGBUS):
                return _Died("its rules refer to each other too deeply: simplify it")
            case int() if status == -signal.SIGABRT:
                return _Died("takes too much memory to compile: simplify it")
        return _Hung(f"status {status}")

    def end(self) -> int | None:
        """End the process, if there is one; returns its status."""
        process, self._process = self._process, None
        if process is None:
            return None
        assert process.stdin is not None
        assert process.stdout is not None
        with suppress(BrokenPipeError):
            process.stdin.close()
        try:
            status = process.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            process.kill()
            status = process.wait()
        process.stdout.close()
        return status


@dataclass(slots=True)
class _Tenant:
    """What one tenant has under way, and the CPU time held against him, s, as of a moment (monotonic)."""

    turn: threading.Lock = field(default_factory=threading.Lock)
    waiting: int = 0
    debt: float = 0.0
    at: float = field(default_factory=time.monotonic)

    def current_debt(self) -> float:
        """What is held against him now, s: it is paid off at `RATE`."""
        now = time.monotonic()
        self.debt, self.at = max(0.0, self.debt - RATE * (now - self.at)), now
        return self.debt


class _Checker:
    """The verdicts of this process, and who waits for one."""

    def __init__(self) -> None:
        self.threads = ThreadPoolExecutor(THREADS, thread_name_prefix="perllm-grammar")
        self._children = [_Child() for _ in range(CHILDREN)]
        self._free: LifoQueue[_Child] = LifoQueue()
        for one in self._children:
            self._free.put(one)
        self._lock = threading.Lock()  # of the rest
        self._verdicts: OrderedDict[bytes, str] = OrderedDict()
        self._tenants: dict[str, _Tenant] = {}

    def known(self, key: bytes) -> bool:
        """Whether this was found good before. Raises InvalidTask where it was found bad."""
        with self._lock:
            verdict = self._verdicts.get(key)
            if verdict is None:
                return False
            self._verdicts.move_to_end(key)
        if verdict:
            raise InvalidTask(verdict)
        return True

    @contextmanager
    def waiting(self, name: str, *, hurried: bool) -> Iterator[None]:
        """One more check of this tenant is under way. Raises TryAgain."""
        with self._lock:
            tenant = self._tenants.setdefault(name, _Tenant())
            if hurried and (tenant.waiting >= MAX_WAITING or tenant.current_debt() > BURST):
                raise TryAgain(
                    "grammar: too many new grammars, schemas and tools of this tenant are being checked, or took long "
                    "to: try again later, or use one that was used before"
                )
            tenant.waiting += 1
        try:
            yield
        finally:
            with self._lock:
                tenant.waiting -= 1
                for idle in [n for n, t in self._tenants.items() if not t.waiting and not t.current_debt()]:
                    del self._tenants[idle]

    def check(self, key: bytes, spec: TaskSpec) -> None:
        """Have it checked, unless somebody else had meanwhile. Raises InvalidTask, TryAgain."""
        tenant = self._tenants[spec.tenant]
        with tenant.turn:
            if self.known(key):
                return
            try:
                verdict, seconds = self._judge(spec)
            except _Hung:
                raise TryAgain("grammar: it could not be checked now: try again") from None
            with self._lock:
                tenant.debt = tenant.current_debt() + max(0.0, seconds - FREE)
                self._verdicts[key] = verdict
                if len(self._verdicts) > CACHED_VERDICTS:
                    self._verdicts.popitem(last=False)
        self.known(key)

    def _judge(self, spec: TaskSpec) -> tuple[str, float]:
        """The verdict, as an error names it, and the CPU time it took. Raises _Hung."""
        try:
            made = answer_grammar(spec)
        except InvalidTask as error:
            return str(error), 0.0
        assert made is not None
        for last_try in (False, True):
            one = self._free.get()
            try:
                wrong, seconds = one.judge(made.text)
            except _Died as died:
                wrong, seconds = str(died), child.CPU
            except _Hung:
                if last_try:
                    raise
                continue
            finally:
                self._free.put(one)
            return wrong and _plain(wrong, spec, made), seconds
        raise AssertionError("the second try ends otherwise")

    def close(self) -> None:
        for one in self._children:
            one.end()


def _plain(error: str, spec: TaskSpec, made: AnswerGrammar) -> str:
    """llguidance's complaint in one line, naming the field, without our Lark around what the user wrote."""
    at = re.match(r"at (\d+)\(", error)
    name = made.fields.get(int(at[1]) if at else 0) or _constraint(spec)
    said = error.split("\n<non-verbose", 1)[0]
    _, found, rest = said.partition("failed to compile JSON schema: ")
    said = re.split(r"\n +\d+ \| ", rest if found else said, maxsplit=1)[0]
    said = " ".join(said.split())[:300]
    if (schema := _schema(spec, name)) is None:
        return f"{name}: cannot be used: {said}"
    if said.startswith("Unimplemented keys: "):
        keys = json.loads(said.removeprefix("Unimplemented keys: "))
        where = ", ".join(_path(schema, key) for key in keys[:5])
        return f"{name}: cannot be used: {where}: not supported: leave it out"
    for begins, key, what in _KEYWORDS:
        if said.startswith(begins):
            return f"{name}: cannot be used: {_path(schema, key)}: {what or said}"
    return f"{name}: cannot be used: {said}"


#: How a complaint begins, the keyword it is about, and what to say of it; None: as it is.
_KEYWORDS = (
    ("oneOf constraints", "oneOf", "its branches may overlap: use anyOf"),
    ("min/maxProperties only", "minProperties", "not supported beside properties that are not required: leave it out"),
    ("Unknown format", "format", None),
    ("Value for 'multipleOf'", "multipleOf", "has too many digits: round it"),
    ("regex parse error", "pattern", None),
)


def _constraint(spec: TaskSpec) -> str:
    """The field that constrains the answer: the one to name where it is not known which part of it is wrong."""
    if spec.grammar is not None:
        return "grammar"
    return "json_schema" if spec.json_schema is not None else "tools"


def _schema(spec: TaskSpec, name: str) -> Mapping[str, Any] | None:
    """The schema a field holds."""
    if name == "json_schema":
        return spec.json_schema
    if name.startswith("tools."):
        return spec.tools[int(name.split(".")[1])].parameters
    return None


def _path(schema: Mapping[str, Any], key: str) -> str:
    """Where in the schema this keyword stands, as a JSON pointer: the first place."""
    left: list[tuple[str, Any, bool]] = [("#", schema, False)]  # (where, what, whether its keys are names)
    while left:
        where, value, names = left.pop(0)
        if isinstance(value, dict):
            if key in value and not names:
                return f"{where}/{key}"
            for name, part in value.items():
                maps = not names and name in ("properties", "patternProperties", "$defs", "definitions")
                if names or name not in ("const", "enum", "default", "examples"):
                    left.append((f"{where}/{name}", part, maps))
        elif isinstance(value, list):
            left += [(f"{where}/{number}", part, False) for number, part in enumerate(value)]
    return key


_checker = _Checker()


def _renew() -> None:
    """A forked process shares no children with the one it came from."""
    global _checker  # noqa: PLW0603
    _checker = _Checker()


def _close() -> None:
    _checker.close()


os.register_at_fork(after_in_child=_renew)
atexit.register(_close)
