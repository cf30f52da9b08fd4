"""The live scheduler: the event stream in, the `SchedulerCore` in the middle, dispatch out.

One process leads, under an epoch (a fencing token) that the ledger checks with every decision; others stand by and take
over when the leader's lease lapses. A new leader restores what was learned from the snapshot, replays the stream after
it, and takes the tasks and nodes as the ledger has them: there is nothing to repair by hand.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from uuid import uuid4

import structlog

from perllm.broker.errors import Unreachable
from perllm.broker.ledger import SWEEP_LIMIT, Dispatch, End, Leader, Ledger, gap, later
from perllm.broker.messages import (
    Completed,
    Ended,
    Event,
    Explanation,
    Heartbeat,
    NodeDown,
    NodeUp,
    Returned,
    State,
    Submitted,
)
from perllm.broker.queues.app import node_message
from perllm.scheduler.core.scheduler import Decision, Lapse, SchedulerCore
from perllm.scheduler.metrics import Metrics
from perllm.scheduler.policies import describe_policy
from perllm.scheduler.settings import SchedulerSettings

#: Seconds between sweeps of lapsed leases and deadlines, and the longest wait for an event.
SWEEP_EVERY = 0.25
#: Seconds between looks at what nodes do not take up.
LAPSES_EVERY = 0.25
#: Seconds in which events may gather while tasks wait for room: a step costs two round trips however little happened,
#: and the nodes have their next 50 ms of work already.
GATHER_EVENTS = 0.003
#: Seconds between lines that say what was decided meanwhile; none where nothing was.
SUMMARY_EVERY = 60.0
#: Tasks whose features are fetched per round trip while taking over.
FETCH_TASKS = 1000

log = structlog.get_logger(__name__)


class _NotLeader(Exception):
    """Another scheduler leads now."""


class _ServerRestarted(Exception):
    """The server was started again, and may have forgotten what this leader session has seen."""


class Service:
    """Runs a `SchedulerCore` against the ledger until `stop`. `make_core` builds an empty one, anew at every
    takeover."""

    def __init__(self, settings: SchedulerSettings, ledger: Ledger, make_core: Callable[[], SchedulerCore]) -> None:
        self._settings = settings
        self._ledger = ledger
        self._make_core = make_core
        self._holder = f"{socket.gethostname()}:{os.getpid()}:{uuid4().hex[:8]}"
        self._policy = (settings.policy, describe_policy(settings.policy))
        self._stopping = threading.Event()

    def stop(self) -> None:
        """Ask `run` to return; safe in a signal handler."""
        self._stopping.set()

    def run(self) -> None:
        """Lead, or stand by to lead, until `stop`. A server that does not answer is waited for."""
        lease: _LeaderLease | None = None
        standing_by = False
        while not self._stopping.is_set():
            try:
                if lease is None:
                    lease = self._new_lease()
                if lease.acquire():
                    standing_by = False
                    self._lead(lease)
                else:
                    if not standing_by:
                        log.info("standing_by", policy=self._settings.policy)
                        standing_by = True
                    self._stopping.wait(self._settings.leader_ttl / 4)
                lease = None
            except _NotLeader:
                log.warning("not_leader")
                lease = None
            except _ServerRestarted:
                log.warning("server_restarted")
            except Unreachable as error:
                log.warning("server_unreachable", reason=str(error))
                self._stopping.wait(1.0)
            except Exception:  # a bug: begin anew from what the ledger says, rather than leave everybody's work
                log.exception("leader_session_failed")
                self._stopping.wait(1.0)

    def _new_lease(self) -> _LeaderLease:
        leader = Leader(self._holder, self._ledger.now(), *self._policy)
        return _LeaderLease(self._ledger, leader, self._settings.leader_ttl)

    def _lead(self, lease: _LeaderLease) -> None:
        log.info("leading", epoch=lease.epoch, policy=self._settings.policy)
        session = _LeaderSession(self._ledger, self._make_core(), lease)
        session.take_over()
        save = _Every(self._settings.snapshot_every)
        summary = _Every(SUMMARY_EVERY)
        summary.due()
        sweep = _Every(SWEEP_EVERY)
        more_to_sweep = False
        while not self._stopping.is_set():
            if sweep.due() or more_to_sweep:
                more_to_sweep = session.sweep()
            if save.due():
                session.save()
            if summary.due():
                session.summarise()
            if session.step(block=SWEEP_EVERY):
                self._stopping.wait(GATHER_EVENTS)
        session.save()
        session.summarise()
        lease.release()
        log.info("stopped_leading", epoch=lease.epoch)


class _LeaderLease:
    """The right to lead for `ttl` s from each renewal on, under one epoch. `leader` is what others are told."""

    def __init__(self, ledger: Ledger, leader: Leader, ttl: float) -> None:
        self.epoch = -1  # none yet
        self._ledger = ledger
        self._holder = leader.dump()
        self._ttl = ttl
        self._every = _Every(ttl / 4)

    def acquire(self) -> bool:
        """Whether it leads now. May be repeated after a lost reply."""
        epoch = self._ledger.lead(self._holder, self._ttl)
        if epoch is not None:
            self.epoch = epoch
        return epoch is not None

    def renew(self) -> None:
        """Stay leader, if it is time to say so. Raises _NotLeader when another has become it."""
        if self._every.due() and self._ledger.lead(self._holder, self._ttl) != self.epoch:
            raise _NotLeader

    def release(self) -> None:
        """Stop leading, so that a standby takes over at once."""
        self._ledger.resign(self._holder)


class _LeaderSession:
    """One leader's work under one epoch: take over once, then `step`, `sweep` and `save` in turn."""

    def __init__(self, ledger: Ledger, core: SchedulerCore, lease: _LeaderLease) -> None:
        self._bare_ledger = ledger
        self._core = core
        self._lease = lease
        self._metrics = Metrics(core, lease.epoch)
        self._position = "0-0"
        self._clock_offset = 0.0
        self._tally: Counter[str] = Counter()  # of tasks, since the last summary
        self._incarnation = ledger.incarnation()
        self._lapses = _Every(LAPSES_EVERY)
        self._told: dict[str, str] = {}  # distrusted nodes, and why, as the ledger has it
        self._sync_clock()

    @property
    def _ledger(self) -> Ledger:
        """The ledger, the lease renewed before each use: over a slow line a few calls take as long as it lasts."""
        self._lease.renew()
        return self._bare_ledger

    # --- taking over

    def take_over(self) -> None:
        """Bring the core to where the ledger is."""
        oldest, newest = self._ledger.first_and_last_event()
        self._restore(oldest)
        self._metrics.restore(self._ledger.metrics(), self.now())
        for info, at, _ in self._ledger.gone():
            self._core.remember(info, at)
        for info, heartbeat, _draining in self._ledger.nodes():
            self._handle(NodeUp(at=self.now(), info=info))
            if heartbeat:
                self._handle(heartbeat)
        while later(newest, self._position) and self._read(block=None):
            pass
        self._reconcile_nodes()
        self._reconcile_tasks()
        self._told = self._ledger.distrusted(list(self._core.cluster.nodes))
        for name, reason in self._told.items():
            self._core.distrust(name, reason, self.now())
        log.info("took_over", pending=len(self._core.pending), nodes=len(self._core.cluster.nodes))

    def _restore(self, oldest: str) -> None:
        """Take what was learned from the snapshot, and the position in the stream to go on from. One that cannot be
        read, or of another release, is passed over: what the stream still holds is learned again."""
        try:
            saved = self._ledger.load_snapshot()
            if saved is None:
                return
            position = saved["position"]
            missed = gap(position, oldest)
            self._core.restore(saved["core"])
            if missed:
                log.warning("stream_gap", snapshot=position, oldest=oldest)
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
                self._handle(NodeUp(at=self.now(), info=info))
                if beat:
                    self._handle(beat)

    def _reconcile_tasks(self) -> None:
        """Make the core's tasks those of the ledger, wherever the stream was too short to tell."""
        unfinished = [task_id for _, task_id in self._ledger.unfinished()]
        self._core.keep_only(set(unfinished))
        for start in range(0, len(unfinished), FETCH_TASKS):
            self._load(unfinished[start : start + FETCH_TASKS])

    def _load(self, task_ids: list[str]) -> None:
        placements = self._ledger.features(task_ids)
        for placement in placements:
            for event in placement or ():
                if event is not None:
                    self._handle(event)
        lost = [task_id for task_id, placement in zip(task_ids, placements, strict=True) if placement is None]
        if lost:
            self._give_up([i for i, known in zip(lost, self._ledger.known(lost), strict=True) if known])

    def _give_up(self, task_ids: list[str]) -> None:
        """End tasks whose records cannot be read: nobody could place them, and their producers wait."""
        why = Explanation(
            policy=self._core.policy.name, action="reject", sentence="what is stored of it cannot be read"
        )
        self._ledger.end(self._lease.epoch, [End(task_id, "rejected", why) for task_id in task_ids])

    def _handle(self, event: Event) -> None:
        """Let the core know. An event it cannot take is passed over: the ledger mends in time what it was about."""
        try:
            self._core.handle(event)
        except Exception:
            log.exception("event_unusable", event_type=event.type)

    def _count(self, position: str, event: Event) -> None:
        """Count an event. One that cannot be is missing in the sums."""
        try:
            self._metrics.event(position, event)
        except Exception:
            log.exception("event_not_counted", event_type=event.type)

    # --- steady work

    def step(self, block: float) -> bool:
        """Read what happened, decide, act. Returns whether tasks wait."""
        self._read(block)
        if self._lapses.due():
            self._place_anew(self._core.lapses(self.now()))
            self._tell_of_distrust()
        decisions = self._core.decide(self.now())
        if decisions:
            self._dispatch([d for d in decisions if d.action == "dispatch"])
            self._end([d for d in decisions if d.action != "dispatch"])
        return self._core.pending.awake > 0

    def sweep(self) -> bool:
        """Let the ledger mend what time has broken, and read its clock. Returns whether there may be more to mend.
        Raises _ServerRestarted when the server was started again: taking over anew finds what is true now."""
        if self._ledger.incarnation() != self._incarnation:
            raise _ServerRestarted
        self._sync_clock()
        began = time.monotonic()
        mended = self._ledger.sweep()
        self._metrics.swept(mended, time.monotonic() - began)
        return mended >= SWEEP_LIMIT

    def save(self) -> None:
        """Keep what was learned, and the sums for `/metrics`, with the position in the stream they stand for."""
        metrics, learned = None, None
        try:
            metrics, learned = self._metrics.dump(self._position, self.now())
        except Exception:  # what was learned is worth more than the sums
            log.exception("metrics_not_saved")
        state = {"core": self._core.snapshot(), "position": self._position}
        if not self._ledger.save_snapshot(self._lease.epoch, state, metrics=metrics, learned=learned):
            raise _NotLeader

    def summarise(self) -> None:
        """Say what became of tasks since this was last said, and what there is."""
        if not self._tally:
            return
        nodes = self._core.cluster.nodes.values()
        counts = {name: self._tally[name] for name in sorted(self._tally)}
        log.info(
            "summary",
            **counts,
            pending=len(self._core.pending),
            on_nodes=sum(len(n.in_flight) for n in nodes),
            nodes=len(nodes),
        )
        self._tally.clear()

    def _note(self, event: Event) -> None:
        """Say what people want to hear of what happened, and count it."""
        match event:
            case NodeUp(info=info):
                log.info(
                    "node_up", node=info.name, tier=info.tier, slots=info.slots, models=[m.name for m in info.models]
                )
            case NodeDown():
                log.info("node_down", node=event.node, reason=event.reason)
            case Completed():
                self._tally["on_time" if event.on_time else "late"] += 1
            case Returned():
                self._tally["returned"] += 1
                log.warning(
                    "task_returned",
                    task_id=event.id,
                    node=event.node,
                    attempt=event.attempt,
                    cause=event.cause,
                    reason=event.reason,
                    **self._origin(event.id),
                )
            case Ended():
                self._tally[event.state] += 1
                log.info(
                    "task_ended",
                    task_id=event.id,
                    state=event.state,
                    node=event.node,
                    reason=event.reason,
                    **self._origin(event.id),
                )

    def _origin(self, task_id: str) -> Mapping[str, str]:
        task = self._core.find(task_id)
        return task.origin if task is not None else {}

    def _read(self, block: float | None) -> int:
        entries = self._ledger.events(self._position, block=block)
        if any(isinstance(event, Ended) and event.state == State.CANCELLED for _, event in entries):
            self._ledger.announce()
        self._load(_unknown_tasks((e for _, e in entries), self._core))
        if entries:
            self._metrics.read(entries[0][1].at, self.now())
        for position, event in entries:
            if block is not None:  # not what happened before this session
                self._note(event)
            self._count(position, event)
            self._handle(event)
            self._position = position
        return len(entries)

    def _place_anew(self, lapses: list[Lapse]) -> None:
        """What is claimed after all is refused: the stream says so."""
        for lapse in lapses:
            log.warning("not_taken_up", node=lapse.node.name, tasks=len(lapse.tasks), reason=lapse.reason)
            placed = [(task.id, task.attempt) for task in lapse.tasks]
            if "not_leader" in self._ledger.take_back(self._lease.epoch, placed, lapse.reason):
                raise _NotLeader

    def _tell_of_distrust(self) -> None:
        nodes = self._core.cluster.nodes
        distrusted = {name: node.pace.distrust for name, node in nodes.items() if node.pace.distrust}
        for name in (self._told | distrusted).keys() & nodes.keys():
            if (reason := distrusted.get(name, "")) != self._told.get(name, ""):
                log.info("node_distrusted" if reason else "node_trusted", node=name, reason=reason)
                self._ledger.distrust(self._lease.epoch, name, nodes[name].info.boot, reason)
        self._told = distrusted

    def _dispatch(self, decisions: list[Decision]) -> None:
        dispatches = [_dispatch(d) for d in decisions]
        for decision, ruling in zip(decisions, self._ledger.dispatch(self._lease.epoch, dispatches), strict=True):
            self._apply_ruling(decision, ruling)

    def _end(self, decisions: list[Decision]) -> None:
        ends = [_end(d) for d in decisions]
        for decision, ruling in zip(decisions, self._ledger.end(self._lease.epoch, ends), strict=True):
            self._apply_ruling(decision, ruling)

    def _apply_ruling(self, decision: Decision, ruling: str) -> None:
        if decision.failure:
            log.error("decision_failed", task_id=decision.task.id, reason=decision.explanation.sentence)
        task, why = decision.task, decision.explanation
        log.info("task_decided", task_id=task.id, action=decision.action, node=why.node, ruling=ruling, **task.origin)
        self._tally["dispatched"] += decision.action == "dispatch" and ruling == "ok"
        if ruling == "not_leader":
            raise _NotLeader
        if ruling == "ok" and decision.action != "dispatch":
            self._metrics.ending(decision)
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


def _unknown_tasks(events: Iterable[Event], core: SchedulerCore) -> list[str]:
    """Ids of tasks these events are about that neither the core knows nor an earlier one of them introduces."""
    introduced: set[str] = set()
    unknown: dict[str, None] = {}
    for event in events:
        if isinstance(event, NodeUp | NodeDown | Heartbeat | Ended):
            continue  # nothing to learn from about a task not known
        if isinstance(event, Submitted):
            introduced.add(event.id)
        elif event.id not in introduced and core.find(event.id) is None:
            unknown[event.id] = None
    return list(unknown)
