"""The live scheduler: the event stream in, the pure core in the middle, dispatch out.

One process leads, under a fencing number that the ledger checks with every decision; others stand by and take over when
the leader's lease lapses. A new leader restores what was learned from the snapshot, replays the stream after it, and
takes the tasks and nodes as the ledger has them: there is nothing to repair by hand.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterable
from uuid import uuid4

import structlog

from broker.celery_app import node_message
from broker.errors import Unreachable
from broker.ledger import Dispatch, End, Ledger
from broker.ledger.ledger import SWEEP_LIMIT, gap, later
from broker.messages import Ended, Event, Heartbeat, NodeDown, NodeUp, State, Submitted
from broker.settings import Settings
from scheduler.core.core import Core, Decision

#: Seconds between sweeps of lapsed leases and deadlines, and the longest wait for an event.
SWEEP_EVERY = 0.25
#: Seconds in which events may gather while tasks wait for room: a step costs two round trips however little happened,
#: and the nodes have their next 50 ms of work already.
GATHER = 0.003
#: Tasks whose features are fetched per round trip while taking over.
FETCH = 1000

log = structlog.get_logger(__name__)


class _Deposed(Exception):
    """Another scheduler leads now."""


class _Outdated(Exception):
    """The server was started again, and may have forgotten what this reign has seen."""


class Service:
    """Runs a `Core` against the ledger until `stop`. `make_core` builds an empty core, anew at every takeover."""

    def __init__(self, settings: Settings, ledger: Ledger, make_core: Callable[[], Core]) -> None:
        self._settings = settings
        self._ledger = ledger
        self._make_core = make_core
        self._holder = f"{socket.gethostname()}:{os.getpid()}:{uuid4().hex[:8]}"
        self._stopping = threading.Event()

    def stop(self) -> None:
        """Ask `run` to return; safe in a signal handler."""
        self._stopping.set()

    def run(self) -> None:
        """Lead, or stand by to lead, until `stop`. A server that does not answer is waited for."""
        while not self._stopping.is_set():
            try:
                epoch = self._ledger.lead(self._holder, self._settings.leader_ttl)
                if epoch is None:
                    self._stopping.wait(self._settings.leader_ttl / 4)
                else:
                    self._lead(epoch)
            except _Deposed:
                log.warning("deposed")
            except _Outdated:
                log.warning("server_restarted")
            except Unreachable as error:
                log.warning("server_unreachable", reason=str(error))
                self._stopping.wait(1.0)

    def _lead(self, epoch: int) -> None:
        log.info("leading", epoch=epoch, policy=self._settings.policy)
        tenure = _Tenure(self._ledger, self._holder, self._settings.leader_ttl, epoch)
        reign = _Reign(self._ledger, self._make_core(), tenure)
        reign.take_over()
        save = _Every(self._settings.snapshot_every)
        sweep = _Every(SWEEP_EVERY)
        more_to_sweep = False
        while not self._stopping.is_set():
            if sweep.due() or more_to_sweep:
                more_to_sweep = reign.sweep()
            if save.due():
                reign.save()
            if reign.step(block=SWEEP_EVERY):
                self._stopping.wait(GATHER)
        reign.save()
        self._ledger.resign(self._holder)


class _Tenure:
    """Leadership under one epoch, to be renewed by whoever does something long."""

    def __init__(self, ledger: Ledger, holder: str, ttl: float, epoch: int) -> None:
        self.epoch = epoch
        self._ledger = ledger
        self._holder = holder
        self._ttl = ttl
        self._every = _Every(ttl / 4)

    def renew(self) -> None:
        """Stay leader, if it is time to say so. Raises _Deposed when somebody else has become it."""
        if self._every.due() and self._ledger.lead(self._holder, self._ttl) != self.epoch:
            raise _Deposed


class _Reign:
    """One leader's work under one epoch."""

    def __init__(self, ledger: Ledger, core: Core, tenure: _Tenure) -> None:
        self._any_ledger = ledger
        self._core = core
        self._tenure = tenure
        self._position = "0-0"
        self._clock_offset = 0.0
        self._incarnation = ledger.incarnation()
        self._sync_clock()

    @property
    def _ledger(self) -> Ledger:
        """The ledger, for who still leads: over a slow line a few calls take as long as leadership lasts."""
        self._tenure.renew()
        return self._any_ledger

    # --- taking over

    def take_over(self) -> None:
        """Bring the core to where the ledger is."""
        oldest, newest = self._ledger.first_and_last_event()
        self._restore(oldest)
        for info, heartbeat, _draining in self._ledger.nodes():
            self._core.handle(NodeUp(at=self.now(), info=info))
            if heartbeat:
                self._core.handle(heartbeat)
        while later(newest, self._position) and self._read(block=None):
            pass
        self._reconcile_nodes()
        self._reconcile_tasks()
        log.info("took_over", pending=len(self._core.pending), nodes=len(self._core.cluster.nodes))

    def _restore(self, oldest: str) -> None:
        """Take what was learned from the snapshot, and the place in the stream to go on from."""
        try:
            saved = self._ledger.load_snapshot()
            if saved is None:
                return
            position = saved["position"]
            if gap(position, oldest):
                log.warning("stream_gap", snapshot=position, oldest=oldest)
            self._core.restore(saved["core"])
            self._position = position
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            log.warning("snapshot_unusable", reason=f"{type(error).__name__}: {error}")

    def _reconcile_nodes(self) -> None:
        live = {info.name: (info, beat, draining) for info, beat, draining in self._ledger.nodes()}
        for name in [n for n in self._core.cluster.nodes if n not in live or live[n][2]]:
            self._core.handle(NodeDown(at=self.now(), node=name, reason="gone meanwhile"))
        for name, (info, beat, draining) in live.items():
            known = self._core.cluster.nodes.get(name)
            if not draining and (known is None or known.info.boot != info.boot):
                self._core.handle(NodeUp(at=self.now(), info=info))
                if beat:
                    self._core.handle(beat)

    def _reconcile_tasks(self) -> None:
        """Make the core's tasks those of the ledger, wherever the stream was too short to tell."""
        unfinished = [task_id for _, task_id in self._ledger.unfinished()]
        self._core.keep_only(set(unfinished))
        for start in range(0, len(unfinished), FETCH):
            self._load(unfinished[start : start + FETCH])

    def _load(self, task_ids: list[str]) -> None:
        for placement in self._ledger.features(task_ids):
            for event in placement or ():
                if event is not None:
                    self._core.handle(event)

    # --- steady work

    def step(self, block: float) -> bool:
        """Read what happened, decide, act. Returns whether tasks wait."""
        self._read(block)
        decisions = self._core.decide(self.now())
        if decisions:
            self._dispatch([d for d in decisions if d.action == "dispatch"])
            self._end([d for d in decisions if d.action != "dispatch"])
        return len(self._core.pending) > 0

    def sweep(self) -> bool:
        """Let the ledger mend what time has broken, and look at its clock. Returns whether there may be more. Raises
        _Outdated when the server was started again: taking over anew finds what is true now."""
        if self._ledger.incarnation() != self._incarnation:
            raise _Outdated
        self._sync_clock()
        return self._ledger.sweep() >= SWEEP_LIMIT

    def save(self) -> None:
        """Keep what was learned, with the place in the stream it stands for."""
        if not self._ledger.save_snapshot(
            self._tenure.epoch, {"core": self._core.snapshot(), "position": self._position}
        ):
            raise _Deposed

    def _read(self, block: float | None) -> int:
        entries = self._ledger.events(self._position, block=block)
        if any(isinstance(event, Ended) and event.state == State.CANCELLED for _, event in entries):
            self._ledger.announce()
        self._load(_strangers((e for _, e in entries), self._core))
        for position, event in entries:
            if isinstance(event, NodeDown):
                log.info("node_down", node=event.node, reason=event.reason)
            self._core.handle(event)
            self._position = position
        return len(entries)

    def _dispatch(self, decisions: list[Decision]) -> None:
        dispatches = [_dispatch(d) for d in decisions]
        for decision, ruling in zip(decisions, self._ledger.dispatch(self._tenure.epoch, dispatches), strict=True):
            self._obey(decision, ruling)

    def _end(self, decisions: list[Decision]) -> None:
        ends = [_end(d) for d in decisions]
        for decision, ruling in zip(decisions, self._ledger.end(self._tenure.epoch, ends), strict=True):
            self._obey(decision, ruling)

    def _obey(self, decision: Decision, ruling: str) -> None:
        log.debug(
            "decided", task_id=decision.task.id, action=decision.action, node=decision.explanation.node, ruling=ruling
        )
        if ruling == "not_leader":
            raise _Deposed
        if ruling == "node_gone":
            self._core.take_back(decision.task)
        elif ruling == "refused":
            self._core.forget(decision.task)

    def now(self) -> float:
        """The server's clock, carried forward by this machine's monotonic one."""
        return time.monotonic() + self._clock_offset

    def _sync_clock(self) -> None:
        self._clock_offset = self._ledger.now() - time.monotonic()


class _Every:
    """True once per period."""

    def __init__(self, period: float) -> None:
        self._period = period
        self._next = time.monotonic()

    def due(self) -> bool:
        if (now := time.monotonic()) < self._next:
            return False
        self._next = now + self._period
        return True


def _dispatch(decision: Decision) -> Dispatch:
    task, node = decision.task, decision.node
    assert node is not None
    assert decision.model is not None
    info = node.info
    message = node_message(task.id, task.attempt, info.queue)
    return Dispatch(
        task.id, task.attempt, info.name, info.boot, decision.model, info.queue, message, decision.explanation
    )


def _end(decision: Decision) -> End:
    return End(decision.task.id, "rejected" if decision.action == "reject" else "expired", decision.explanation)


def _strangers(events: Iterable[Event], core: Core) -> list[str]:
    """Ids of tasks these events are about that neither the core nor an earlier one of them has introduced."""
    introduced: set[str] = set()
    strangers: dict[str, None] = {}
    for event in events:
        if isinstance(event, NodeUp | NodeDown | Heartbeat | Ended):
            continue  # nothing to learn from about a task not known
        if isinstance(event, Submitted):
            introduced.add(event.id)
        elif event.id not in introduced and core.find(event.id) is None:
            strangers[event.id] = None
    return list(strangers)
