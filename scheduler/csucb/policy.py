"""CS-UCB that knows its queues: the default policy, `cs-ucb` (docs/architecture.md, "The decision")."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from typing_extensions import override

from perllm.broker.messages import Candidate, Completed, Ended, Event, LengthForecast, NodeBelief, Returned, State
from perllm.scheduler.core.cluster import Cluster, Node, Task
from perllm.scheduler.core.policy import Choice, Place, Policy, Reject, Wait
from perllm.scheduler.csucb import admission, constraints, scoring
from perllm.scheduler.csucb.cluster_arrays import ClusterArrays
from perllm.scheduler.csucb.index import HARM_FACTOR, EnergyScale
from perllm.scheduler.csucb.node_models import NodeModels
from perllm.scheduler.csucb.output_lengths import Lengths
from perllm.scheduler.csucb.rows import (
    OFFER,
    SCORE,
    TASK,
    TERMS,
    TOLD,
    VERDICT,
    Records,
    TaskRow,
    TermsRow,
    ToldRow,
    VerdictRow,
    values,
)
from perllm.scheduler.csucb.usual_costs import UsualCosts

#: Candidates an explanation names: the best ones.
EXPLAINED = 8
#: Placements whose extra cost is remembered until they end.
MAX_DEAR = 16_384


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
    - `patience`: work with time left waits for a better node or moment.
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
        self._usual = UsualCosts()
        self._arrays = ClusterArrays(self._lengths, self._usual, self._node_models.estimate)
        # Of tasks that were placed where they cost more than their least: the share that is.
        self._dear: dict[str, float] = {}
        self._scored: Sequence[Node] = ()  # the nodes scored last; what follows is about them
        self._offers: Records = np.zeros(0, OFFER)
        self._scores: Records = np.zeros(0, SCORE)
        self._terms: Records = np.zeros(1, TERMS)
        self._verdict: Records = np.zeros(1, VERDICT)
        self._told: Records = np.zeros(EXPLAINED, TOLD)
        self._task: Records = np.zeros(1, TASK)  # the task chosen for last
        self._open: tuple[Sequence[Node], Sequence[Node]] = (), ()  # nodes, and those of them that have room …
        self._access = np.zeros(0, np.uint8)  # … as `scoring.decide` takes it

    # --- learning

    @override
    def observe(self, event: Event, task: Task | None, cluster: Cluster) -> None:
        self._node_models.observe(event, task, cluster)
        if isinstance(event, Completed) and task is not None:
            receipt = event.receipt
            least = self._dear.pop(task.id, 1.0)
            self._scale.observe(least * (receipt.energy.transfer + receipt.energy.inference))
            if not task.generates:
                return
            for tokens in receipt.choice_tokens or (receipt.completion_tokens,):
                self._observe_length(task, tokens, cut=event.state is not State.SUCCEEDED, at_limit=receipt.cut)
        elif isinstance(event, Ended | Returned):
            self._dear.pop(event.id, None)

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
        verdict = self._decide(task, candidates, cluster, now)
        if self._scale.suggest(verdict.least_joules):
            verdict = self._decide(task, candidates, cluster, now)
        best = verdict.best
        if not self._on.admission:
            return Place(self._scored[best].name if best >= 0 else self._most_likely().name)
        if not verdict.possible:
            return self._without_a_chance(task, candidates, cluster, now)
        if best < 0 or verdict.worth < 0:
            rank = verdict.worth if best >= 0 else -verdict.waiting
            return Wait(admission.review(now, task.deadline - now), rank)
        if verdict.least_joules < verdict.joules:
            self._note_dear(task.id, verdict.least_joules / verdict.joules)
        return Place(self._scored[best].name)

    def _decide(self, task: Task, candidates: Sequence[Node], cluster: Cluster, now: float) -> VerdictRow:
        """Score the task on every node that serves it."""
        nodes = cluster.serving(task.demand)
        self._scored, self._offers = nodes, self._arrays.offers(nodes, task.demand)
        if len(self._scores) != len(nodes):
            self._scores = np.zeros(len(nodes), SCORE)
        self._task[0] = values(
            TaskRow(
                prompt_tokens=task.prompt_tokens,
                payload_bytes=task.payload_bytes,
                deadline=task.deadline,
                max_tokens=task.most_output,
                least_context=task.least_context,
                n=task.n,
                value=task.value,
                lengths=self._lengths.row_of(task),
            )
        )
        self._lengths.refresh()
        self._terms[0] = values(
            TermsRow(
                value_weight=self._value_weight,
                harm_weight=self._harm_weight,
                energy_scale=self._fixed_scale or self._scale.joules,
                patience=self._on.patience and self._on.admission,
                backlog=cluster.waiting,
            )
        )
        access = self._access_to(task, nodes, candidates, now)
        rows, scores = self._arrays.rows, self._scores
        scoring.decide(rows, self._offers, access, self._task, self._terms, now, scores, self._verdict)
        return VerdictRow(*self._verdict.item(0))

    def _access_to(self, task: Task, nodes: Sequence[Node], candidates: Sequence[Node], now: float) -> scoring.Access:
        """Which of the nodes that serve a task it may go to, now or later."""
        if task.avoid:
            able, avoided = {n.info.name for n in candidates}, [task.avoids(n.name, now) for n in nodes]
            others = scoring.LATER if all(avoided) else scoring.NEVER
            self._open = (), ()
            self._access = np.array(
                [
                    scoring.NOW if n.info.name in able else others if avoids else scoring.LATER
                    for n, avoids in zip(nodes, avoided, strict=True)
                ],
                np.uint8,
            )
        elif self._open[0] is not nodes or self._open[1] is not candidates:
            now_or_later = scoring.NOW if candidates is nodes else scoring.LATER
            self._access = np.full(len(nodes), now_or_later, np.uint8)
            names = {n.info.name for n in candidates}
            self._access[[i for i, n in enumerate(nodes) if n.info.name in names]] = scoring.NOW
            self._open = nodes, candidates
        return self._access

    def _most_likely(self) -> Node:
        """Where the task has the best chance, of the nodes it may go to now."""
        chances = np.where(self._access == scoring.NOW, self._scores["p_on_time"], -1.0)
        return self._scored[int(np.argmax(chances))]

    def _note_dear(self, task_id: str, least: float) -> None:
        """A task is placed where it costs more than its least, which is this share of it."""
        self._dear[task_id] = least
        if len(self._dear) > MAX_DEAR:
            del self._dear[next(iter(self._dear))]

    def _without_a_chance(self, task: Task, candidates: Sequence[Node], cluster: Cluster, now: float) -> Choice:
        """No candidate gives the task a chance as things stand."""
        models, serving = self._node_models, cluster.serving(task.demand)
        for node in candidates:
            if not node.in_flight and not models.proven(node, task.demand, now):
                return Place(node.name)  # find out what it can do
        alone = scoring.best_p_on_time_alone(self._arrays.rows, self._offers, self._task, now)
        if alone < admission.MIN_P_ON_TIME and all(models.proven(n, task.demand, now) for n in serving):
            return Reject(
                f"{task.deadline - now:.1f} s are left, too little for any node even if it had nothing else to do"
            )
        return Wait(admission.review(now, task.deadline - now), hopeless=True)

    # --- explaining

    @override
    def explain(self, task: Task, candidates: Sequence[Node], cluster: Cluster, now: float) -> tuple[Candidate, ...]:
        given = self._offers, self._access, self._task, self._terms, now, self._scores
        count = scoring.explain(self._arrays.rows, *given, self._told)
        single = constraints.single_server_slack(0 if task.node is None else 1)
        return tuple(_candidate(self._scored, ToldRow(*row), single) for row in self._told[:count].tolist())

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
            "dear": self._dear.copy(),
            "usual": self._usual.snapshot(),
        }

    @override
    def restore(self, state: dict[str, Any]) -> None:
        scale, dear, usual = EnergyScale(**state["scale"]), dict(state["dear"]), UsualCosts.restored(state["usual"])
        self._node_models.restore(state["node_models"])
        self._lengths.restore(state["lengths"], state.get("texts", ()))
        self._scale, self._dear, self._usual = scale, dear, usual
        self._arrays = ClusterArrays(self._lengths, usual, self._node_models.estimate)


def _candidate(nodes: Sequence[Node], told: ToldRow, single_server: float) -> Candidate:
    """A score as an explanation gives it."""
    return Candidate(
        nodes[told.offer].info.name,
        told.index if told.feasible else None,
        told.feasible,
        told.finish,
        told.p_on_time,
        told.joules,
        {
            "deadline": told.deadline,
            "compute": told.compute,
            "memory": told.memory,
            "bandwidth": told.bandwidth,
            "one_server": single_server,
        },
        told.confidence,
        scoring.NOTES[told.note],
    )
