"""`make bench-decision`: what one decision of `cs-ucb` costs, beside MABWiser's LinUCB in the same run.

- One decision: the `Submitted` event in, `SchedulerCore.decide` with its explanation out, on 6 and on 1,000 nodes with
  32 tasks in flight each. Before each, a task somewhere ends and another is claimed, so that nodes change as they do in
  service.
- The peer: LinUCB's `predict` and `partial_fit` for as many arms, with eight context features.
- The backlog: the same with a thousand and with a million long-deadline tasks pending; memory of the million.
"""

from __future__ import annotations

import argparse
import gc
import random
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from uuid import UUID

import numpy as np
import psutil

from benchmarks.common import emit, median_and_spread
from perllm.broker.messages import (
    Claimed,
    Counters,
    Dispatched,
    Heartbeat,
    NodeInfo,
    NodeUp,
    Power,
    StepCost,
    Submitted,
)
from perllm.scheduler.core.scheduler import SchedulerCore
from perllm.scheduler.csucb.policy import CsUcb
from perllm.scheduler.examples import completed, node_info

IN_FLIGHT = 32
SLOTS = 40  # of a node: room for a few more
STAY = 5.0  # s a task is on its node
MICRO = 1e6


class World:
    """A core over `nodes` nodes that are kept at IN_FLIGHT tasks each."""

    def __init__(self, nodes: int) -> None:
        self.rng = random.Random(0)
        self.core = SchedulerCore(CsUcb())
        self.now = 1_000_000.0
        self.gap = STAY / (nodes * IN_FLIGHT)  # s between arrivals, with so many in flight
        self.counters = {f"n{i}": Counters() for i in range(nodes)}
        for name in self.counters:
            self.core.handle(NodeUp(at=self.now, info=self.info(name)))
        for name in list(self.counters) * IN_FLIGHT:
            event = self.task()
            self.core.handle(event)
            self.confirm(event.id, name, attempt=1)
        for name in self.counters:
            self.beat(name)

    def info(self, name: str) -> NodeInfo:
        speed = self.rng.uniform(0.7, 1.4)
        return node_info(
            name,
            tier="cloud",
            slots=SLOTS,
            step_cost=StepCost(step=0.008 * speed, sequence=2e-4 * speed, prefill=1e-4 * speed, context=2e-7 * speed),
            power=Power(idle=100, active=400, method="emulated", estimated=True),
            bandwidth=1e8,
        )

    def task(self, patience: float = 10.0) -> Submitted:
        rng = self.rng
        return Submitted(
            id=str(UUID(int=rng.getrandbits(128))),
            at=self.now,
            deadline=self.now + rng.uniform(0.5, 1.0) * patience,
            service=rng.choice(("chat", "code", "classify")),
            prompt_tokens=int(rng.lognormvariate(5, 0.6)),
            payload_bytes=rng.randrange(1_000, 100_000),
            max_tokens=512,
        )

    def place(self) -> None:
        """Decide, and confirm what was decided as the stream does."""
        for decision in self.core.decide(self.now):
            if decision.node is not None:
                self.confirm(decision.task.id, decision.node.name, decision.task.attempt)

    def confirm(self, task_id: str, node: str, attempt: int) -> None:
        """The stream's word that a task was dispatched and claimed."""
        self.core.handle(Dispatched(id=task_id, node=node, attempt=attempt, at=self.now, model="m"))
        self.core.handle(Claimed(id=task_id, node=node, attempt=attempt, at=self.now))

    def beat(self, name: str) -> None:
        """A heartbeat: everybody on the node a few tokens further."""
        node = self.core.cluster.nodes[name]
        self.step(name)
        progress = {t.id: min(t.generated + self.rng.randrange(1, 40), 400) for t in node.in_flight.values()}
        self.core.handle(
            Heartbeat(at=self.now, node=name, boot=f"{name}.1", counters=self.counters[name], progress=progress)
        )

    def step(self, name: str) -> None:
        c = self.counters[name]
        self.counters[name] = Counters(
            steps=c.steps + 10,
            busy=c.busy + 0.18,
            sequence_steps=c.sequence_steps + 10 * IN_FLIGHT,
            context_steps=c.context_steps + 10 * IN_FLIGHT * 250,
            prefilled=c.prefilled + 200,
            longest_step=0.05,
            energy=c.energy + 200.0,
        )

    def finish_one(self, name: str | None = None) -> None:
        """Somewhere the task that ran longest ends."""
        nodes = self.core.cluster.nodes
        node = nodes[name] if name else self.rng.choice([n for n in nodes.values() if n.in_flight])
        name = node.name
        task = next(iter(node.in_flight.values()))
        self.step(name)
        self.core.handle(
            completed(
                task.id,
                name,
                at=self.now,
                attempt=task.attempt,
                joules=60.0,
                payload_bytes=task.payload_bytes,
                transfer=task.payload_bytes / 1e8,
                prompt_tokens=task.prompt_tokens,
                completion_tokens=self.rng.randrange(5, 300),
                after=self.counters[name],
            )
        )

    def decision(self) -> float:
        """Seconds one decision takes, its task's arrival included."""
        self.now += self.gap
        if self.rng.random() < self.gap * len(self.counters):  # each node beats once a second
            self.beat(self.rng.choice(list(self.counters)))
        self.finish_one()
        event = self.task()
        began = time.perf_counter()
        self.core.handle(event)
        decisions = self.core.decide(self.now)
        took = time.perf_counter() - began
        for decision in decisions:
            if decision.node is not None:
                self.confirm(decision.task.id, decision.node.name, decision.task.attempt)
        return took

    def from_backlog(self) -> float:
        """Seconds one decision takes when a place becomes free and a pending task gets it."""
        self.now += self.gap
        fullest = max(self.core.cluster.nodes.values(), key=lambda n: len(n.in_flight))
        self.finish_one(fullest.name)
        began = time.perf_counter()
        self.place()
        return time.perf_counter() - began


def linucb(arms: int) -> Callable[[], float]:
    """One `predict` and `partial_fit` of MABWiser's LinUCB over `arms` arms, in s."""
    from mabwiser.mab import MAB, LearningPolicy  # noqa: PLC0415 (only this bench needs it)

    warnings.filterwarnings("ignore")
    rng = np.random.default_rng(0)
    names = [f"n{i}" for i in range(arms)]
    mab = MAB(names, LearningPolicy.LinUCB(alpha=0.5))
    mab.fit(names * 2, [1.0] * (2 * arms), rng.random((2 * arms, 8)))

    def once() -> float:
        context = rng.random((1, 8))
        began = time.perf_counter()
        arm = mab.predict(context)
        mab.partial_fit([arm], [1.0], context)
        return time.perf_counter() - began

    return once


def backlog(pending: int, decisions: int) -> tuple[float, float]:
    """Seconds per decision with so many tasks pending, and MB that those take."""
    world = World(6)
    process = psutil.Process()
    gc.collect()
    before = process.memory_info().rss
    for _ in range(pending):
        world.core.handle(world.task(patience=86_400.0))
    gc.collect()
    grown = process.memory_info().rss - before
    for _ in range(50):
        world.from_backlog()
    return statistics.median(world.from_backlog() for _ in range(decisions)), grown / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--decisions", type=int, default=300, help="per round")
    parser.add_argument("--pending", type=int, default=1_000_000)
    options = parser.parse_args()
    worlds = {count: World(count) for count in (6, 1000)}
    peer = linucb(6)
    samples: dict[str, list[float]] = {}

    def keep(name: str, value: float) -> None:
        samples.setdefault(name, []).append(value)

    for number in range(options.rounds):
        print(f"round {number + 1} of {options.rounds}", file=sys.stderr)
        for count, world in worlds.items():
            times = [world.decision() for _ in range(options.decisions)]
            keep(f"decision_us_{count}_nodes", statistics.median(times) * MICRO)
            keep(f"decision_p99_us_{count}_nodes", statistics.quantiles(times, n=100)[98] * MICRO)
        theirs = statistics.median(peer() for _ in range(options.decisions)) * MICRO
        keep("mabwiser_linucb_us_6_arms", theirs)
        keep("over_mabwiser_linucb", theirs / samples["decision_us_6_nodes"][-1])
    few, _ = backlog(1000, options.decisions)
    many, megabytes = backlog(options.pending, options.decisions)
    figures, spread = median_and_spread(samples)
    figures |= {
        "pending_1m_over_1k": many / few,
        "pending_decision_us": many * MICRO,
        "pending_1m_rss_mb": megabytes * 1_000_000 / options.pending,
    }
    emit("decision", figures, spread, rounds=options.rounds, in_flight=IN_FLIGHT, pending=options.pending)


if __name__ == "__main__":
    main()
