"""A few made-up tasks through a throw-away core, so that whatever is compiled or imported on first use is ready before
a real task waits for it."""

from __future__ import annotations

from perllm.broker.messages import Claimed, Counters, Heartbeat, NodeUp
from perllm.broker.text_features import sketch
from perllm.scheduler.core.scheduler import SchedulerCore
from perllm.scheduler.examples import completed, node_info, submitted

_NODE = "warm-up"
_COUNTERS = Counters(steps=41, busy=0.5, generated=40, prefilled=20, sequence_steps=41, context_steps=1640)


def warm_up(core: SchedulerCore) -> None:
    """Let `core`, which is not used afterwards, see every common event and decide three tasks, one of them hopeless."""
    core.handle(NodeUp(at=0.0, info=node_info(_NODE, slots=2)))
    for name in ("first", "second"):
        core.handle(submitted(name, left=60.0, max_tokens=64, text=sketch(["a prompt"])))
        core.decide(0.1)
        core.handle(Claimed(at=0.2, id=name, node=_NODE, attempt=1))
        core.handle(Heartbeat(at=0.3, node=_NODE, boot=f"{_NODE}.1", counters=Counters(active=1)))
        core.handle(
            completed(name, _NODE, at=0.7, payload_bytes=1000, prompt_tokens=50, completion_tokens=40, after=_COUNTERS)
        )
    core.handle(submitted("late", at=0.8, left=0.1, prompt_tokens=2000, payload_bytes=8000))
    core.decide(0.8)
    core.snapshot()
