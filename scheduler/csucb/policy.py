"""CS-UCB that knows its queues: the default policy, `cs-ucb` (DESIGN section 5)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from typing_extensions import override

from perllm.broker.messages import Candidate, Completed, Event, State
from perllm.scheduler.core.cluster import Cluster, Node, Task
from perllm.scheduler.core.policy import Choice, Place, Policy, Reject, Wait
from perllm.scheduler.csucb import admission, constraints
from perllm.scheduler.csucb import forecast as f
from perllm.scheduler.csucb import scoring as s
from perllm.scheduler.csucb.cluster_arrays import ClusterArrays
from perllm.scheduler.csucb.index import HARM_COUNTS, EnergyScale
from perllm.scheduler.csucb.node_models import PATIENCE, NodeModels
from perllm.scheduler.csucb.output_lengths import Lengths

#: Candidates an explanation names: the best ones.
EXPLAINED = 8


@dataclass(frozen=True, slots=True)
class Mechanisms:
    """What `cs-ucb` is made of. Each can be switched off alone, for the ablation table.

    - `harm`: what a task does to those already placed, and to those that come, counts against it.
    - `foresight`: the forecast expects as many tasks to come to a node as lately came.
    - `spread`: the whole histogram of output lengths, not the mean alone.
    - `sizes`: output lengths are learned by prompt size as well as by class.
    - `hints`: producers' length hints are heeded.
    - `price`: the congestion price.
    - `admission`: a task not worth its cost waits or is refused; without, every task goes to the best node at once.
    - `patience`: long-deadline work waits for cheap capacity.
    - `learning`: speed, bandwidth and power are learned; without, the registrations are believed.
    - `optimism`: little-known nodes are seen at their better confidence bound; without, at the worse from the start.
    """

    harm: bool = True
    foresight: bool = True
    spread: bool = True
    sizes: bool = True
    hints: bool = True
    price: bool = True
    admission: bool = True
    patience: bool = True
    learning: bool = True
    optimism: bool = True


class CsUcb(Policy):
    """Puts a task where V·Δ(on-time value) − Δenergy/E₀ − price·Δslot-time is greatest, if that is worth it.

    `weight` is V: how much an on-time task is worth, in units of E₀. `energy_scale` fixes E₀ (J); by default it follows
    the energy of finished tasks (see `perllm.scheduler.csucb.index`).
    """

    name = "cs-ucb"

    def __init__(
        self,
        seed: int = 0,  # noqa: ARG002 (nothing is drawn; every policy takes one)
        *,
        weight: float = 4.0,
        energy_scale: float | None = None,
        mechanisms: Mechanisms | None = None,
    ) -> None:
        on = self._on = mechanisms or Mechanisms()
        self._weight, self._fixed_scale = weight, energy_scale
        self._lengths = Lengths(by_size=on.sizes, use_hints=on.hints, spread=on.spread)
        self._node_models = NodeModels(
            weight, learning=on.learning, optimism=on.optimism, foresight=on.foresight, price=on.price
        )
        self._scale = EnergyScale()
        self._arrays = ClusterArrays(self._lengths, self._node_models.learned)
        self._task = np.zeros(f.TASK_COLUMNS)
        self._terms = np.zeros(s.TERMS)
        self._looks = np.zeros((0, f.LOOK_COLUMNS))
        self._asked: Sequence[Node] = ()  # the nodes `_looks` is of

    # --- learning

    @override
    def observe(self, event: Event, task: Task | None, cluster: Cluster) -> None:
        self._node_models.observe(event, task, cluster)
        if isinstance(event, Completed) and task is not None:
            receipt = event.receipt
            tokens, cut = receipt.completion_tokens, event.state is not State.SUCCEEDED
            if not cut and tokens >= task.max_tokens:  # it ended at its limit: it would have been at least so long
                tokens, cut = task.max_tokens - 1, True
            self._lengths.observe(
                task.service,
                task.prompt_tokens,
                tokens,
                ended=not cut,
                hint=task.expected_tokens,
                tenant=task.tenant,
            )
            self._scale.observe(receipt.energy.transfer + receipt.energy.inference)

    # --- deciding

    @override
    def choose(self, task: Task, candidates: Sequence[Node], cluster: Cluster, now: float) -> Choice:
        best = self._survey(task, candidates, now)
        if not self._on.admission:
            return Place(candidates[best if best >= 0 else int(np.argmax(self._looks[:, f.CHANCE]))].name)
        if best < 0:
            return self._without_a_chance(task, candidates, cluster, now)
        self._scale.suggest(float(self._looks[:, f.JOULES].min()))
        left, urgency, least = task.deadline - now, 1.0, 0.0
        calm = PATIENCE * float(self._looks[best, f.STAY])
        if self._on.patience and left > calm:
            calm, pace = self._calm(task, calm, cluster)
            if left > calm:  # it need not queue on a node
                urgency = admission.urgency(left, calm, cluster.waiting, pace)
                least = self._least_energy(task, cluster, now) if urgency < 1.0 else 0.0
                best = self._survey(task, candidates, now, urgency, free=True)
                if best < 0:
                    return Wait(admission.review(now, left), rank=-self._weight * task.value)
        worth = self._worth(task, best, urgency, least)
        return Place(candidates[best].name) if worth > 0 else Wait(admission.review(now, left), rank=worth)

    def _survey(
        self, task: Task, nodes: Sequence[Node], now: float, urgency: float = 1.0, *, free: bool = False
    ) -> int:
        """Look at the task on each of the nodes (with `free`: that has a free slot); returns the position of the best,
        or −1."""
        self._asked = nodes
        board, given, terms = self._arrays, self._task, self._terms
        row = self._lengths.row(task.service, task.prompt_tokens, task.expected_tokens, task.tenant)
        rows, arm_rows = board.rows(nodes, task.model)
        table = self._lengths.table
        if len(self._looks) != len(rows):
            self._looks = np.zeros((len(rows), f.LOOK_COLUMNS))
        given[f.T_PROMPT], given[f.T_BYTES], given[f.T_DEADLINE] = task.prompt_tokens, task.payload_bytes, task.deadline
        given[f.T_MOST], given[f.T_VALUE], given[f.T_LENGTH] = task.max_tokens, task.value, row
        terms[s.OWN], terms[s.OTHERS] = self._weight * urgency, self._weight * HARM_COUNTS * self._on.harm
        terms[s.SCALE], terms[s.LEAST] = self._fixed_scale or self._scale.joules, admission.LEAST
        terms[s.FREE] = free
        return s.score(
            rows, arm_rows, given, terms, now, board.nodes, board.arms, board.in_flight, table, board.maps, self._looks
        )

    def _worth(self, task: Task, best: int, urgency: float, least: float) -> float:
        look, most, scale = self._looks[best], self._weight * task.value, float(self._terms[s.SCALE])
        return admission.worth(
            own=most * urgency * float(look[f.CHANCE]),
            lost=float(self._terms[s.OTHERS] * look[f.HARM]),
            toll=float(look[f.TOLL_PAID]),
            energy=float(look[f.JOULES]) / scale,
            least=least / scale,
            urgency=urgency,
            most=most,
        )

    def _calm(self, task: Task, calm: float, cluster: Cluster) -> tuple[float, float]:
        """Time to its deadline with which a task is patient (s), at least `calm`; tasks/s all nodes can finish."""
        rows, _ = self._arrays.rows(cluster.serving.get(task.model, ()), task.model)
        slots, pace = self._arrays.nodes[rows][:, [f.SLOTS, f.PACE]].sum(axis=0).tolist()
        return max(calm, PATIENCE * slots / pace) if pace > 0 else calm, pace  # the short are no more patient

    def _least_energy(self, task: Task, cluster: Cluster, now: float) -> float:
        """J the task would cost on the node where it costs least, room or no room."""
        serving = cluster.serving.get(task.model, ())
        self._survey(task, serving, now)
        able = self._looks[:, f.CHANCE] >= admission.LEAST
        if task.avoid:
            others = able & [not task.avoids(n.name, now) for n in serving]
            able = others if others.any() else able
        return float(self._looks[able, f.JOULES].min()) if able.any() else 0.0

    def _without_a_chance(self, task: Task, candidates: Sequence[Node], cluster: Cluster, now: float) -> Choice:
        """No candidate gives the task a chance as things stand."""
        knowledge, board, serving = self._node_models, self._arrays, cluster.serving.get(task.model, ())
        for node in candidates:
            if not node.in_flight and not knowledge.proven(node, task.model, now):
                return Place(node.name)  # find out what it can do
        rows, arm_rows = board.rows(serving, task.model)
        alone = s.best_alone(rows, arm_rows, self._task, now, board.nodes, board.arms, self._lengths.table)
        if alone < admission.LEAST and all(knowledge.proven(n, task.model, now) for n in serving):
            return Reject(
                f"{task.deadline - now:.1f} s are left, too little for any node even if it had nothing else to do"
            )
        return Wait(admission.review(now, task.deadline - now), hopeless=True)

    # --- explaining

    @override
    def explain(self, task: Task, candidates: Sequence[Node], cluster: Cluster, now: float) -> tuple[Candidate, ...]:
        if self._asked is not candidates:
            self._survey(task, candidates, now)
        board, table, looks = self._arrays, self._lengths.table, self._looks
        rows, arm_rows = board.rows(candidates, task.model)
        order = np.argsort(-looks[:, f.INDEX], kind="stable")[:EXPLAINED]
        s.complete(
            order,
            rows,
            arm_rows,
            self._task,
            self._terms,
            now,
            board.nodes,
            board.arms,
            board.in_flight,
            table,
            board.maps,
            looks,
        )
        order = order[np.argsort(-looks[order, f.INDEX], kind="stable")]
        spreads = board.arms[arm_rows[order], f.SPREAD].tolist()
        still = board.nodes[rows[order], f.STILL].tolist()
        single = constraints.single_server_slack(0 if task.node is None else 1)
        return tuple(
            self._explained(candidates[i].info.name, look, spread, single, still=stands > 0)
            for i, look, spread, stands in zip(order.tolist(), looks[order].tolist(), spreads, still, strict=True)
        )

    @staticmethod
    def _explained(name: str, look: list[float], spread: float, single: float, *, still: bool) -> Candidate:
        feasible, note = look[f.INDEX] > s.OUT, ""
        if still:
            note = "stands still"
        elif not feasible:
            note = "has no room for it now" if look[f.CHANCE] >= admission.LEAST else "would be too late"
        return Candidate(
            node=name,
            index=look[f.INDEX] if feasible else None,
            feasible=feasible,
            finish=look[f.FINISH],
            p_on_time=look[f.CHANCE],
            marginal_energy=look[f.JOULES],
            slacks={
                "deadline": look[f.C_DEADLINE],
                "compute": look[f.C_COMPUTE],
                "memory": look[f.C_MEMORY],
                "bandwidth": look[f.C_BANDWIDTH],
                "one_server": single,
            },
            confidence=1.0 / (1.0 + spread),
            note=note,
        )

    # --- kept over a restart

    @override
    def snapshot(self) -> dict[str, Any]:
        # What is worked out from the learned state is dropped, so that a copy restored from this goes on alike.
        self._arrays.forget()
        self._lengths.forget()
        return {
            "knowledge": self._node_models.snapshot(),
            "lengths": self._lengths.snapshot(),
            "scale": self._scale.snapshot(),
        }

    @override
    def restore(self, state: dict[str, Any]) -> None:
        scale = EnergyScale(**state["scale"])
        self._node_models.restore(state["knowledge"])
        self._lengths.restore(state["lengths"])
        self._scale = scale
        self._arrays.forget()
