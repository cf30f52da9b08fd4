"""A state machine drives the ledger on a real server, beside a model of what must come of it.

After every step the whole server is compared with the model: every task in exactly the set of its state, results that
never change, totals, nodes and what they hold, one event per transition (replayed, they give the same states), Celery's
copies and announcements, and the messages in the nodes' queues.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
import redis
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from support.make import node_info, output, receipt, why
from support.raw import prefix_of, redis_of

from perllm.broker.ledger import Dispatch, End, Ledger
from perllm.broker.ledger.records import TASK_BYTES
from perllm.broker.messages import (
    Claimed,
    Completed,
    Counters,
    Dispatched,
    Ended,
    Event,
    Heartbeat,
    NodeDown,
    NodeUp,
    Returned,
    State,
    Submitted,
    TaskSpec,
)
from perllm.broker.queues.app import node_message
from perllm.broker.settings import Settings

MAX_STRIKES = 2
LEASE = 300.0
RETENTION = 86_400.0
KEPT = 2  # finished tasks of each final state kept
NODES = ("a", "b")
QUEUES = {n: f"edge.{n}" for n in NODES}
PROMPTS = ("hello", 'quo\'te "d" \\ back', "näïve ☃ 𝄞", "100 % of %1 @preview@", "two\nlines\tand\x00more", "x" * 300)
CELERY = {
    "succeeded": "SUCCESS",
    "failed": "FAILURE",
    "expired": "FAILURE",
    "rejected": "FAILURE",
    "cancelled": "REVOKED",
}

REFUSALS = {
    "refused": "InvalidTask",
    "revoked": "TaskRevokedError",
    "chord": "ChordError",
    "failed": "TaskFailed",
    "expired": "TaskExpired",
    "rejected": "TaskRejected",
}

Fact = tuple[Any, ...]  # an event, as far as the model foretells it


@dataclass(repr=False)
class Task:
    """What the model expects of one task."""

    id: str
    spec: TaskSpec
    celery: bool = False  # its producer is Celery's …
    progress: bool = False  # … and asked how far it is
    followers: str = ""  # … and what is to follow it
    begun: bool = False  # its last attempt
    state: str = "pending"
    attempt: int = 0
    strikes: int = 0
    node: str | None = None
    token: str | None = None
    lapsed: bool = False  # its lease
    late: bool = False  # its deadline has passed
    hung: bool = False  # … so long ago that its lease is renewed no more
    aged: bool = False  # it was final before the retention time began
    withdrawn: bool = False  # its producer ended it: it has no result of its own
    ended: tuple[int, str] = (0, "")  # when it became final: step, then id
    past: list[tuple[int, str, str | None]] = field(default_factory=list)  # attempts: number, node, token

    def __repr__(self) -> str:
        return self.id

    @property
    def final(self) -> bool:
        return State(self.state).final

    @property
    def placed(self) -> bool:
        return self.state in ("dispatched", "running")


@dataclass
class Node:
    boot: str
    draining: bool = False
    lapsed: bool = False


def likely(data: st.DataObject) -> bool:
    """True nine times in ten: what a well-meaning caller does. Shrinks to True."""
    return data.draw(st.integers(0, 9)) < 9


class LedgerMachine(RuleBasedStateMachine):
    """See the module's head."""

    def __init__(self, url: str) -> None:
        super().__init__()
        limits = {"lease": LEASE, "max_strikes": MAX_STRIKES, "retention": RETENTION, "retention_tasks": KEPT}
        self.ledger = Ledger(Settings.model_validate({"redis_url": url, "heartbeat": 60, **limits}))
        self.redis = redis_of(self.ledger)
        self.redis.flushall()
        self.p = prefix_of(self.ledger)
        self.tasks: dict[str, Task] = {}
        self.keys: dict[tuple[str, str], str] = {}
        self.nodes: dict[str, Node] = {}
        self.gone: set[str] = set()
        self.totals: Counter[str] = Counter()
        self.pushed: Counter[str] = Counter()
        self.results: dict[str, bytes] = {}
        self.expected: list[Fact] = []
        self.untold: dict[str, str | None] = {}  # withdrawn tasks nobody was told of, and their nodes
        self.shown: set[str] = set()  # Celery's producers see that these have begun, or have ended
        self.followers: dict[str, str] = {}  # what is to follow tasks, until it was sent …
        self.to_follow: set[str] = set()  # … and those of them that have ended
        self.refused: dict[str, str] = {}  # ids that became no task, and why, nobody was told yet
        self.told: set[str] = set()  # those of whom the producer was told
        self.announced: list[tuple[str, str]] = []  # expected publications: channel, task id
        self.replayed: dict[str, tuple[str, int, str | None]] = {}  # by the events alone: state, attempt, node
        self.position = "0-0"
        self.step = 0
        self.holder = 0
        self.epoch = self.ledger.lead("holder-0", 60) or 0
        self.listener: redis.client.PubSub = self.redis.pubsub(ignore_subscribe_messages=True)
        patterns = ("celery-task-meta-*", f"{self.p}signal:*", f"{self.p}ended:*", "sync")
        self.listener.psubscribe(*patterns)
        for _ in patterns:
            assert self.listener.get_message(timeout=10) is None  # the confirmation, ignored

    def teardown(self) -> None:
        self.listener.close()
        self.ledger.close()
        self.redis.close()

    # --- what must come of each transition

    def finish(self, task: Task, state: str) -> None:
        task.state, task.ended = state, (self.step, task.id)
        self.totals[state] += 1
        if not task.withdrawn:
            self.show(task.id)
            self.announced.append((self.ledger.ended(task.id), state))
            self.let_follow(task.id, unseen=task.celery and state != "succeeded" and not task.begun)

    def show(self, task_id: str) -> None:
        """Celery's copy is written, and announced."""
        self.shown.add(task_id)
        self.announced.append((f"celery-task-meta-{task_id}", task_id))

    def let_follow(self, task_id: str, *, unseen: bool) -> None:
        if task_id in self.followers or unseen:
            self.to_follow.add(task_id)
            self.announced.append((f"{self.p}signal:@inbox", ""))

    def end(self, task: Task, state: str) -> None:
        node = task.node if task.placed else None
        self.finish(task, state)
        self.expected.append(("ended", task.id, state, node))

    def give_back(self, task: Task, cause: str, *, strike: bool) -> None:
        task.strikes += strike
        if strike and task.strikes >= MAX_STRIKES:
            self.end(task, "failed")
        elif task.late:
            self.end(task, "expired")
        else:
            self.expected.append(("returned", task.id, task.node, task.attempt, cause, task.strikes))
            self.shown.discard(task.id)
            task.state, task.node, task.token, task.lapsed, task.begun = "pending", None, None, False, False

    def node_down(self, name: str, *states: str) -> None:
        self.expected.append(("node_down", name))
        for task in self.on(name, *states):
            self.give_back(task, "handed_back", strike=False)

    def forget_node(self, name: str) -> None:
        del self.nodes[name]
        del self.pushed[name]  # its queue
        self.gone.add(name)

    def on(self, node: str, *states: str) -> list[Task]:
        return [t for t in self.tasks.values() if t.node == node and t.state in states]

    # --- choosing

    @rule(data=st.data())
    def act(self, data: st.DataObject) -> None:
        """One rule for all: of several, Hypothesis would switch off about half in each run, and a history without, say,
        claims shows little."""
        there = Counter(t.state for t in self.tasks.values())
        unfinished, finished = there["pending"] + there["dispatched"] + there["running"], sum(there[s] for s in CELERY)
        weights = {
            "submit": 3,
            "dispatch": 7 if there["pending"] else bool(there),
            "claim": 6 if there["dispatched"] else bool(self.attempts()),
            "complete": 3 if there["running"] else bool(self.attempts()),
            "fail": 2 if there["running"] else bool(self.attempts()),
            "hand_back": 2 if there["running"] else bool(self.attempts()),
            "beat": 2,
            "register": 3 if len(self.nodes) < len(NODES) or self.silent() else 1,
            "a_node_goes": 2 * bool(self.nodes),
            "a_lease_lapses": 2 * bool(there["dispatched"] + there["running"]),
            "a_deadline_passes": 2 * bool(unfinished),
            "a_finished_task_ages": bool(finished),
            "cancel": bool(there),
            "forget": bool(there),
            "expire": bool(unfinished),
            "decide_to_end": bool(there),
            "take_back": 1 if there["dispatched"] else bool(self.attempts()),
            "hear_of_cancellations": bool(self.untold or self.refused),
            "refuse": 1,
            "follow": 2 * bool(self.to_follow),
            "another_leads": 1,
            "sweep": 2,
        }
        action = data.draw(st.sampled_from([a for a, weight in weights.items() for _ in range(weight)]), "action")
        getattr(self, action)(data)

    def attempts(self) -> list[Task]:
        """Tasks that were placed at least once."""
        return [t for t in self.tasks.values() if t.past]

    def one_in(self, data: st.DataObject, *states: str) -> Task:
        """Mostly a task in one of these states, else any that was ever placed."""
        there = [t for t in self.tasks.values() if t.state in states]
        return data.draw(st.sampled_from(there if there and likely(data) else self.attempts()), "task")

    def an_attempt(self, data: st.DataObject, task: Task) -> tuple[int, str, str]:
        """An attempt at the task: mostly the latest, else one that is past or made up. Number, node, token."""
        number, node, token = task.past[-1]
        if not likely(data):
            number, node, token = data.draw(st.sampled_from([*task.past, (task.attempt + 1, "a", "t0")]), "attempt")
        if token is None or not likely(data):
            token = data.draw(st.sampled_from(["t0", "t1"]), "token")
        return number, node, token

    def holds(self, task: Task, number: int, token: str | None) -> bool:
        """Whether the task is, or when it ended was, run by this attempt."""
        return token is not None and (number, token) == (task.attempt, task.token)

    # --- producers

    @initialize()
    def some_work_under_way(self) -> None:
        for name in NODES:
            self.register_one(name, "boot-0")
        specs = [TaskSpec(prompt=prompt, deadline=1e6) for prompt in PROMPTS[:4]]
        self.submit_batch([(f"first-{n}", spec) for n, spec in enumerate(specs)])
        for task, name in zip(self.tasks.values(), "aab", strict=False):
            self.dispatch_one(task, name, 1, right_boot=True, right_epoch=True)
        self.claim_one(self.tasks["first-0"], 1, "a", "t0")
        self.claim_one(self.tasks["first-2"], 1, "b", "t1")

    def submit(self, data: st.DataObject) -> None:
        """Some tasks, a few under idempotency keys used before; then all again, as after a lost reply."""
        batch = []
        for n in range(data.draw(st.integers(1, 3), "tasks")):
            task_id = f"task-{self.totals['submitted']}-{n}"
            prompt = data.draw(st.sampled_from(PROMPTS), "prompt")
            key = data.draw(st.sampled_from([None, None, None, "k1", "k2"]), "key")
            tenant = data.draw(st.sampled_from(["default", "other"]), "tenant")
            spec = TaskSpec(prompt=prompt, deadline=1e6, idempotency_key=key, tenant=tenant)
            batch.append((task_id, spec))
        self.submit_batch(batch)
        again = [(t.id, t.spec) for t in self.tasks.values()]
        assert self.ledger.submit(again) == [i for i, _ in again]
        self.submit_from_celery(data)

    def submit_from_celery(self, data: st.DataObject) -> None:
        task_id, spec = f"celery-{self.totals['submitted']}", TaskSpec(prompt="hello", deadline=1e6)
        followers, progress = data.draw(st.sampled_from(["", "{}", "something"]), "followers"), data.draw(st.booleans())
        self.tasks[task_id] = Task(task_id, spec, celery=True, progress=progress, followers=followers)
        self.totals["submitted"] += 1
        self.expected.append(("submitted", task_id))
        if followers:
            self.followers[task_id] = followers
        for _ in range(2):
            assert self.ledger.submit_from_celery(task_id, spec, followers, progress=progress) == task_id
            followers, progress = "other", True  # not again: a message may come twice

    def submit_batch(self, batch: list[tuple[str, TaskSpec]]) -> None:
        wanted = []
        for task_id, spec in batch:
            key = spec.idempotency_key
            in_force = task_id if key is None else self.keys.setdefault((spec.tenant, key), task_id)
            wanted.append(in_force)
            if in_force == task_id:
                self.tasks[task_id] = Task(task_id, spec)
                self.totals["submitted"] += 1
                self.expected.append(("submitted", task_id))
        assert self.ledger.submit(batch) == wanted

    def forget(self, data: st.DataObject) -> None:
        assert not self.ledger.forget("nobody")
        task = data.draw(st.sampled_from(list(self.tasks.values())), "task")
        self.stop(task)
        self.drop(task)
        assert self.ledger.forget(task.id)

    def drop(self, task: Task) -> None:
        del self.tasks[task.id]
        self.shown.discard(task.id)
        if task.id not in self.to_follow and task.id not in self.untold:
            self.followers.pop(task.id, None)
        self.keys = {k: i for k, i in self.keys.items() if i != task.id}
        self.totals["forgotten"] += 1

    def cancel(self, data: st.DataObject) -> None:
        assert self.ledger.cancel("nobody") is None
        task = data.draw(st.sampled_from(list(self.tasks.values())), "task")
        was = task.state
        self.stop(task)
        assert self.ledger.cancel(task.id) == was

    def stop(self, task: Task) -> None:
        if not task.final:
            self.withdraw(task, "cancelled")

    def withdraw(self, task: Task, state: str) -> None:
        task.withdrawn = True
        self.untold[task.id] = task.node if task.placed else None
        self.end(task, state)

    def expire(self, data: st.DataObject) -> None:
        """Somebody waits for what should have ended long ago; on what runs there is a lease."""
        overdue = [t for t in self.tasks.values() if t.late and not t.final and (t.state != "running" or t.lapsed)]
        for task in overdue:
            self.withdraw(task, "expired")
        assert self.ledger.expire() == len(overdue)

    def announce(self) -> None:
        """Who is to hear of what producers ended hears of it, if it is not forgotten meanwhile."""
        for task_id, node in self.untold.items():
            if node is not None:
                self.announced.append((f"{self.p}signal:{node}", task_id))
            if (task := self.tasks.get(task_id)) is not None:
                self.show(task_id)
                self.announced.append((self.ledger.ended(task_id), task.state))
            self.let_follow(task_id, unseen=task is not None and task.celery and not task.begun)
        self.untold.clear()
        for task_id in self.refused.keys() - self.tasks.keys() - self.told:
            self.announced.append((f"celery-task-meta-{task_id}", task_id))
            self.told.add(task_id)
        self.refused.clear()

    def refuse(self, data: st.DataObject) -> None:
        """An id that may or may not be a task's."""
        task_id = data.draw(st.sampled_from(["nobody", *self.tasks]), "id")
        kind: Any = data.draw(st.sampled_from(list(REFUSALS)), "kind")
        self.ledger.refuse(task_id, kind, "because")
        self.refused[task_id] = kind

    def follow(self, data: st.DataObject) -> None:
        """Told again and again, whether the task is still there or not, until it was done."""
        again = data.draw(st.sampled_from([0.0, 600.0]), "again")
        told = dict(self.ledger.follow(100, again))
        assert told.items() <= {(i, self.followers.get(i, "")) for i in self.to_follow}
        for task_id in self.to_follow:  # moves time
            self.redis.zadd(f"{self.p}to_follow", {task_id: 0})
        assert dict(self.ledger.follow(100, 0)) == {i: self.followers.get(i, "") for i in self.to_follow}
        done = data.draw(st.sets(st.sampled_from(sorted(self.to_follow))), "done")
        self.ledger.followed([*done, "nobody"])
        for task_id in done:
            self.to_follow.discard(task_id)
            self.followers.pop(task_id, None)

    # --- scheduler

    def dispatch(self, data: st.DataObject) -> None:
        for _ in range(data.draw(st.integers(1, 3), "tasks")):
            pending = [t for t in self.tasks.values() if t.state == "pending"]
            task = data.draw(
                st.sampled_from(pending if pending and likely(data) else list(self.tasks.values())), "task"
            )
            open_nodes = [n for n, node in self.nodes.items() if not node.draining]
            name = data.draw(st.sampled_from(open_nodes if open_nodes and likely(data) else NODES), "node")
            attempt = task.attempt + (1 if likely(data) else data.draw(st.sampled_from([0, 2]), "ahead"))
            self.dispatch_one(task, name, attempt, right_boot=likely(data), right_epoch=likely(data))

    def dispatch_one(self, task: Task, name: str, attempt: int, *, right_boot: bool, right_epoch: bool) -> None:
        node = self.nodes.get(name)
        boot = node.boot if node and right_boot else "boot-x"
        message = node_message(task.id, attempt, QUEUES[name])
        if not right_epoch:
            ruling = "not_leader"
        elif task.state != "pending" or attempt != task.attempt + 1:
            ruling = "refused"
        elif node is None or node.draining or boot != node.boot:
            ruling = "node_gone"
        else:
            ruling = "ok"
            task.state, task.attempt, task.node, task.lapsed = "dispatched", attempt, name, task.late
            task.past.append((attempt, name, None))
            self.expected.append(("dispatched", task.id, name, attempt))
            self.pushed[name] += 1
        sent = Dispatch(task.id, attempt, name, boot, "emulated", QUEUES[name], message, why())
        assert self.ledger.dispatch(self.epoch - (not right_epoch), [sent]) == [ruling]
        if ruling == "ok":
            pushed = json.loads(self.redis.lindex(QUEUES[name], 0) or b"")
            assert pushed["headers"]["id"] == pushed["properties"]["correlation_id"] == task.id
            assert pushed["headers"]["kwargsrepr"].endswith(f"'prompt': '{task.spec.preview()}'}}")

    def decide_to_end(self, data: st.DataObject) -> None:
        task = data.draw(st.sampled_from(list(self.tasks.values())), "task")
        state: Literal["rejected", "expired"] = data.draw(st.sampled_from(["rejected", "expired"]), "state")
        right_epoch = likely(data)
        ruling = "not_leader" if not right_epoch else "ok" if task.state == "pending" else "refused"
        if ruling == "ok":
            self.end(task, state)
        assert self.ledger.end(self.epoch - (not right_epoch), [End(task.id, state, why("reject"))]) == [ruling]

    def take_back(self, data: st.DataObject) -> None:
        task = self.one_in(data, "dispatched")
        number, _, _ = self.an_attempt(data, task)
        right_epoch = likely(data)
        ruling = "not_leader"
        if right_epoch:
            ruling = "ok" if (task.state, task.attempt) == ("dispatched", number) else "refused"
        if ruling == "ok":
            self.give_back(task, "lease_expired", strike=False)
        assert self.ledger.take_back(self.epoch - (not right_epoch), [(task.id, number)], "idle") == [ruling]

    def hear_of_cancellations(self, data: st.DataObject) -> None:
        self.announce()
        self.ledger.announce()

    def another_leads(self, data: st.DataObject) -> None:
        """A new leader takes over, once the old one's lease has lapsed, under a new number."""
        assert self.ledger.lead(f"holder-{self.holder}", 60) == self.epoch
        self.holder += 1
        assert self.ledger.lead(f"holder-{self.holder}", 60) is None
        self.redis.delete(f"{self.p}leader")  # moves time: the lease ends
        self.epoch += 1
        assert self.ledger.lead(f"holder-{self.holder}", 60) == self.epoch

    # --- workers

    def claim(self, data: st.DataObject) -> None:
        for _ in range(data.draw(st.integers(1, 3), "tasks")):
            task = self.one_in(data, "dispatched")
            number, node, token = self.an_attempt(data, task)
            if not likely(data):
                node = "b" if node == "a" else "a"
            self.step += 1  # a call of its own
            self.claim_one(task, number, node, token)

    def claim_one(self, task: Task, number: int, node: str, token: str) -> None:
        current, granted = (number, node) == (task.attempt, task.node), False
        if current and task.state == "dispatched":
            if task.late:
                self.end(task, "expired")
            else:
                granted = True
                task.state, task.token, task.lapsed, task.begun = "running", token, False, True
                task.past.append((number, node, token))
                self.expected.append(("claimed", task.id, node, number))
                if task.celery:
                    self.show(task.id)
        elif current and task.state == "running":
            granted = token == task.token
        claim = self.ledger.claim(task.id, number, node, token)
        assert (claim is not None) == granted
        if claim is not None:
            assert TaskSpec.model_validate_json(claim.payload) == task.spec
            assert claim.model == "emulated"

    def complete(self, data: st.DataObject) -> None:
        task = self.one_in(data, "running")
        number, node, token = self.an_attempt(data, task)
        state: Literal["succeeded", "expired"] = data.draw(st.sampled_from(["succeeded", "expired"]), "state")
        text = data.draw(st.sampled_from(PROMPTS), "text")
        verdict = "void"
        if self.holds(task, number, token):
            if task.state == "running":
                verdict, on_time = "ok", state == "succeeded" and not task.late
                self.expected.append(("completed", task.id, task.node, number, state, on_time))
                self.finish(task, state)
            elif task.state == state:
                verdict = "ok"
        reason = "" if state == "succeeded" else "late"
        assert self.ledger.complete(task.id, number, token, state, output(text), receipt(node), reason) == verdict

    def fail(self, data: st.DataObject) -> None:
        task = self.one_in(data, "running")
        number, _, token = self.an_attempt(data, task)
        retry, verdict = data.draw(st.booleans(), "retry"), "void"
        if task.state == "running" and self.holds(task, number, token):
            verdict = "ok"
            if retry:
                self.give_back(task, "failed", strike=True)
            else:
                self.end(task, "failed")
        assert self.ledger.fail(task.id, number, token, 'it "broke"', retry=retry) == verdict

    def hand_back(self, data: st.DataObject) -> None:
        task = self.one_in(data, "running")
        number, _, token = self.an_attempt(data, task)
        verdict = "void"
        if task.state == "running" and self.holds(task, number, token):
            verdict = "ok"
            self.give_back(task, "handed_back", strike=False)
        assert self.ledger.hand_back(task.id, number, token, "stopping") == verdict

    # --- nodes

    def silent(self) -> list[str]:
        return [name for name, node in self.nodes.items() if node.lapsed]

    def register(self, data: st.DataObject) -> None:
        missing = [n for n in NODES if n not in self.nodes or self.nodes[n].draining]
        name = data.draw(st.sampled_from((self.silent() or missing or NODES) if likely(data) else NODES), "node")
        self.register_one(name, data.draw(st.sampled_from(["boot-0", "boot-1", "boot-2"]), "boot"))

    def register_one(self, name: str, boot: str) -> None:
        before = self.nodes.get(name)
        if before is not None and before.boot != boot:
            if not before.lapsed:
                wait = self.ledger.register(node_info(name, boot))
                assert wait is not None
                assert 0 < wait <= LEASE
                return
            for task in self.on(name, "dispatched", "running"):
                self.give_back(task, "lease_expired", strike=task.state == "running")
        self.nodes[name] = Node(boot)
        self.gone.discard(name)
        self.expected.append(("node_up", name, boot))
        assert self.ledger.register(node_info(name, boot)) is None

    def beat(self, data: st.DataObject) -> None:
        """A heartbeat reporting some running attempts, and sometimes some that are past."""
        name = data.draw(st.sampled_from(sorted(self.nodes) or NODES), "node")
        node = self.nodes.get(name)
        boot = node.boot if node and likely(data) else "boot-x"
        claimed = [(t, number, token) for t in self.tasks.values() for number, _, token in t.past if token]
        running = [c for c in claimed if c[0].state == "running" and self.holds(*c)]
        reported = data.draw(st.lists(st.sampled_from(running), max_size=4), "running") if running else []
        if claimed and data.draw(st.booleans()):
            reported.append(data.draw(st.sampled_from(claimed), "past"))
        progress = {t.id: 7 for t, *_ in reported}
        heartbeat = Heartbeat(at=0, node=name, boot=boot, counters=Counters(steps=3), progress=progress)
        stops = self.ledger.beat(heartbeat, [(t.id, number, token) for t, number, token in reported])
        if node is None or boot != node.boot:
            assert stops is None
            return
        node.lapsed = False
        self.expected.append(("heartbeat", name, boot))
        assert stops == [c[0].id for c in reported if c[0].state != "running" or not self.holds(*c)]
        for task, number, token in reported:
            if task.state == "running" and self.holds(task, number, token):
                task.lapsed = task.hung
                if task.progress:
                    self.show(task.id)

    def a_node_goes(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.nodes)), "node")
        node = self.nodes[name]
        boot = node.boot if likely(data) else "boot-x"
        match data.draw(st.sampled_from(["silent", "silent", "drains", "leaves"]), "how"):
            case "silent":
                node.lapsed = True
                self.redis.zadd(f"{self.p}nodes", {name: self.ledger.now() - 1})  # moves time, see below
            case "drains":
                if boot == node.boot:
                    node.draining = True
                    self.node_down(name, "dispatched")
                self.ledger.drain(name, boot, "stopping")
            case "leaves":
                if boot == node.boot:
                    self.node_down(name, "dispatched", "running")
                    self.forget_node(name)
                self.ledger.leave(name, boot, "stopped")

    # --- time. It is the server's, so these move what is compared with it into the past.

    def a_lease_lapses(self, data: st.DataObject) -> None:
        task = data.draw(st.sampled_from([t for t in self.tasks.values() if t.placed]), "task")
        task.lapsed = True
        self.redis.zadd(f"{self.p}in:{task.state}", {task.id: self.ledger.now() - 1})

    def a_deadline_passes(self, data: st.DataObject) -> None:
        unfinished = [t for t in self.tasks.values() if not t.final]
        placed = [t for t in unfinished if t.placed]
        task = data.draw(st.sampled_from(placed if placed and likely(data) else unfinished), "task")
        task.late, task.hung = True, task.hung or data.draw(st.booleans(), "long ago")
        deadline = self.ledger.now() - (LEASE + 1 if task.hung else 1)
        self.redis.hset(f"{self.p}task:{task.id}", "deadline", f"{deadline:.6f}")
        if task.state != "running":
            self.redis.zadd(f"{self.p}in:{task.state}", {task.id: deadline})
            task.lapsed = task.state == "dispatched"

    def a_finished_task_ages(self, data: st.DataObject) -> None:
        task = data.draw(st.sampled_from([t for t in self.tasks.values() if t.final]), "task")
        task.aged = True
        self.redis.zadd(f"{self.p}in:{task.state}", {task.id: self.ledger.now() - RETENTION - 1})

    def sweep(self, data: st.DataObject) -> None:
        mended = 0
        for name in [n for n, node in self.nodes.items() if node.lapsed]:
            self.node_down(name, "dispatched")
            self.forget_node(name)
            mended += 1
        for task in [t for t in self.tasks.values() if t.placed and t.lapsed]:
            self.give_back(task, "lease_expired", strike=task.state == "running")
            mended += 1
        for task in [t for t in self.tasks.values() if t.state == "pending" and t.late]:
            self.end(task, "expired")
            mended += 1
        for task in list(self.too_old()):
            self.drop(task)
            mended += 1
        self.announce()
        assert self.ledger.sweep() == mended

    def too_old(self) -> Iterator[Task]:
        """Finished tasks beyond the retention time or, where there are none, beyond the number kept."""
        for state in CELERY:
            ended = sorted((t for t in self.tasks.values() if t.state == state), key=lambda t: t.ended)
            yield from [t for t in ended if t.aged] or ended[: max(0, len(ended) - KEPT)]

    # --- what must hold after every step

    @invariant()
    def the_server_is_as_the_model_says(self) -> None:
        self.step += 1
        self.check_events()
        self.check_tasks()
        self.check_nodes()
        self.check_announcements()

    def check_events(self) -> None:
        entries = self.ledger.events(self.position)
        facts = [_fact(event) for _, event in entries]
        for position, event in entries:
            self.position = position
            self.replay(event)
        assert Counter(facts) == Counter(self.expected), "events of this step"
        self.expected.clear()
        states = {t.id: (t.state, t.attempt, t.node if t.placed else None) for t in self.tasks.values()}
        assert {i: self.replayed[i] for i in states} == states, "replaying the events gives the same states"

    def replay(self, event: Event) -> None:
        """The history is one a task can have: each event leaves a state the one before entered."""
        if isinstance(event, NodeUp | NodeDown | Heartbeat):
            return
        state, attempt, node = self.replayed.get(event.id, ("", 0, None))
        match event:
            case Submitted():
                assert state == ""
                now: tuple[str, int, str | None] = ("pending", 0, None)
            case Dispatched():
                assert (state, attempt + 1) == ("pending", event.attempt)
                now = ("dispatched", event.attempt, event.node)
            case Claimed():
                assert (state, attempt, node) == ("dispatched", event.attempt, event.node)
                now = ("running", attempt, node)
            case Completed():
                assert (state, attempt, node) == ("running", event.attempt, event.node)
                now = (str(event.state), attempt, None)
            case Returned():
                assert state in ("dispatched", "running")
                assert (attempt, node) == (event.attempt, event.node)
                now = ("pending", attempt, None)
            case Ended():
                assert not State(state).final
                now = (str(event.state), attempt, None)
        self.replayed[event.id] = now

    def check_tasks(self) -> None:
        pipe = self.redis.pipeline(transaction=False)
        for task_id in self.tasks:
            pipe.hgetall(f"{self.p}task:{task_id}")
            pipe.get(f"{self.p}result:{task_id}")
        for state in State:
            pipe.zrange(f"{self.p}in:{state}", 0, -1, withscores=True)
        pipe.keys(f"{self.p}task:*")
        pipe.keys("celery-task-meta-*")
        pipe.keys(f"{self.p}key:*")
        pipe.keys(f"{self.p}result:*")
        pipe.hgetall(f"{self.p}untold")
        pipe.hgetall(f"{self.p}followers")
        pipe.zrange(f"{self.p}to_follow", 0, -1)
        *rows, stored, copies, keys, results, untold, followers, to_follow = pipe.execute()
        assert {i.decode(): what.decode() for i, what in followers.items()} == self.followers
        assert {i.decode() for i in to_follow} == self.to_follow
        rows, ids_in = rows[: 2 * len(self.tasks)], rows[2 * len(self.tasks) :]
        hashes = dict(zip(self.tasks, zip(rows[::2], rows[1::2], strict=True), strict=True))
        sets = {str(s): {i.decode(): x for i, x in ids} for s, ids in zip(State, ids_in, strict=True)}
        assert {i.decode(): node.decode() or None for i, node in untold.items()} == self.untold
        assert {k.decode().removeprefix(f"{self.p}task:") for k in stored} == set(self.tasks)
        assert {k.decode() for k in keys} == {f"{self.p}key:{tenant} {key}" for tenant, key in self.keys}
        for state, ids in sets.items():
            assert set(ids) == {t.id for t in self.tasks.values() if t.state == state}, f"the set of {state} tasks"
        finals = {t.id for t in self.tasks.values() if t.final}
        shown = {k.decode().removeprefix("celery-task-meta-") for k in copies}
        assert shown == self.shown | self.told
        assert finals - self.untold.keys() <= shown
        withdrawn = {t.id for t in self.tasks.values() if t.withdrawn}
        assert {k.decode().removeprefix(f"{self.p}result:") for k in results} == finals - withdrawn
        for task in self.tasks.values():
            self.check_task(task, *hashes[task.id], sets[task.state][task.id])
        held: Counter[bytes] = Counter()
        for fields, result in hashes.values():
            held[fields[b"tenant"]] += TASK_BYTES + sum(len(fields[f]) for f in (b"payload", b"features"))
            held[fields[b"tenant"]] += 2 * len(result or b"")
        for task in self.tasks.values():
            held[task.spec.tenant.encode()] += len(self.followers.get(task.id, ""))
        assert self.redis.hgetall(f"{self.p}bytes") == {t: str(n).encode() for t, n in held.items()}
        totals = self.ledger.totals()
        assert totals == {k: v for k, v in self.totals.items() if v}
        ended = sum(totals.get(s, 0) for s in CELERY)
        assert ended == len(finals) + totals.get("forgotten", 0)
        assert totals.get("submitted", 0) == sum(map(len, sets.values())) + totals.get("forgotten", 0)

    def check_task(self, task: Task, stored: dict[bytes, bytes], kept: bytes | None, score: float) -> None:
        seen = {k: stored[k].decode() for k in (b"state", b"attempt", b"strikes")}
        assert seen == {b"state": task.state, b"attempt": str(task.attempt), b"strikes": str(task.strikes)}
        assert (b"token" in stored) == (task.token is not None)
        if task.placed:
            assert (score < self.ledger.now()) == task.lapsed, "its lease"
        elif not task.aged:
            assert score == float(stored[b"finished" if task.final else b"deadline"])
        if not task.final:
            assert stored.get(b"node", b"").decode() == (task.node or "")
            assert (b"claimed" in stored) == (task.state == "running")
            return
        (result,) = self.ledger.results([task.id])
        assert result is not None
        assert (result.id, result.state) == (task.id, task.state)
        if self.results.setdefault(task.id, kept or result.model_dump_json().encode()) != (
            kept or result.model_dump_json().encode()
        ):
            raise AssertionError("a result changed")

    def check_nodes(self) -> None:
        live = {info.name: (info.boot, draining) for info, _, draining in self.ledger.nodes()}
        assert live == {name: (node.boot, node.draining) for name, node in self.nodes.items()}
        assert {k.decode().split(":", 2)[2] for k in self.redis.keys(f"{self.p}node:*") if b":tasks" not in k} == set(
            live
        )
        assert {info.name for info, _, _ in self.ledger.gone()} == self.gone
        for name in NODES:
            held = {i.decode() for i in self.redis.smembers(f"{self.p}node:{name}:tasks")}
            there = {t.id for t in self.on(name, "dispatched", "running")}
            assert held - self.untold.keys() == there, f"tasks on {name}"
            assert self.redis.llen(QUEUES[name]) == self.pushed[name], f"messages to {name}"

    def check_announcements(self) -> None:
        """Every final state is announced once, with Celery's copy of it; every running task cancelled is signalled."""
        self.redis.publish("sync", "")
        heard = []
        while (message := self.listener.get_message(timeout=10)) is None or message["channel"] != b"sync":
            assert message is not None, "the server is silent"
            channel, data = message["channel"].decode(), message["data"]
            if channel.startswith("celery-task-meta-"):
                self.check_copy(json.loads(data))
                heard.append((channel, channel.removeprefix("celery-task-meta-")))
            else:
                heard.append((channel, data.decode()))
        assert Counter(heard) == Counter(self.announced)
        self.announced.clear()

    def check_copy(self, copy: dict[str, Any]) -> None:
        task_id = copy["task_id"]
        if task_id not in self.tasks and copy["result"].get("exc_message") == ["because"]:
            assert copy["result"]["exc_type"] in REFUSALS.values()
            return
        state = self.replayed[task_id][0]
        if state == "succeeded":
            assert copy["result"] == json.loads(self.results[task_id])
        elif State(state).final:
            assert set(copy["result"]) == {"exc_type", "exc_message", "exc_module"}
        else:
            assert copy["result"] == {"hostname": self.replayed[task_id][2]} | (
                {"tokens": 7} if copy["status"] == "PROGRESS" else {}
            )
        assert copy["status"] in {"running": ("STARTED", "PROGRESS")}.get(state, (CELERY.get(state),))


def _fact(event: Event) -> Fact:
    match event:
        case Submitted(id=task_id):
            return ("submitted", task_id)
        case Dispatched() | Claimed():
            return (event.type, event.id, event.node, event.attempt)
        case Completed():
            return ("completed", event.id, event.node, event.attempt, str(event.state), event.on_time)
        case Returned():
            return ("returned", event.id, event.node, event.attempt, event.cause, event.strikes)
        case Ended():
            return ("ended", event.id, str(event.state), event.node)
        case NodeUp():
            return ("node_up", event.info.name, event.info.boot)
        case Heartbeat():
            assert event.at > 1e9  # the server's clock, not the sender's
            return ("heartbeat", event.node, event.boot)
        case NodeDown():
            return ("node_down", event.node)


@pytest.mark.timeout(300)
def test_ledger_machine(server: Any) -> None:
    run_state_machine_as_test(
        lambda: LedgerMachine(server.url),
        settings=hypothesis_settings(max_examples=40, stateful_step_count=50, deadline=None),
    )
