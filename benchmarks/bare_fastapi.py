"""What `benchmarks.api` compares with: a FastAPI endpoint that checks the same body and stores nothing."""

from __future__ import annotations

import sys
from uuid import uuid4

import uvicorn
from fastapi import FastAPI

from perllm.broker.api.openapi.schemas import TaskRequest

app = FastAPI()


@app.post("/v1/tasks")
async def submit(task: TaskRequest) -> dict[str, str]:
    """Check and answer."""
    assert task.prompt is not None
    return {"id": str(uuid4()), "object": "task", "state": "pending"}


if __name__ == "__main__":
    uvicorn.run(app, port=int(sys.argv[1]), access_log=False, log_level="warning")
