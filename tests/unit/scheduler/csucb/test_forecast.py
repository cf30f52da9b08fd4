"""The forecast against brute force: lengths drawn, steps taken one by one on a node whose steps cost what θ says."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest

from perllm.broker.messages import Power, StepCost
from perllm.scheduler import examples
from perllm.scheduler.core.cluster import Demand, Node, Task
from perllm.scheduler.csucb import forecast as f
from perllm.scheduler.csucb.cluster_arrays import ArmEstimate, ClusterArrays, NodeEstimate
from perllm.scheduler.csucb.output_lengths import Lengths
from perllm.scheduler.csucb.rows import OFFER, SCORE, TASK, TaskRow, values
from perllm.scheduler.csucb.token_bins import EDGES
from perllm.scheduler.csucb.usual_costs import UsualCosts

THETA = (0.02, 0.002, 0.0005, 1e-6)
#: Of a node's models: the second one's steps take twice as long.
THETAS = {"m": THETA, "n": (0.04, 0.004, 0.001, 2e-6)}
WATTS = 100.0


@dataclass
class Setting:
    """A node with tasks on it, and the forecast of it."""

    in_flight: list[Task]
    slots: int = 16
    arrival_rate: float = 0.0
    models: tuple[str, ...] = ("m",)
    chunk: int | None = None  # prompt tokens of a step

    def __post_init__(self) -> None:
        self.lengths = Lengths()
        rng = np.random.default_rng(0)
        self.drawn = np.clip(np.rint(60 * np.exp(0.8 * rng.standard_normal(3000))), 1, 400).astype(int)
        for tokens in self.drawn[:1500].tolist():
            self.lengths.observe("chat", 100, tokens, ended=True)
        a, b, c, d = THETA
        info = examples.node_info(
            "n",
            slots=self.slots,
            models=self.models,
            chunk=self.chunk,
            step_cost=StepCost(step=a, sequence=b, prefill=c, context=d),
            power=Power(idle=0, active=WATTS, joules_per_byte=1e-6, method="emulated", estimated=True),
        )
        self.node = Node(info, since=0.0, heard=0.0, changed=0.0, in_flight={t.id: t for t in self.in_flight})
        estimate = NodeEstimate(
            arms=tuple(ArmEstimate(*THETAS[m], spread=0.05) for m in self.models),
            watts=WATTS,
            bandwidth=1e7,
            latency=0.0,
            dispatch_delay=0.0,
            stalled=False,
            arrival_rate=self.arrival_rate,
            arrival_prompt=100.0,
            arrival_output=60.0,
            slot_price=0.0,
            stay=0.0,
            throughput=0.0,
        )
        self.arrays = ClusterArrays(self.lengths, UsualCosts(), lambda _: estimate)
        self.arrays.offers((self.node,), Demand())

    def forecast(self, task: Task, now: float = 0.0) -> tuple[np.void, float]:
        """The forecast of one more task, and its harm to others."""
        tasks, scores = np.zeros(1, TASK), np.zeros(1, SCORE)
        tasks[0] = values(
            TaskRow(
                prompt_tokens=task.prompt_tokens,
                payload_bytes=task.payload_bytes,
                deadline=task.deadline,
                max_tokens=task.max_tokens,
                least_context=1,
                n=task.n,
                value=task.value,
                lengths=self.lengths.row(task.service, task.prompt_tokens),
            )
        )
        self.lengths.refresh()
        rows, new, score, offers = self.arrays.rows, tasks[0], scores[0], np.zeros(1, OFFER)
        arm = self.models.index(task.model or "m")
        offers[0] = 0, arm
        half = (task.deadline - now) / 2
        f.forecast_task(rows.nodes[0], rows.arms[arm], rows.outlooks[arm], new, now, half, rows.lengths, score)
        return score, float(f.harm(rows, offers[0], new, now))

    def chances(self) -> list[float]:
        return self.arrays.in_flight["p_on_time"][: len(self.in_flight)].tolist()

    def play(self, extra: Task | None = None, runs: int = 800) -> tuple[list[float], float]:
        """P(on time) of each task (the extra one last) and mean busy seconds, by stepping."""
        rng = np.random.default_rng(1)
        tasks = [*self.in_flight, *([extra] if extra else [])]
        good, busy = np.zeros(len(tasks)), 0.0
        for _ in range(runs):
            on_time, spent = self._play_once(tasks, rng)
            good += on_time
            busy += spent
        return (good / runs).tolist(), busy / runs

    def _play_once(self, tasks: list[Task], rng: np.random.Generator) -> tuple[np.ndarray, float]:
        """Each answer is a sequence; those of a task begin when its prompt is computed and there is a slot. Models take
        turns; each prefills up to a chunk in its step, first come first served."""
        of = [i for i, t in enumerate(tasks) for _ in range(t.n)]  # sequence → task
        total = []
        for i in of:
            longer = self.drawn[self.drawn > tasks[i].generated // tasks[i].n]
            total.append(min(int(rng.choice(longer)), tasks[i].max_tokens))
        done = np.zeros(len(tasks))
        left = [t.n for t in tasks]
        tokens = [tasks[i].generated // tasks[i].n for i in of]
        ready = [0.0 if t.generated else t.payload_bytes / 1e7 for t in tasks]
        claimed = list(range(min(self.slots, len(of))))
        queue = list(range(len(claimed), len(of)))
        now = busy = 0.0
        unread = [0 if t.generated else t.prompt_tokens for t in tasks]
        while claimed or queue:
            for s in [s for s in claimed if now >= tasks[of[s]].deadline]:
                claimed.remove(s)
            while queue and len(claimed) < self.slots:
                s = queue.pop(0)
                if left[of[s]] == tasks[of[s]].n and not tasks[of[s]].generated:
                    ready[of[s]] = max(ready[of[s]], now + tasks[of[s]].payload_bytes / 1e7)
                claimed.append(s)
            active = [s for s in claimed if ready[of[s]] <= now]
            if not active:
                if not claimed:
                    break
                now = min(min(ready[of[s]], tasks[of[s]].deadline) for s in claimed)
                continue
            step, moving = 0.0, []
            for model in self.models:
                a, b, c, d = THETAS[model]
                mine = [s for s in active if (tasks[of[s]].model or "m") == model]
                decoding, room = [s for s in mine if not unread[of[s]]], self.chunk or 10**9
                for i in dict.fromkeys(of[s] for s in mine if unread[of[s]]):
                    read = min(unread[i], room)
                    step, room, unread[i] = step + c * read, room - read, unread[i] - read
                step += (a if mine else 0.0) + sum(b + d * (tasks[of[s]].prompt_tokens + tokens[s]) for s in decoding)
                moving += [s for s in mine if not unread[of[s]]]
            now, busy = now + step, busy + step
            for s in moving:
                tokens[s] += 1
                if tokens[s] >= total[s]:
                    left[of[s]] -= 1
                    if not left[of[s]]:
                        done[of[s]] = now <= tasks[of[s]].deadline
                    claimed.remove(s)
        return done, busy


def task(task_id: str, deadline: float, generated: int = 0, model: str | None = None, **fields: float) -> Task:
    return Task(
        id=task_id,
        submitted=0.0,
        deadline=deadline,
        value=1.0,
        service="chat",
        demand=Demand(model),
        prompt_tokens=int(fields.get("prompt", 100)),
        payload_bytes=int(fields.get("payload", 200_000)),
        max_tokens=int(fields.get("most", 400)),
        n=int(fields.get("n", 1)),
        node="n",
        dispatched=0.0,
        claimed=1e-9,
        generated=generated,
    )


def running(count: int) -> list[Task]:
    """Tasks amid their work, with deadlines from 1 to 6 s."""
    return [task(f"t{i}", 1.0 + 5.0 * i / max(count - 1, 1), generated=5 + 11 * i % 70) for i in range(count)]


@pytest.mark.parametrize("count", [1, 4, 12])
def test_chances_of_running_tasks(count: int) -> None:
    setting = Setting(running(count))
    played, _ = setting.play()
    assert setting.chances() == pytest.approx(played, abs=0.08)
    assert np.mean(setting.chances()) == pytest.approx(np.mean(played), abs=0.04)


@pytest.mark.parametrize("count", [0, 4, 12])
@pytest.mark.parametrize("left", [1.5, 3.0, 6.0])
def test_the_chance_of_one_more(count: int, left: float) -> None:
    setting, new = Setting(running(count)), task("new", left)
    score, _ = setting.forecast(new)
    played, _ = setting.play(new)
    assert score["p_on_time"] == pytest.approx(played[-1], abs=0.09)


def test_its_harm_to_the_others() -> None:
    """With a long prompt, so that there is some."""
    setting, new = Setting(running(10)), task("new", 6.0, prompt=1500)
    _, harm = setting.forecast(new)
    without, _ = setting.play(runs=3000)
    with_it, _ = setting.play(new, runs=3000)
    true = sum(without) - sum(with_it[:-1])
    assert true > 0.3
    assert harm == pytest.approx(true, rel=0.35)


@pytest.mark.parametrize("count", [0, 3, 12])
def test_the_energy_it_adds(count: int) -> None:
    """Alone it pays for whole steps; in a batch for its part of them."""
    setting, new = Setting(running(count)), task("new", 6.0)
    score, _ = setting.forecast(new)
    _, without = setting.play(runs=4000)
    _, with_it = setting.play(new, runs=4000)
    assert score["busy"] == pytest.approx(with_it - without, rel=0.3, abs=0.05)
    assert score["joules"] == pytest.approx(score["busy"] * WATTS + 0.2)


def test_batching_makes_one_more_cheaper() -> None:
    alone, _ = Setting([]).forecast(task("new", 6.0))
    beside, _ = Setting(running(8)).forecast(task("new", 6.0))
    assert beside["busy"] < 0.6 * alone["busy"]


def test_queued_tasks_wait_for_a_slot() -> None:
    in_flight = running(4)
    waiting = [task(f"w{i}", 6.0) for i in range(2)]
    for w in waiting:
        w.claimed = None
    setting = Setting([*in_flight, *waiting], slots=4)
    played, _ = setting.play()
    assert setting.chances()[4:] == pytest.approx(played[4:], abs=0.15)
    score, _ = setting.forecast(task("new", 6.0))
    roomy, _ = Setting([*in_flight, *waiting], slots=8).forecast(task("new", 6.0))
    assert score["p_on_time"] < roomy["p_on_time"]


# --- chunks of prompts, and several models


def long_prompts() -> list[Task]:
    """Three tasks amid their work, and three whose prompts take some thirty steps each."""
    reading = [task(f"p{i}", 8.0 + i, prompt=1000, payload=0) for i in range(3)]
    return [*running(3), *reading]


def test_prompts_are_read_chunk_by_chunk_beside_decoding() -> None:
    """Each chunk has a step of its own, in which the others get on."""
    setting, new = Setting(long_prompts(), chunk=32), task("new", 9.0, prompt=1000, payload=0)
    score, _ = setting.forecast(new)
    played, _ = setting.play(new, runs=300)
    assert setting.chances() == pytest.approx(played[:-1], abs=0.15)
    assert score["p_on_time"] == pytest.approx(played[-1], abs=0.15)
    at_once, _ = Setting(long_prompts()).forecast(new)
    assert score["finish"] > at_once["finish"] + 0.5


def test_a_long_prompt_pays_for_its_chunks() -> None:
    """Alone on a node, it pays for the whole step of each."""
    setting, new = Setting([], chunk=32), task("new", 30.0, prompt=2000, payload=0)
    score, _ = setting.forecast(new)
    _, busy = setting.play(new, runs=300)
    assert score["busy"] == pytest.approx(busy, rel=0.1)


def two_models() -> list[Task]:
    """Two tasks of each, amid their work."""
    return [task(f"t{i}", 3.0 + i, generated=10 + 9 * i, model="mn"[i % 2], payload=0) for i in range(4)]


@pytest.mark.parametrize("model", ["m", "n"])
def test_models_on_a_node_take_turns_and_each_step_is_paid(model: str) -> None:
    setting, new = Setting(two_models(), models=("m", "n")), task("new", 6.0, model=model)
    score, harm = setting.forecast(new)
    without, idle = setting.play(runs=800)
    with_it, busy = setting.play(new, runs=800)
    assert setting.chances() == pytest.approx(without, abs=0.1)
    assert score["p_on_time"] == pytest.approx(with_it[-1], abs=0.1)
    assert score["busy"] == pytest.approx(busy - idle, rel=0.3, abs=0.1)
    assert harm == pytest.approx(sum(without) - sum(with_it[:-1]), abs=0.15)


def test_a_model_that_begins_slows_the_other_down() -> None:
    """Its steps are there only with it: who is on the node already has to wait for them."""
    alone = [t for t in two_models() if t.model == "m"]
    setting, new = Setting(alone, models=("m", "n")), task("new", 20.0, model="n", payload=0)
    _, harm = setting.forecast(new)
    without, _ = setting.play(runs=800)
    with_it, _ = setting.play(new, runs=800)
    assert harm == pytest.approx(sum(without) - sum(with_it[:-1]), abs=0.15)
    assert harm > 0.1


# --- several answers


@pytest.mark.parametrize(("n", "slots"), [(4, 16), (16, 16), (16, 8), (5, 4)])
@pytest.mark.parametrize("left", [4.0, 9.0])
def test_the_chance_of_several_answers_is_that_of_the_longest(n: int, slots: int, left: float) -> None:
    """Also where they are more than the slots, and take turns."""
    setting, new = Setting(running(2), slots=slots), task("new", left, n=n)
    score, _ = setting.forecast(new)
    played, _ = setting.play(new, runs=200)
    assert score["p_on_time"] == pytest.approx(played[-1], abs=0.15)


@pytest.mark.parametrize(("n", "slots"), [(4, 16), (16, 8)])
def test_the_energy_of_several_answers_is_their_sum(n: int, slots: int) -> None:
    setting, new = Setting(running(3), slots=slots), task("new", 20.0, n=n)
    score, _ = setting.forecast(new)
    _, without = setting.play(runs=400)
    _, with_it = setting.play(new, runs=400)
    assert score["busy"] == pytest.approx(with_it - without, rel=0.3, abs=0.05)
    one, _ = setting.forecast(task("one", 20.0))
    assert one["busy"] < score["busy"] < n * one["busy"]  # they share steps, and the prompt


@pytest.mark.parametrize(("n", "slots"), [(4, 16), (16, 8)])
def test_chances_beside_several_answers_on_the_way(n: int, slots: int) -> None:
    """One task amid its answers, two with one, one that waits."""
    wide = task("wide", 8.0, generated=20 * n, n=n)
    queued = task("queued", 8.0)
    queued.claimed = None
    setting = Setting([wide, *running(2), queued], slots=slots)
    played, _ = setting.play(runs=200)
    assert setting.chances() == pytest.approx(played, abs=0.2)
    assert setting.node.taken == min(n, slots) + 3
    many, _ = setting.forecast(task("new", 6.0))
    few, _ = Setting([task("wide", 8.0, generated=20), *running(2), queued], slots=slots).forecast(task("new", 6.0))
    assert many["finish"] > few["finish"]


def test_those_expected_to_come_slow_it_down() -> None:
    new = task("new", 3.0)
    quiet, _ = Setting(running(2)).forecast(new)
    busy, _ = Setting(running(2), arrival_rate=4.0).forecast(new)
    assert busy["p_on_time"] < quiet["p_on_time"] - 0.05
    assert busy["finish"] > quiet["finish"]


def test_an_idle_node_does_not_age() -> None:
    setting = Setting([])
    fresh, _ = setting.forecast(task("new", 3.0), now=0.0)
    later, _ = setting.forecast(task("new", 100_003.0), now=100_000.0)
    assert later["p_on_time"] == pytest.approx(fresh["p_on_time"], abs=1e-6)
    assert later["finish"] == pytest.approx(fresh["finish"], abs=1e-6)


def test_a_heartbeat_ago_is_caught_up() -> None:
    """What was heard a second ago and a change now: the tokens of that second are expected, not forgotten."""
    tasks = [task("t", 4.0, generated=10)]
    setting = Setting(tasks)
    setting.node.changed, setting.node.version = 1.0, 1
    setting.arrays.offers((setting.node,), Demand())
    step = THETA[0] + THETA[1] + THETA[3] * 110
    assert setting.arrays.in_flight["tokens"][0] == pytest.approx(10 + 1.0 / step, rel=0.02)


def test_the_map_and_its_inverse_agree() -> None:
    setting = Setting(running(6))
    times = setting.arrays.rows.outlooks["times"][0]
    assert np.all(np.diff(times) > 0)
    for steps in (0.0, 3.3, 40.0, 333.0, float(EDGES[80])):
        time = float(np.interp(steps, EDGES, times))
        assert f.steps_at(times, time) == pytest.approx(steps, rel=1e-6, abs=1e-6)


def test_no_time_left_is_no_chance() -> None:
    score, harm = Setting(running(3)).forecast(task("new", 0.01))
    assert score["p_on_time"] == 0.0
    assert harm >= 0.0
    assert math.isfinite(float(score["finish"]))
