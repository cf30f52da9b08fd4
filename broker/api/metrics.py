"""`/metrics`, for Prometheus: tasks and nodes as the ledger has them, and how long requests take here."""

from __future__ import annotations

import time
from collections.abc import Iterator

import structlog
from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Histogram, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from perllm.broker.api.dependencies import TheApi, TheCaller
from perllm.broker.api.openapi.document import answers
from perllm.broker.api.request_limits import METHODS
from perllm.broker.ledger import Ledger
from perllm.broker.messages import Counters, Heartbeat, NodeInfo, State

log = structlog.get_logger(__name__)
router = APIRouter(tags=["Health"])

#: Upper bounds of the request histogram, s: from a submission's to a long task's that is waited for.
BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)

# A label's values come from closed sets: each value that a client or a worker made up would be a series kept for ever.
#: Nodes and methods of measuring energy that have series of their own.
MAX_NODES = 1000
ENERGY_METHODS = frozenset(("nvml", "rapl", "cpu-model", "remote-price", "emulated"))
#: What the ledger counts.
TOTALS = ("submitted", "forgotten", *(str(state) for state in State if state.final))


class LedgerMetrics(Collector):
    """Read from the ledger at every scrape: every API process gives the same. Raises Unreachable."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def collect(self) -> Iterator[Metric]:
        ledger = self._ledger
        held = GaugeMetricFamily("perllm_tasks", "Tasks held, final ones until they are forgotten.", labels=["state"])
        for state, count in ledger.counts().items():
            held.add_metric([state], count)
        ever = CounterMetricFamily("perllm_tasks_ever", "Tasks since the cell began.", labels=["event"])
        totals = ledger.totals()
        for event in TOTALS:
            ever.add_metric([event], totals.get(event, 0))
        leads = GaugeMetricFamily("perllm_scheduler_leads", "1 while a scheduler leads.", value=ledger.led())
        yield from (held, ever, leads)
        yield from _of_nodes(ledger.nodes(), ledger.now())


def _of_nodes(nodes: list[tuple[NodeInfo, Heartbeat | None, bool]], now: float) -> Iterator[Metric]:
    labels = ["node", "tier"]
    slots = GaugeMetricFamily("perllm_node_slots", "Tasks it runs at once.", labels=labels)
    active = GaugeMetricFamily("perllm_node_active", "Tasks it runs now.", labels=labels)
    draining = GaugeMetricFamily("perllm_node_draining", "1 while it takes nothing new.", labels=labels)
    silent = GaugeMetricFamily("perllm_node_silent_seconds", "Since its last heartbeat.", labels=labels)
    tokens = CounterMetricFamily("perllm_node_tokens", "Tokens generated since it started.", labels=labels)
    joules = CounterMetricFamily(
        "perllm_node_energy_joules", "Energy since it started, idle included.", labels=[*labels, "method", "estimated"]
    )
    for info, beat, drains in nodes[:MAX_NODES]:
        of, counters = [info.name, info.tier], beat.counters if beat else Counters()
        slots.add_metric(of, info.slots)
        active.add_metric(of, counters.active)
        draining.add_metric(of, drains)
        if beat:
            silent.add_metric(of, max(0.0, now - beat.at))
        tokens.add_metric(of, counters.generated)
        method = info.power.method if info.power.method in ENERGY_METHODS else "other"
        joules.add_metric([*of, method, str(info.power.estimated).lower()], counters.energy)
    yield from (slots, active, draining, silent, tokens, joules)


class Timer:
    """ASGI middleware: times each request until its answer is whole, and names it in the log: at debug level, or as a
    warning where we have failed."""

    def __init__(self, app: ASGIApp, registry: CollectorRegistry) -> None:
        self._app = app
        labels = ("method", "route", "status")
        about = "Seconds until an answer was whole, by route; streams count to their end."
        self._seconds = Histogram("perllm_api_request_seconds", about, labels, buckets=BUCKETS, registry=registry)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.perf_counter(), 500

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noting)
        finally:
            seconds = time.perf_counter() - began
            route = getattr(scope.get("route"), "path", "none")  # never the path itself: anybody could make up more
            method = scope["method"] if scope["method"] in METHODS else "other"
            self._seconds.labels(method, route, status).observe(seconds)
            say = log.warning if status >= 500 else log.debug
            say("request", method=method, path=scope["path"][:200], status=status, seconds=round(seconds, 4))


_EXAMPLE = 'perllm_tasks{state="pending"} 3.0\nperllm_node_slots{node="edge-1",tier="edge"} 4.0\n'
_PLAIN = {"description": "Done.", "content": {"text/plain": {"schema": {"type": "string"}, "example": _EXAMPLE}}}


@router.get("/metrics", responses={**answers(None, {}), 200: _PLAIN}, response_class=Response)
async def metrics(request: Request, api: TheApi, caller: TheCaller) -> Response:
    """Tasks, nodes and requests for Prometheus. Any key opens it: it tells sums over all tenants, and names none."""
    registry: CollectorRegistry = request.app.state.metrics
    return Response(await api.slow.run(caller.tenant, generate_latest, registry), media_type=CONTENT_TYPE_LATEST)
