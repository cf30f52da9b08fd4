"""Processes around one server, and blows falling on them: everybody who ends is started again."""

from __future__ import annotations

import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from support.cluster import Cluster, Process
from support.replay import POISON_STATUS
from support.wait import PATIENCE

from chaos.plan import Blow, Role
from chaos.server import FragileServer, MovingServer
from perllm.broker.errors import Unreachable

#: Seconds without anything done after which nothing will be.
STALL = 90.0
#: Seconds before one that could not start (there was no server) tries again.
_AGAIN = 0.3
_LOOK_EVERY = 0.02


#: Told of kills so far and tasks done so far.
Show = Callable[[int, int], None]


class Struck(NamedTuple):
    """A blow that fell. `until` is when the server answered again, where it was the server's."""

    kind: str
    name: str
    at: float  # s since the epoch
    pause: float
    until: float = 0.0


@dataclass
class Post:
    """A place that is always to be filled: `start` fills it, given its name."""

    name: str
    role: Role
    start: Callable[[str], Process]
    process: Process | None = None
    back: float | None = 0.0  # when it is to be started, where it is not there
    thaw: float | None = None  # when it is to go on, where it is frozen
    give_up: float | None = None  # when it should have ended, where it was asked to

    @property
    def up(self) -> bool:
        return self.process is not None and self.thaw is None and self.give_up is None


class World:
    """See the module's head. `posts` are filled in order; `cluster` is what starts their processes."""

    def __init__(self, folder: Path, server: FragileServer | MovingServer, cluster: Cluster, posts: list[Post]) -> None:
        self.folder = folder
        self.server = server
        self.cluster = cluster
        self.posts = posts
        self.struck: list[Struck] = []
        self.crashes: list[str] = []  # ends nobody asked for
        self.came_back: Callable[[float], None] = lambda ended: None  # told of each new start after an end by force

    # --- blows

    def rain(self, blows: Sequence[Blow], tasks: int, done: Callable[[], int | None], show: Show) -> None:
        """Let the blows fall, no faster than the work goes: each waits until its share of the tasks is done. Returns
        when all have fallen and all tasks are done, or when nothing gets done any more."""
        for number, blow in enumerate(blows):
            self._tend_for(blow.wait)
            if not self._work(done, tasks * number / len(blows), show):
                return
            self._strike(blow)
        self._work(done, tasks, show)

    def _work(self, done: Callable[[], int | None], share: float, show: Show) -> bool:
        """Tend everybody until so much is done; False when for STALL s nothing was."""
        last, since = -1, time.monotonic()
        while True:
            finished = done()
            if finished is not None:
                show(len(self.struck), finished)
                if finished >= share:
                    return True
                if finished != last:
                    last, since = finished, time.monotonic()
            if time.monotonic() - since > STALL:
                return False
            self._tend_for(0.1)

    def _strike(self, blow: Blow) -> None:
        if blow.role == "server":
            self._strike_server(blow)
            return
        give_up = time.monotonic() + PATIENCE
        while not (up := [p for p in self.posts if p.role == blow.role and p.up and p.process and p.process.running]):
            if time.monotonic() > give_up:
                raise AssertionError(f"no {blow.role} comes up:\n{self._outputs(blow.role)}")
            self._tend_for(_LOOK_EVERY)
        post = self._leader(up) if blow.role == "scheduler" and blow.pick < 0.75 else None
        post = post or up[int(blow.pick * len(up))]
        assert post.process is not None
        self.struck.append(Struck(blow.kind, post.name, time.time(), blow.pause))
        match blow.how:
            case "freeze":
                post.process.signal(signal.SIGSTOP)
                post.thaw = time.monotonic() + blow.pause
            case "terminate":
                post.process.signal(signal.SIGTERM)
                post.give_up, post.back = time.monotonic() + PATIENCE, time.monotonic() + blow.pause
            case _:
                post.process.kill()
                post.process, post.back = None, time.monotonic() + blow.pause

    def _strike_server(self, blow: Blow) -> None:
        at = time.time()
        if isinstance(self.server, MovingServer):
            self.server.kill()
            self._tend_until(self.server.answers)
            self.came_back(at)
            self.struck.append(Struck("server.failover", "server", at, 0.0, time.time()))
            self._tend_for(blow.pause)
            self.server.revive()
            return
        match blow.how:
            case "freeze":
                self.server.freeze()
                self._tend_for(blow.pause)
                self.server.thaw()
            case "terminate":
                self.server.stop()
            case "kill":
                self.server.kill()
            case "power_cut":
                self.server.power_cut(blow.cut)
        if blow.how != "freeze":
            self._tend_for(blow.pause)
            self.server.start(blow.fsync)
            self.came_back(at)
        self.struck.append(Struck(blow.kind, "server", at, blow.pause, time.time()))

    def _leader(self, posts: list[Post]) -> Post | None:
        try:
            return next((p for p in posts if p.process and self.cluster.leads(p.process)), None)
        except Unreachable:
            return None

    # --- keeping them up

    def _tend_for(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while True:
            self.tend()
            if (left := until - time.monotonic()) <= 0:
                return
            time.sleep(min(left, _LOOK_EVERY))

    def _tend_until(self, reached: Callable[[], bool]) -> None:
        give_up = time.monotonic() + PATIENCE
        while not reached():
            if time.monotonic() > give_up:
                raise AssertionError("the server does not come back")
            self._tend_for(_LOOK_EVERY)

    def tend(self) -> None:
        """Start those who are due, wake those who are due, see who has ended."""
        now = time.monotonic()
        for post in self.posts:
            if post.process is not None and not post.process.running:
                self._ended(post, post.process)
            elif post.process is not None and post.give_up is not None and now > post.give_up:
                self.crashes.append(f"{post.name} does not stop:\n{post.process.output[-2000:]}")
                post.process.kill()
            if post.process is not None and post.thaw is not None and now >= post.thaw:
                post.process.signal(signal.SIGCONT)
                post.thaw = None
            if post.process is None and post.back is not None and now >= post.back:
                post.process, post.back = post.start(post.name), None

    def _ended(self, post: Post, process: Process) -> None:
        status = process.wait()
        asked = post.give_up is not None
        if status == POISON_STATUS:
            self.struck.append(Struck("worker.poison", post.name, time.time(), 0.0))
        elif not (asked and status in (0, -signal.SIGTERM)) and not (status == 2 and "error: " in process.output):
            self.crashes.append(f"{post.name} ended with status {status}:\n{process.output[-2000:]}")
        post.process, post.thaw, post.give_up = None, None, None
        if post.back is None and not asked:
            post.back = time.monotonic() + _AGAIN

    # --- the end

    def wake(self) -> None:
        """Let everybody go on who is frozen."""
        for post in self.posts:
            if post.process is not None and post.thaw is not None:
                post.process.signal(signal.SIGCONT)
                post.thaw = None

    def dismiss(self, *roles: Role) -> None:
        """Stop everybody of these roles gracefully, for good."""
        self.wake()
        leaving = [p for p in self.posts if p.role in roles]
        for post in leaving:
            post.back = None
            if post.process is not None and post.give_up is None:
                post.process.signal(signal.SIGTERM)
                post.give_up = time.monotonic() + PATIENCE
        while any(p.process is not None for p in leaving):
            self._tend_for(_LOOK_EVERY)
            for post in leaving:
                post.back = None

    def settle(self, unfinished: Callable[[], object], patience: float) -> bool:
        """Tend everybody until nothing is unfinished; False when for `patience` s nothing has changed."""
        last, since = unfinished(), time.monotonic()
        while last is None or last:
            self._tend_for(0.1)
            if (now := unfinished()) != last:
                last, since = now, time.monotonic()
            elif time.monotonic() - since > patience:
                return False
        return True

    def kinds(self) -> dict[str, int]:
        """How often each kind of blow fell."""
        return dict(sorted(Counter(s.kind for s in self.struck).items()))

    def _outputs(self, role: Role) -> str:
        return "\n".join(p.process.output[-2000:] for p in self.posts if p.role == role and p.process)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cluster.__exit__(kind, error, trace)
        self.server.close()
