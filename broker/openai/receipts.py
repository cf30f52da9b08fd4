"""What every answer says beside itself: tokens as OpenAI counts them, and our receipt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from perllm.broker.messages import Choice, Result


def usage(results: Sequence[Result]) -> dict[str, Any]:
    """The tokens of one request's tasks, as the completion endpoints name them."""
    receipts = [result.receipt for result in results if result.receipt is not None]
    prompt = sum(receipt.prompt_tokens for receipt in receipts)
    completion = sum(receipt.completion_tokens for receipt in receipts)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(receipt.cached_tokens for receipt in receipts)},
        "completion_tokens_details": {"reasoning_tokens": sum(receipt.reasoning_tokens for receipt in receipts)},
    }


def receipt_fields(result: Result) -> dict[str, Any]:
    """Our additions to every answer."""
    receipt = result.receipt
    if receipt is None:
        return {"energy": None, "node": None, "on_time": result.on_time, "latency": result.latency}
    energy = receipt.energy
    return {
        "energy": {**energy.model_dump(), "total": energy.total},
        "node": receipt.node,
        "on_time": result.on_time,
        "latency": result.latency,
    }


def receipts_fields(results: Sequence[Result]) -> dict[str, Any]:
    """The same of a request of several tasks: their energy together, the node if it was one, the last one's time."""
    if len(results) == 1:
        return receipt_fields(results[0])
    energies = [result.receipt.energy for result in results if result.receipt is not None]
    methods, nodes = {e.method for e in energies}, {r.receipt.node for r in results if r.receipt is not None}
    stages = {stage: sum(getattr(e, stage) for e in energies) for stage in ("transfer", "inference", "idle", "total")}
    return {
        "energy": {
            **stages,
            "method": methods.pop() if len(methods) == 1 else "several",
            "estimated": any(e.estimated for e in energies),
        },
        "node": nodes.pop() if len(nodes) == 1 else None,
        "on_time": all(result.on_time for result in results),
        "latency": max(result.latency for result in results),
    }


def finish_reason(choice: Choice) -> str:
    """Why an answer ended, in OpenAI's words."""
    return "length" if choice.finish_reason in ("deadline", "cancelled") else choice.finish_reason
