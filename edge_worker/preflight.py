"""`python -m perllm.edge_worker.preflight FILE [POOLING]`: whether llama.cpp can load a GGUF, found out in a process
that may crash on it.

A file can be well-formed and still lead llama.cpp into a failed assertion, which ends the process. A worker that loads
a model somebody gave it, perhaps while it serves others, lets a child process load it first.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import structlog

from perllm.broker.errors import BadSetting
from perllm.edge_worker.llama import OK, Context, LlamaError, Model

#: Seconds it may take: the model is read from disk once, for the worker as well.
TIMEOUT = 600.0
_REFUSED = 3


def preflight(path: Path, pooling: str | None = None) -> None:
    """Raises BadSetting when llama.cpp refuses `path`, or dies of it; with `pooling`, where it is to embed."""
    # The package is found here as it was by this process, whatever the working directory.
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p or "." for p in sys.path), "GGML_NO_BACKTRACE": "1"}
    command = [sys.executable, "-m", "perllm.edge_worker.preflight", str(path), *([pooling] if pooling else [])]
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, errors="replace", timeout=TIMEOUT, check=False
        )
    except subprocess.TimeoutExpired:
        raise BadSetting(f"llama.cpp did not load {path} within {TIMEOUT:.0f} s") from None
    if done.returncode == _REFUSED:
        raise BadSetting(f"llama.cpp cannot load {path}: {done.stdout.strip()}")
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[0].rsplit("/", 1)[-1]
        raise BadSetting(f"llama.cpp crashes on {path} ({reason}): the file is damaged, or not for this llama.cpp")


def main(path: Path, pooling: str | None = None) -> int:
    """Load, compute one token, and leave."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    try:
        model = Model(path)
        context = Context(model, kv_tokens=256, sequences=1, batch=32, threads=1, pooling=pooling)
        context.begin()
        context.add(0, 0, [0], output=True)
        if (status := context.decode()) != OK:
            raise LlamaError(f"it cannot compute a token (status {status})")
    except LlamaError as error:
        print(error)
        return _REFUSED
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), *sys.argv[2:]))
