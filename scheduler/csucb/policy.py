"""CS-UCB that knows its queues: the default policy, `cs-ucb` (docs/architecture.md, "The decision")."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from typing_extensions import override

from perllm.broker.messages import Candidate, Completed, Event, LengthForecast, NodeBelief, State
from perllm.scheduler.core.cluster import Cluster, Node, Task
from perllm.scheduler.core.policy import Choice, Place, Policy, Reject, Wait
from perllm.scheduler.csucb import admission, constraints, scoring
from perllm.scheduler.csucb.cluster_arrays import ClusterArrays
from perllm.scheduler.csucb.index import HARM_FACTOR, EnergyScale
from perllm.scheduler.csucb.node_models import PATIENT_STAYS, NodeModels
from perllm.scheduler.csucb.output_lengths import Lengths
from perllm.scheduler.csucb.rows import CANDIDATE, SCORE, TASK, TERMS, Records, ScoreRow, TaskRow, TermsRow, values

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
    - `text`: output lengths are learned from tasks' texts as well, where those travel.
    - `price`: the congestion price.
    - `admission`: a task not worth its cost waits or is refused; without, every task goes to the best node at once.
    - `patience`: long-deadline work waits for cheap capacity.
    - `learning`: step costs, bandwidth and power are learned; without, the registrations are believed.
    - `optimism`: little-known nodes are seen at their better confidence bound; without, at the worse from the start.
    """

    harm: bool = True
    foresight: bool = True
    spread: bool = True
    sizes: bool = True
    hints: bool = True
    text: bool = True
    price: bool = True
    admission: bool = True
    patience: bool = True
    learning: bool = True
    optimism: bool = True


class CsUcb(Policy):
    """Where V·Δ(on-time value) − Δenergy/E₀ − price·Δslot-time is greatest by forecast, if that is worth it now.

    `value_weight` is V: how much an on-time task is worth, in units of E₀. `energy_scale` fixes E₀ (J); by default it
    follows the energy of finished tasks (see `csucb.index`).
    """

    name = "cs-ucb"

    def __init__(
        self,
        seed: int = 0,  # noqa: ARG002 (nothing is drawn; every policy takes one)
        *,
        value_weight: float = 4.0,
        energy_scale: float | None = None,
        mechanisms: Mechanisms | None = None,
    ) -> None:
        on = self._on = mechanisms or Mechanisms()
        self._value_weight, self._fixed_scale = value_weight, energy_scale
        self._harm_weight = value_weight * HARM_FACTOR * on.harm
        self._lengths = Lengths(by_size=on.sizes, use_hints=on.hints, use_text=on.text, spread=on.spread)
        self._node_models = NodeModels(
            value_weight, learning=on.learning, optimism=on.optimism, foresight=on.foresight, price=on.price
        )
        self._scale = EnergyScale()
        self._arrays = ClusterArrays(self._lengths, self._node_models.estimate)
        self._scored: Sequence[Node] = ()  # the nodes scored last; what follows is about them
        self._candidates: Records = np.zeros(0, CANDIDATE)
        self._scores: Records = np.zeros(0, SCORE)
        self._terms: Records = np.zeros(1, TERMS)
        self._task: Records = np.zeros(1, TASK)  # the task chosen for last

    # --- learning

    @override
    def observe(self, event: Event, task: Task | None, cluster: Cluster) -> None:
        self._node_models.observe(event, task, cluster)
        if isinstance(event, Completed) and task is not None:
            receipt = event.receipt
            self._scale.observe(receipt.energy.transfer + receipt.energy.inference)
            if not task.generates:
                return
            for tokens in receipt.choice_tokens or (receipt.completion_tokens,):
                self._observe_length(task, tokens, cut=event.state is not State.SUCCEEDED, at_limit=receipt.cut)

    def _observe_length(self, task: Task, tokens: int, *, cut: bool, at_limit: bool) -> None:
        """An answer had so many tokens; one that was `cut`, or ended at a limit, would have had more."""
        if not cut and (at_limit or tokens >= task.max_tokens):
            tokens, cut = min(tokens, task.max_tokens) - 1, True
        self._lengths.observe(
            task.service,
            task.prompt_tokens,
            tokens,
            ended=not cut,
            hint=task.expected_tokens,
            tenant=task.tenant,
            text=task.text,
            max_tokens=task.max_tokens,
            model=task.model,
        )

    # --- deciding

    @override
    def choose(self, task: Task, candidates: Sequence[Node], cluster: Cluster, now: float) -> Choice:
        self._task[0] = values(
            TaskRow(
                prompt_tokens=task.prompt_tokens,
                payload_bytes=task.payload_bytes,
                deadline=task.deadline,
                max_tokens=task.most_output,
                n=task.n,
                value=task.value,
                lengths=self._lengths.row_of(task),
            )
        )
        best = self._score(task, candidates, now)
        scores = self._scores
        if not self._on.admission:
            return Place(candidates[best if best >= 0 else int(np.argmax(scores["p_on_time"]))].name)
        if best < 0:
            return self._without_a_chance(task, candidates, cluster, now)
        self._scale.suggest(float(scores["joules"].min()))
        left, urgency, least_joules = task.deadline - now, 1.0, 0.0
        ample = PATIENT_STAYS * float(scores["stay"][best])
        if self._on.patience and left > ample:
            ample, throughput = self._ample_time(task, ample, cluster)
            if left > ample:  # it need not queue on a node
                urgency = admission.urgency(left, ample, cluster.waiting, throughput)
                least_joules = self._least_energy(task, cluster, now) if urgency < 1.0 else 0.0
                best = self._score(task, candidates, now, urgency, needs_slot=True)
                if best < 0:
                    return Wait(admission.review(now, left), rank=-self._value_weight * task.value)
        worth = self._worth(task, best, urgency, least_joules)
        return Place(candidates[best].name) if worth > 0 else Wait(admission.review(now, left), rank=worth)

    def _score(
        self, task: Task, nodes: Sequence[Node], now: float, urgency: float = 1.0, *, needs_slot: bool = False
    ) -> int:
        """Score the task that `choose` is about on each of the nodes; returns the position of the best, or −1. With
        `needs_slot`, only nodes with a free slot are feasible."""
        self._scored, self._candidates = nodes, self._arrays.candidates(nodes, task.demand)
        if len(self._scores) != len(nodes):
            self._scores = np.zeros(len(nodes), SCORE)
        self._terms[0] = values(
            TermsRow(
                own_weight=self._value_weight * urgency,
                harm_weight=self._harm_weight,
                energy_scale=self._fixed_scale or self._scale.joules,
                min_p_on_time=admission.MIN_P_ON_TIME,
                needs_slot=needs_slot,
            )
        )
        return scoring.score(self._arrays.rows, self._candidates, self._task, self._terms, now, self._scores)

    def _worth(self, task: Task, best: int, urgency: float, least_joules: float) -> float:
        own, scale = ScoreRow(*self._scores.item(best)), float(self._terms["energy_scale"][0])
        most = self._value_weight * task.value
        return admission.worth(
            own=most * urgency * own.p_on_time,
            lost=self._harm_weight * own.harm,
            slot_cost=own.slot_cost,
            energy=own.joules / scale,
            least=least_joules / scale,
            urgency=urgency,
            most=most,
        )

    def _ample_time(self, task: Task, ample: float, cluster: Cluster) -> tuple[float, float]:
        """Time to its deadline with which a task is patient (s), at least `ample`; tasks/s all nodes can finish."""
        rows = self._arrays.candidates(cluster.serving(task.demand), task.demand)["node"]
        nodes = self._arrays.nodes
        slots, throughput = float(nodes["slots"][rows].sum()), float(nodes["throughput"][rows].sum())
        if throughput > 0:  # tasks with short stays are no more patient than the mean one
            ample = max(ample, PATIENT_STAYS * slots / throughput)
        return ample, throughput

    def _least_energy(self, task: Task, cluster: Cluster, now: float) -> float:
        """J the task would cost on the node where it costs least, room or no room."""
        serving = cluster.serving(task.demand)
        self._score(task, serving, now)
        scores = self._scores
        able = scores["p_on_time"] >= admission.MIN_P_ON_TIME
        if task.avoid:
            others = able & [not task.avoids(n.name, now) for n in serving]
            able = others if others.any() else able
        return float(scores["joules"][able].min()) if able.any() else 0.0

    def _without_a_chance(self, task: Task, candidates: Sequence[Node], cluster: Cluster, now: float) -> Choice:
        """No candidate gives the task a chance as things stand."""
        models, serving = self._node_models, cluster.serving(task.demand)
        for node in candidates:
            if not node.in_flight and not models.proven(node, task.demand, now):
                return Place(node.name)  # find out what it can do
        rows = self._arrays.candidates(serving, task.demand)
        alone = scoring.best_p_on_time_alone(self._arrays.rows, rows, self._task, now)
        if alone < admission.MIN_P_ON_TIME and all(models.proven(n, task.demand, now) for n in serving):
            return Reject(
                f"{task.deadline - now:.1f} s are left, too little for any node even if it had nothing else to do"
            )
        return Wait(admission.review(now, task.deadline - now), hopeless=True)

    # --- explaining

    @override
    def explain(self, task: Task, candidates: Sequence[Node], cluster: Cluster, now: float) -> tuple[Candidate, ...]:
        if self._scored is not candidates:
            self._score(task, candidates, now)
        rows, scores, cluster_rows = self._candidates, self._scores, self._arrays.rows
        order = np.argsort(-scores["index"], kind="stable")[:EXPLAINED]
        scoring.complete_scores(order, cluster_rows, rows, self._task, self._terms, now, scores)
        order = order[np.argsort(-scores["index"][order], kind="stable")]
        spreads = cluster_rows.arms["spread"][rows["arm"][order]].tolist()
        stalled = cluster_rows.nodes["stalled"][rows["node"][order]].tolist()
        single = constraints.single_server_slack(0 if task.node is None else 1)
        return tuple(
            _candidate(candidates[i].info.name, ScoreRow(*scores.item(i)), spread, single, stalled=stands_still)
            for i, spread, stands_still in zip(order.tolist(), spreads, stalled, strict=True)
        )

    @override
    def forecast_length(self, task: Task) -> LengthForecast | None:
        return self._lengths.forecast(task) if task.generates else None

    @override
    def beliefs(self, cluster: Cluster, now: float) -> dict[str, NodeBelief]:
        return {name: self._node_models.belief(node, now) for name, node in cluster.nodes.items()}

    # --- kept over a restart

    @override
    def snapshot(self) -> dict[str, Any]:
        # What is worked out from the learned state is dropped, so that a copy restored from this goes on alike.
        self._arrays.forget()
        self._lengths.forget()
        return {
            "node_models": self._node_models.snapshot(),
            "lengths": self._lengths.snapshot(),
            "texts": self._lengths.snapshot_texts(),
            "scale": self._scale.snapshot(),
        }

    @override
    def restore(self, state: dict[str, Any]) -> None:
        scale = EnergyScale(**state["scale"])
        self._node_models.restore(state["node_models"])
        self._lengths.restore(state["lengths"], state.get("texts", ()))
        self._scale = scale
        self._arrays.forget()


def _candidate(name: str, score: ScoreRow, spread: float, single_server: float, *, stalled: bool) -> Candidate:
    """A score as an explanation gives it."""
    feasible, note = score.index > scoring.INFEASIBLE, ""
    if stalled:
        note = "stands still"
    elif not feasible:
        enough = score.p_on_time >= admission.MIN_P_ON_TIME
        note = "has no room for it now" if enough else "would be too late"
    return Candidate(
        node=name,
        index=score.index if feasible else None,
        feasible=feasible,
        finish=score.finish,
        p_on_time=score.p_on_time,
        marginal_energy=score.joules,
        slacks={
            "deadline": score.deadline_slack,
            "compute": score.compute_slack,
            "memory": score.memory_slack,
            "bandwidth": score.bandwidth_slack,
            "one_server": single_server,
        },
        confidence=1.0 / (1.0 + spread),
        note=note,
    )
