"""The application: every router, and the middleware around them."""

from __future__ import annotations

import gc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware
from prometheus_client import CollectorRegistry

from perllm.broker.api import errors, metrics
from perllm.broker.api.openapi import document
from perllm.broker.api.request_ids import RequestIds
from perllm.broker.api.request_limits import RequestLimits
from perllm.broker.api.routes import (
    batches,
    completions,
    embeddings,
    files,
    health,
    models,
    nodes,
    pages,
    responses,
    tasks,
    webhooks,
)
from perllm.broker.api.settings import ApiSettings
from perllm.broker.api.state import Api
from perllm.broker.api.stopping import RefuseWhileStopping, Stopping
from perllm.broker.api.time_limit import TimeLimit

_ABOUT = """\
The OpenAI API over PerLLM's queue: submit and wait, stream, or submit and forget. Give `deadline`, `value` and
`service` as fields of a body, or as headers; every answer carries its energy and the node that made it."""


def make_app(settings: ApiSettings) -> FastAPI:
    """The ASGI application for these settings."""
    registry = CollectorRegistry(auto_describe=False)
    stopping = Stopping(settings.grace)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.api = Api(settings, stopping)
        app.state.metrics = registry
        registry.register(metrics.SystemMetrics(app.state.api.client.looks, app.state.api.webhooks))
        app.state.api.start()
        gc.collect()
        gc.freeze()  # what exists now stays: collections that look through it would stop all requests for 50 ms
        yield
        await app.state.api.close()

    app = FastAPI(
        title="PerLLM",
        version=version("perllm"),
        description=_ABOUT,
        lifespan=lifespan,
        docs_url=None,  # these two are in routes/pages.py
        redoc_url=None,
        separate_input_output_schemas=False,
    )
    app.state.stopping = stopping
    errors.install(app)
    routers = (
        completions.router,
        embeddings.router,
        responses.router,
        tasks.router,
        files.router,
        batches.router,
        webhooks.router,
        nodes.router,
        models.router,
        health.router,
        metrics.router,
        pages.router,
    )
    for router in routers:  # not included: each inclusion would be searched for every request, and twice
        app.router.routes += router.routes
    document.install(app, routers)
    app.add_middleware(TimeLimit)
    app.add_middleware(RequestLimits, settings=settings)
    app.add_middleware(RefuseWhileStopping, stopping=stopping)
    if settings.api_cors:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.api_cors,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["x-request-id"],
            max_age=600,
        )
    app.add_middleware(metrics.Timer, registry=registry)
    app.add_middleware(RequestIds)
    return app
