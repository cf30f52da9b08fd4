"""Ready-made messages for tests that do not care what is in them."""

from __future__ import annotations

from perllm.broker.messages import Energy, Explanation, NodeInfo, Output, Power, Receipt, StepCost
from perllm.scheduler import examples


def node_info(name: str, boot: str = "boot-1", slots: int = 2) -> NodeInfo:
    return examples.node_info(
        name,
        boot=boot,
        slots=slots,
        models=("emulated",),
        kv_tokens=4096 * slots,
        step_cost=StepCost(step=0.01, sequence=0.001, prefill=0.0001),
        power=Power(idle=1, active=4, method="emulated", estimated=True),
    )


def receipt(node: str, attempt: int = 1, tokens: int = 3) -> Receipt:
    return Receipt(
        node=node,
        model="emulated",
        attempt=attempt,
        completion_tokens=tokens,
        energy=Energy(inference=2.0, idle=0.5, method="emulated", estimated=True),
    )


def output(text: str = "some text") -> Output:
    return Output(text=text, finish_reason="length")


def why(action: str = "dispatch", sentence: str = "because") -> Explanation:
    return Explanation.model_validate({"policy": "test", "action": action, "sentence": sentence})
