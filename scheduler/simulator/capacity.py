"""How much work a scenario's nodes can carry, which is what loads are shares of."""

from __future__ import annotations

from perllm.scheduler.simulator.scenario import NodeSpec, Scenario, node_names
from perllm.scheduler.simulator.step_table import StepTable, load_table
from perllm.scheduler.simulator.workload import mean_task


def step_table_of(spec: NodeSpec) -> StepTable:
    """The node's true step times. Raises BadSetting."""
    watts = None
    if spec.idle_watts is not None and spec.active_watts is not None:
        watts = (spec.idle_watts, spec.active_watts)
    return load_table(spec.profile, spec.slots, time=spec.time, power=spec.power, cpu_watts=watts)


def capacity(scenario: Scenario) -> dict[str, float]:
    """Tasks/s each node finishes when every slot is always taken by the scenario's mean task: its prefill, and its
    share of the steps of a full batch. Load 1.0 is the sum."""
    prompt, output, reserve = mean_task(scenario)
    found: dict[str, float] = {}
    for spec in scenario.node:
        table = step_table_of(spec)
        batch = max(1, min(spec.slots, int(spec.kv_tokens / reserve)))
        step = table.decode(batch, batch * (prompt + output / 2))
        prefill = table.prefill(prompt) - table.prefill_seconds[0]
        found |= dict.fromkeys(node_names(spec), 1.0 / (prefill + output * step / batch))
    return found


def least_joules(scenario: Scenario) -> float:
    """J the scenario's mean task costs where it is cheapest, with every slot taken (idle power apart)."""
    prompt, output, reserve = mean_task(scenario)
    found = []
    for spec in scenario.node:
        table = step_table_of(spec)
        batch = max(1, min(spec.slots, int(spec.kv_tokens / reserve)))
        step = table.decode(batch, batch * (prompt + output / 2))
        prefill = table.prefill(prompt) - table.prefill_seconds[0]
        decode = output * step / batch
        watts = table.watts[batch] - table.idle_watts
        found.append(prefill * (table.prefill_watts - table.idle_watts) + decode * watts)
    return min(found)
