"""AGOD: placement by a diffusion model trained with soft actor-critic (one of PerLLM's baselines).

A re-implementation from the public description (Du et al., "Diffusion-based reinforcement learning for edge-enabled
AI-generated content services", IEEE Transactions on Mobile Computing 2024), not the authors' code. The actor denoises a
Gaussian vector in five steps, conditioned on the state, into one logit per node; two critics judge actions, and their
smaller value trains the actor together with an entropy bonus. It learns while it runs, and needs thousands of tasks
to: train it in the simulator first (`perllm.scheduler.simulator.pretraining`).

Needs torch: pip install 'perllm[agod]'.
"""

# torch may be absent where types are checked, and is then Any
# mypy: disable-error-code="import-not-found,misc,no-untyped-call,no-any-return,unused-ignore"

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from typing_extensions import override

from perllm.broker.messages import Completed, Ended, Event, State
from perllm.scheduler.baselines.base import Baseline
from perllm.scheduler.baselines.mean_length import MeanLength
from perllm.scheduler.core.cluster import Cluster, Node, Task
from perllm.scheduler.core.policy import Choice, Place

#: Nodes it can tell apart; further ones are never chosen.
NODES = 8
#: Features of a task and of each node.
TASK_FEATURES, NODE_FEATURES = 4, 6
STATE = TASK_FEATURES + NODES * NODE_FEATURES
#: The feature of a node that says whether it is a candidate.
_CANDIDATE = 0
#: Denoising steps.
STEPS = 5
#: Widths of the hidden layers and of the step's embedding.
_HIDDEN, _TIME = 64, 8
#: Discount, the targets' rate of following the critics, transitions per gradient step and in the replay buffer.
_GAMMA, _TAU, _BATCH, _REPLAY = 0.95, 0.005, 128, 20_000
#: Completions between two gradient steps.
_EVERY = 8
#: What a task's energy over the mean one costs, in units of a task on time.
_ENERGY_WEIGHT = 0.1

Floats = NDArray[np.float32]


class Diffusion(nn.Module):
    """The actor: predicts the noise in x at step t, given the state."""

    def __init__(self) -> None:
        super().__init__()
        self.net = _mlp(STATE + NODES + _TIME, NODES)
        t = torch.arange(1, STEPS + 1, dtype=torch.float32)
        # The variance-preserving schedule between 0.1 and 10
        beta = 1 - torch.exp(-0.1 / STEPS - 0.5 * (10 - 0.1) * (2 * t - 1) / STEPS**2)
        self.beta, self.alpha, self.alpha_bar = beta, 1 - beta, torch.cumprod(1 - beta, 0)

    def forward(self, state: Tensor, noise: Tensor) -> Tensor:
        """Log-probabilities of the nodes, (batch, NODES). `noise` is (STEPS + 1, batch, NODES), standard normal."""
        x = noise[STEPS]
        for i in reversed(range(STEPS)):
            time = _embedding(i + 1).expand(len(state), _TIME)
            predicted = torch.tanh(self.net(torch.cat([state, x, time], dim=1)))
            x = (x - self.beta[i] / torch.sqrt(1 - self.alpha_bar[i]) * predicted) / torch.sqrt(self.alpha[i])
            if i > 0:
                kept = (1 - self.alpha_bar[i - 1]) / (1 - self.alpha_bar[i])
                x = x + torch.sqrt(kept * self.beta[i]) * noise[i]
        candidate = state[:, TASK_FEATURES:].reshape(-1, NODES, NODE_FEATURES)[:, :, _CANDIDATE]
        return torch.log_softmax(x.masked_fill(candidate == 0, -1e9), dim=1)


def _mlp(size: int, out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(size, _HIDDEN), nn.Mish(), nn.Linear(_HIDDEN, _HIDDEN), nn.Mish(), nn.Linear(_HIDDEN, out)
    )


def _embedding(step: int) -> Tensor:
    rates = torch.exp(torch.arange(_TIME // 2) * (-math.log(10_000) / (_TIME // 2)))
    return torch.cat([torch.sin(step * rates), torch.cos(step * rates)])


class Agod(Baseline):
    """Diffusion soft actor-critic, trained in the simulator first (AGOD, Du et al., IEEE TMC 2024).

    It tells at most NODES nodes apart. The reward is 1 for a task on time, less a tenth of its energy over the mean
    one. The snapshot holds the networks and the generator, not the replay buffer.
    """

    name = "agod"

    def __init__(self, seed: int = 0, *, learn: bool = True, entropy: float = 0.02) -> None:
        super().__init__(seed)
        torch.set_num_threads(1)  # the networks are too small for more
        torch.manual_seed(seed)
        self.learn, self.entropy = learn, entropy
        self.actor = Diffusion()
        self.critics = nn.ModuleList([_mlp(STATE, NODES) for _ in range(2)])
        self.targets = nn.ModuleList([_mlp(STATE, NODES) for _ in range(2)])
        self.targets.load_state_dict(self.critics.state_dict())
        self._actor_step = torch.optim.Adam(self.actor.parameters(), lr=1e-4)
        self._critic_step = torch.optim.Adam(self.critics.parameters(), lr=1e-3)
        self.lengths = MeanLength()
        self.mean_energy = 0.0  # J per task, moving
        self.actions: list[str] = []  # action → node, in the order they were first seen
        self.placed: dict[str, list[Any]] = {}  # task id → [state, action, next state]
        self._last: list[Any] | None = None
        self.replay: deque[tuple[Floats, int, float, Floats]] = deque(maxlen=_REPLAY)
        self.completions = 0

    # --- acting

    def state(self, task: Task, candidates: Sequence[Node], now: float) -> Floats:
        """What the networks see: the task, then the node of each action, scaled to about 1."""
        row = np.zeros(STATE, dtype=np.float32)
        row[:TASK_FEATURES] = (
            math.log1p(task.prompt_tokens) / 8,
            math.log1p(task.payload_bytes) / 16,
            min((task.deadline - now) / 6, 4.0),
            self.lengths.tokens(task) / 100,
        )
        for node in candidates:
            if node.name not in self.actions and len(self.actions) < NODES:
                self.actions.append(node.name)
            if node.name in self.actions:
                cost, held = node.info.models[0].calibration, node.taken / node.info.slots
                begin = TASK_FEATURES + self.actions.index(node.name) * NODE_FEATURES
                row[begin : begin + NODE_FEATURES] = (
                    1.0,
                    min(held, 1.0),
                    min(max(held - 1.0, 0.0), 4.0),
                    cost.step * 20,
                    cost.prefill * 500,
                    node.info.bandwidth / 4e7,
                )
        return row

    @override
    def choose(self, task: Task, candidates: Sequence[Node], cluster: Cluster, now: float) -> Choice:
        state = self.state(task, candidates, now)
        if self._last is not None:
            self._last[2] = state
        with torch.no_grad():
            logp = self.actor(torch.from_numpy(state)[None], self._noise(1))[0]
        probabilities = np.exp(logp.numpy().astype(float))
        known = [n for n in candidates if n.name in self.actions]
        if not known:
            return Place(candidates[0].name)
        weights = np.array([probabilities[self.actions.index(n.name)] for n in known])
        node = known[int(self.rng.choice(len(known), p=weights / weights.sum()))].name
        self._last = [state, self.actions.index(node), state]
        self.placed[task.id] = self._last
        return Place(node)

    def _noise(self, batch: int) -> Tensor:
        return torch.from_numpy(self.rng.standard_normal((STEPS + 1, batch, NODES)).astype(np.float32))

    # --- learning

    @override
    def observe(self, event: Event, task: Task | None, cluster: Cluster) -> None:
        self.lengths.observe(event, task)
        if event.type not in ("completed", "ended", "returned"):
            return
        transition = self.placed.pop(event.id, None)
        match event:
            case Completed():
                energy = event.receipt.energy.total
                self.mean_energy += 0.02 * (energy - self.mean_energy) if self.mean_energy else energy
                reward = float(event.on_time) - _ENERGY_WEIGHT * energy / max(self.mean_energy, 1e-9)
            case Ended(state=State.EXPIRED):
                reward = 0.0
            case _:
                return
        if transition is not None and self.learn:
            state, action, after = transition
            self.replay.append((state, action, reward, after))
            self.completions += 1
            if self.completions % _EVERY == 0 and len(self.replay) >= 2 * _BATCH:
                self._gradient_step()

    def _gradient_step(self) -> None:
        picked = [self.replay[int(i)] for i in self.rng.integers(len(self.replay), size=_BATCH)]
        state, after = (torch.from_numpy(np.stack([p[k] for p in picked])) for k in (0, 3))
        action = torch.tensor([[p[1]] for p in picked])
        reward = torch.tensor([p[2] for p in picked])
        with torch.no_grad():
            probabilities = self.actor(after, self._noise(_BATCH)).exp()
            after_value = torch.minimum(self.targets[0](after), self.targets[1](after))
            target_value = reward + _GAMMA * (probabilities * after_value).sum(1)
        losses = [nn.functional.mse_loss(c(state).gather(1, action)[:, 0], target_value) for c in self.critics]
        self._descend(self._critic_step, losses[0] + losses[1])
        logp = self.actor(state, self._noise(_BATCH))
        with torch.no_grad():
            value = torch.minimum(self.critics[0](state), self.critics[1](state))
        probabilities = logp.exp()
        self._descend(self._actor_step, (probabilities * (self.entropy * logp.clamp(min=-20) - value)).sum(1).mean())
        with torch.no_grad():
            for target, source in zip(self.targets.parameters(), self.critics.parameters(), strict=True):
                target.lerp_(source, _TAU)

    @staticmethod
    def _descend(optimiser: torch.optim.Optimizer, loss: Tensor) -> None:
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()

    # --- kept over a restart

    @override
    def snapshot(self) -> dict[str, Any]:
        nets = {"actor": self.actor, "critics": self.critics, "targets": self.targets}
        return {
            **super().snapshot(),
            "nets": {k: {name: p.tolist() for name, p in net.state_dict().items()} for k, net in nets.items()},
            "lengths": self.lengths.snapshot(),
            "mean_energy": self.mean_energy,
            "actions": list(self.actions),
        }

    @override
    def restore(self, state: dict[str, Any]) -> None:
        nets = {
            k: {n: torch.tensor(p, dtype=torch.float32) for n, p in state["nets"][k].items()}
            for k in ("actor", "critics", "targets")
        }
        lengths, mean_energy = MeanLength.restored(state["lengths"]), float(state["mean_energy"])
        actions = list(state["actions"])
        super().restore(state)
        self.actor.load_state_dict(nets["actor"])
        self.critics.load_state_dict(nets["critics"])
        self.targets.load_state_dict(nets["targets"])
        self.lengths, self.mean_energy, self.actions = lengths, mean_energy, actions
