"""Examples for the OpenAPI document."""

from __future__ import annotations

from typing import Any

TASK_ID = "0b8f3a52-5a53-4d0e-9a1c-3d6f8f0f4c11"
MODEL = "smollm2-135m-instruct"
ENERGY = {"transfer": 0.0, "inference": 3.2, "idle": 1.1, "method": "cpu-model", "estimated": True, "total": 4.3}
RECEIPT = {"energy": ENERGY, "node": "e1", "on_time": True, "latency": 0.84}
USAGE = {
    "prompt_tokens": 36,
    "completion_tokens": 12,
    "total_tokens": 48,
    "prompt_tokens_details": {"cached_tokens": 32},
    "completion_tokens_details": {"reasoning_tokens": 0},
}
TEXT = "Because air scatters blue light the most."

CHAT_REQUEST = {
    "model": MODEL,
    "messages": [{"role": "user", "content": "Why is the sky blue?"}],
    "max_tokens": 64,
    "deadline": 20,
}
WEATHER = {
    "name": "get_weather",
    "description": "The weather of a place, now.",
    "parameters": {
        "type": "object",
        "properties": {"place": {"type": "string"}},
        "required": ["place"],
        "additionalProperties": False,
    },
    "strict": True,
}
TOOLS_REQUEST = {
    "model": MODEL,
    "messages": [{"role": "user", "content": "What is the weather in Rome?"}],
    "tools": [{"type": "function", "function": WEATHER}],
    "tool_choice": "required",
}
CHAT = {
    "id": TASK_ID,
    "object": "chat.completion",
    "created": 1795161600,
    "model": MODEL,
    "choices": [
        {
            "index": 0,
            "finish_reason": "stop",
            "message": {"role": "assistant", "content": TEXT, "refusal": None, "annotations": []},
            "logprobs": None,
        }
    ],
    "usage": USAGE,
    **RECEIPT,
}
CHAT_STREAM = (
    'data: {"object":"chat.completion.chunk","choices":[{"index":0,"delta":{"content":"Because"}}]}\n\ndata: [DONE]\n\n'
)
COMPLETION_REQUEST = {"model": MODEL, "prompt": "Why is the sky blue?", "max_tokens": 64}
COMPLETIONS_REQUEST = {"model": MODEL, "prompt": ["Why is the sky blue?", "And the sea?"], "max_tokens": 64, "n": 2}
COMPLETION = {
    **CHAT,
    "object": "text_completion",
    "choices": [{"index": 0, "finish_reason": "stop", "text": TEXT, "logprobs": None}],
}
COMPLETION_STREAM = 'data: {"object":"text_completion","choices":[{"index":0,"text":"Because"}]}\n\ndata: [DONE]\n\n'
EMBEDDINGS_REQUEST = {"model": "auto", "input": ["Why is the sky blue?", "And the sea?"], "dimensions": 3}
EMBEDDINGS: dict[str, Any] = {
    "id": TASK_ID,
    "object": "list",
    "model": "all-minilm-l6-v2:q8_0",
    "data": [
        {"object": "embedding", "index": 0, "embedding": [0.6, 0.0, -0.8]},
        {"object": "embedding", "index": 1, "embedding": [0.8, 0.0, -0.6]},
    ],
    "usage": {"prompt_tokens": 14, "total_tokens": 14},
    **RECEIPT,
}
RERANK_REQUEST = {"query": "Why is the sky blue?", "documents": ["The sea is salt.", TEXT], "top_n": 1}
RERANKING: dict[str, Any] = {
    "id": TASK_ID,
    "object": "list",
    "model": "bge-reranker-v2-m3:q8_0",
    "results": [{"index": 1, "relevance_score": 4.1, "document": {"text": TEXT}}],
    "usage": {"prompt_tokens": 31, "total_tokens": 31},
    **RECEIPT,
}
RESPONSE_REQUEST = {"model": MODEL, "input": "Why is the sky blue?", "max_output_tokens": 64}
BACKGROUND_REQUEST = {**RESPONSE_REQUEST, "background": True, "deadline": "2026-12-01T06:00:00Z"}
CALLING_REQUEST = {
    "model": MODEL,
    "input": [
        {"role": "user", "content": "What is the weather in Rome?"},
        {"type": "function_call", "call_id": "call_1", "name": "get_weather", "arguments": '{"place": "Rome"}'},
        {"type": "function_call_output", "call_id": "call_1", "output": "21 °C, sunny"},
    ],
    "tools": [{"type": "function", **WEATHER}],
}
INPUT_ITEM = {
    "type": "message",
    "id": f"msg_{TASK_ID}-in-0",
    "status": "completed",
    "role": "user",
    "content": [{"type": "input_text", "text": "Why is the sky blue?"}],
}
RESPONSE: dict[str, Any] = {
    "id": TASK_ID,
    "object": "response",
    "created_at": 1795161600,
    "completed_at": 1795161601,
    "status": "completed",
    "background": True,
    "model": MODEL,
    "instructions": None,
    "max_output_tokens": 64,
    "metadata": {},
    "previous_response_id": None,
    "reasoning": {"effort": None, "summary": None},
    "temperature": 0.0,
    "top_logprobs": 0,
    "top_p": 1.0,
    "text": {"format": {"type": "text"}, "verbosity": "medium"},
    "tools": [],
    "tool_choice": "auto",
    "parallel_tool_calls": True,
    "truncation": "disabled",
    "output": [
        {
            "type": "message",
            "id": f"msg_{TASK_ID}",
            "status": "completed",
            "role": "assistant",
            "content": [{"type": "output_text", "text": TEXT, "annotations": [], "logprobs": []}],
        }
    ],
    "error": None,
    "incomplete_details": None,
    "usage": {
        "input_tokens": 36,
        "input_tokens_details": {"cached_tokens": 32, "cache_write_tokens": 0},
        "output_tokens": 12,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 48,
    },
    **RECEIPT,
}
RESPONSE_STREAM = (
    "event: response.output_text.delta\n"
    'data: {"type":"response.output_text.delta","sequence_number":4,"delta":"Because"}\n\n'
)
CAPABILITIES = ["chat", "generate", "grammar", "json_schema", "logprobs"]
MODEL_OBJECT = {
    "id": MODEL,
    "object": "model",
    "created": 0,
    "owned_by": "perllm",
    "context": 2048,
    "capabilities": CAPABILITIES,
    "nodes": ["e1", "e2"],
}
TASK_REQUEST = {"prompt": "Why is the sky blue?", "max_tokens": 64, "deadline": 20, "value": 1.0}
SUBMITTED = {"id": TASK_ID, "object": "task", "state": "pending", "repeated": False}
TASK: dict[str, Any] = {
    "id": TASK_ID,
    "object": "task",
    "state": "pending",
    "submitted": 1795161600.0,
    "deadline": 1795161620.0,
    "node": None,
    "model": None,
    "attempt": 0,
    "strikes": 0,
    "service": "default",
    "value": 1.0,
    "metadata": {},
    "prompt": "Why is the sky blue?",
    "result": None,
}
NODE = {
    "name": "e1",
    "tier": "edge",
    "engine": "llama.cpp 0.3.36, smollm2-135m-instruct, 1 thread",
    "slots": 8,
    "active": 2,
    "waiting": 0,
    "generated": 48211,
    "energy": {"joules": 5310.4, "method": "cpu-model", "estimated": True},
    "draining": False,
    "state": "up",
    "distrusted": None,
    "models": [MODEL],
    "capabilities": {MODEL: CAPABILITIES},
}
EXPLANATION = {
    "id": TASK_ID,
    "object": "explanation",
    "decided": True,
    "policy": "cs-ucb",
    "action": "dispatch",
    "sentence": "e1 has the highest index of the nodes that can be on time.",
    "node": "e1",
    "candidates": [
        {
            "node": "e1",
            "index": 1.4,
            "feasible": True,
            "finish": 0.9,
            "p_on_time": 0.99,
            "marginal_energy": 3.1,
            "slacks": {"deadline": 0.95},
            "confidence": 0.2,
            "note": "",
        }
    ],
    "length": {
        "median": 48.0,
        "most": 130.0,
        "source": "text",
        "because": [{"code": 1742, "factor": 0.7, "words": "in one sentence"}],
    },
}
FILE = {
    "id": "file-3f2a",
    "object": "file",
    "bytes": 10240,
    "created_at": 1795161600,
    "expires_at": 1797753600,
    "filename": "nightly.jsonl",
    "purpose": "batch",
    "status": "processed",
    "status_details": None,
}
DELETED = {"id": "file-3f2a", "object": "file", "deleted": True}
BATCH_REQUEST = {"input_file_id": "file-3f2a", "endpoint": "/v1/chat/completions", "completion_window": "24h"}
BATCH: dict[str, Any] = {
    "id": "batch_71c0",
    "object": "batch",
    **BATCH_REQUEST,
    "status": "in_progress",
    "created_at": 1795161600,
    "in_progress_at": 1795161601,
    "expires_at": 1795248000,
    "finalizing_at": None,
    "completed_at": None,
    "failed_at": None,
    "expired_at": None,
    "cancelling_at": None,
    "cancelled_at": None,
    "request_counts": {"total": 100, "completed": 42, "failed": 1},
    "output_file_id": None,
    "error_file_id": None,
    "errors": None,
    "metadata": None,
}
WEBHOOK_REQUEST = {"url": "https://example.com/hooks/perllm", "events": ["task.succeeded", "batch.completed"]}
WEBHOOK = {
    "id": "wh_9d1e",
    "object": "webhook",
    **WEBHOOK_REQUEST,
    "created_at": 1795161600,
    "health": "closed",
    "reason": None,
    "next_probe": None,
    "dropped": 0,
}
DELIVERY: dict[str, Any] = {
    "id": "dlv_52aa",
    "object": "webhook.delivery",
    "event": "task.succeeded",
    "event_id": "evt_1",
    "state": "delivered",
    "attempts": [{"at": 1795161601.0, "status": 204, "error": None, "took": 0.08}],
    "next_attempt": None,
}


def whole_list(item: dict[str, Any]) -> dict[str, Any]:
    """A list with this one item."""
    return {"object": "list", "data": [item]}


def page(item: dict[str, Any]) -> dict[str, Any]:
    """A page of a list with this one item."""
    return {
        **whole_list(item),
        "has_more": False,
        "first_id": item.get("id"),
        "last_id": item.get("id"),
    }
