"""Logging: structlog everywhere, one event name per happening, to stderr. No secret is ever an argument of an event.

With PERLLM_LOG_JSON every line of a process is one JSON object, whoever writes it: Celery, uvicorn, warnings and
crashes too.
"""

from __future__ import annotations

import atexit
import logging
import sys
import threading
import time
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TextIO

from perllm.broker import errors

if TYPE_CHECKING:
    import structlog

    from perllm.broker.settings import Settings


#: The event that a process which cannot do its work ends with, where lines are JSON.
LAST_WORDS = "cannot_start"
#: Seconds in which lines of no urgency gather.
GATHER = 0.05


class LazyLogger:
    """A structlog logger made at its first use: importing structlog takes as long as all the rest of a client."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, method: str) -> Any:
        import structlog  # noqa: PLC0415

        return getattr(structlog.get_logger(self._name), method)


class _Lines:
    """Where structlog writes: past the standard library's loggers, which would cost each line twice as much, and by a
    thread of its own, a few lines at a time: every write lets go of the interpreter, and in a process of many busy
    threads it takes long to have it again. From warnings on, what there is is written at once. A stream that takes no
    more (a full disk, a terminal that is gone) stops nobody's work."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._waiting: deque[str] = deque()
        self._any = threading.Event()
        self._writing = threading.RLock()  # a signal may come while this is held
        threading.Thread(target=self._write_on, name="perllm-log", daemon=True).start()
        atexit.register(self._write)

    def info(self, line: str) -> None:
        self._waiting.append(line)
        if not self._any.is_set():
            self._any.set()

    def warning(self, line: str) -> None:
        self._waiting.append(line)
        self._write()

    debug = info
    error = critical = exception = log = msg = warning

    def write(self, text: str) -> None:
        """For the standard library's handler."""
        self.warning(text.removesuffix("\n"))

    def flush(self) -> None:
        """Nothing waits."""

    def _write_on(self) -> None:
        while self._any.wait():
            time.sleep(GATHER)
            self._any.clear()
            self._write()

    def _write(self) -> None:
        with self._writing, suppress(OSError, ValueError, RuntimeError):
            lines = []
            while self._waiting:
                lines.append(f"{self._waiting.popleft()}\n")
            self._stream.write("".join(lines))
            self._stream.flush()


def configure(settings: Settings) -> None:
    """Set up structlog and the standard library's loggers (Celery, kombu) to one stream at the level set."""
    import structlog  # noqa: PLC0415

    level = getattr(logging, settings.log_level.upper())
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]
    last: structlog.typing.Processor
    if settings.log_json:
        last = structlog.processors.JSONRenderer()
    else:
        shared.append(_printable)
        last = structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
    lines = _Lines(sys.stderr)
    structlog.configure(
        processors=[*shared, last],
        logger_factory=lambda *_: lines,
        wrapper_class=structlog.make_filtering_bound_logger(level),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(lines)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*shared, structlog.stdlib.add_logger_name],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, last],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    logging.getLogger("celery").setLevel(max(level, logging.WARNING) if settings.log_level == "info" else level)
    logging.getLogger("kombu").setLevel(max(level, logging.WARNING))
    errors.last_words = lambda text: lines.error(f"error: {text}")
    if settings.log_json:
        _report_all()


def _printable(_: Any, __: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    """What users sent stays on its line, and commands no terminal."""
    for name, value in event.items():
        if isinstance(value, str) and not value.isprintable() and name != "exception":
            event[name] = repr(value)
    return event


def _report_all() -> None:
    """Have what Python itself would print become events."""
    import structlog  # noqa: PLC0415

    log = structlog.get_logger(__name__)

    def crashed(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        if not issubclass(kind, KeyboardInterrupt):
            log.critical("crashed", exc_info=(kind, error, trace))

    def thread_crashed(args: threading.ExceptHookArgs) -> None:
        if args.exc_value is not None and not issubclass(args.exc_type, SystemExit):
            name = args.thread.name if args.thread else None
            log.error("thread_crashed", thread=name, exc_info=(args.exc_type, args.exc_value, args.exc_traceback))

    errors.last_words = lambda text: log.critical(LAST_WORDS, reason=text)
    sys.excepthook, threading.excepthook = crashed, thread_crashed
    logging.captureWarnings(True)
