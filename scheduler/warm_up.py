"""One made-up task through a throw-away core, so that whatever is compiled or imported on first use is ready before a
real task waits for it."""

from __future__ import annotations

from perllm.broker.messages import (
    Claimed,
    Completed,
    Counters,
    Energy,
    Heartbeat,
    ModelOffer,
    NodeInfo,
    NodeUp,
    Power,
    Receipt,
    State,
    StepCost,
    Submitted,
)
from perllm.scheduler.core.scheduler import SchedulerCore

_INFO = NodeInfo(
    name="rehearsal",
    tier="edge",
    boot="rehearsal",
    slots=2,
    models=(
        ModelOffer(
            name="model",
            context=4096,
            kv_tokens=8192,
            calibration=StepCost(step=0.01, sequence=0.001, prefill=0.0001, context=1e-7),
        ),
    ),
    power=Power(idle=1.0, active=4.0, method="emulated", estimated=True),
    bandwidth=1e7,
    engine="none",
)
_RECEIPT = Receipt(
    node="rehearsal",
    model="model",
    attempt=1,
    payload_bytes=100,
    transfer=0.001,
    prefill=0.1,
    decode=0.4,
    prompt_tokens=20,
    completion_tokens=40,
    energy=Energy(inference=2.0, idle=0.5, method="emulated", estimated=True),
    after=Counters(steps=41, busy=0.5, generated=40, prefilled=20, sequence_steps=41, context_steps=1640),
)


def warm_up(core: SchedulerCore) -> None:
    """Let `core`, which is not used afterwards, see every common event and decide three tasks, one of them hopeless."""
    core.handle(NodeUp(at=0.0, info=_INFO))
    for name in ("first", "second"):
        core.handle(Submitted(at=0.0, id=name, deadline=60.0, prompt_tokens=20, payload_bytes=100, max_tokens=64))
        core.decide(0.1)
        core.handle(Claimed(at=0.2, id=name, node="rehearsal", attempt=1))
        core.handle(Heartbeat(at=0.3, node="rehearsal", boot="rehearsal", counters=Counters(active=1)))
        core.handle(
            Completed(
                at=0.7,
                id=name,
                node="rehearsal",
                attempt=1,
                state=State.SUCCEEDED,
                on_time=True,
                latency=0.7,
                queued=0.2,
                receipt=_RECEIPT,
            )
        )
    core.handle(Submitted(at=0.8, id="late", deadline=0.9, prompt_tokens=2000, payload_bytes=8000, max_tokens=64))
    core.decide(0.8)
    core.snapshot()
