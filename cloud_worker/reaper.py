"""vLLM's processes do not notice when the worker is killed, and would keep the GPU's memory: somebody must end them."""

from __future__ import annotations

import contextlib
import subprocess
import threading

import psutil

#: Learns process ids line by line; when its input ends, its parent is gone, whatever it died of.
_SCRIPT = 'while read -r pid; do pids="$pids $pid"; done; [ -z "$pids" ] || kill -KILL $pids 2>/dev/null'
#: Seconds between two polls for new processes while the engine starts.
_PROCESS_POLL = 0.2


class Reaper:
    """Sees to it that every process this one starts between `watch` and `close` dies with it, even by SIGKILL."""

    def __init__(self) -> None:
        # A session of its own: what ends the worker's process group must not end it too.
        self._shell = subprocess.Popen(
            ["/bin/sh", "-c", _SCRIPT], stdin=subprocess.PIPE, text=True, start_new_session=True
        )
        self._known = {child.pid for child in psutil.Process().children(recursive=True)}
        self._started = threading.Event()

    def watch(self) -> None:
        """Look for new processes until `started`."""
        threading.Thread(target=self._watch, name="perllm-reaper", daemon=True).start()

    def _watch(self) -> None:
        while not self._started.wait(_PROCESS_POLL):
            self._add_new()

    def started(self) -> None:
        """The engine's processes are all there."""
        self._started.set()
        self._add_new()

    def _add_new(self) -> None:
        assert self._shell.stdin is not None
        with contextlib.suppress(psutil.NoSuchProcess, OSError, ValueError):
            for child in psutil.Process().children(recursive=True):
                if child.pid not in self._known:
                    self._known.add(child.pid)
                    if not any("resource_tracker" in word for word in child.cmdline()):  # it serves this process
                        self._shell.stdin.write(f"{child.pid}\n")
            self._shell.stdin.flush()

    def close(self) -> None:
        """Kill what is left of them. Idempotent."""
        self._started.set()
        with contextlib.suppress(OSError):
            assert self._shell.stdin is not None
            self._shell.stdin.close()
        self._shell.wait()
