"""`/metrics`, for Prometheus: what the scheduler has counted, the server and the nodes as they are, and how long
requests take here."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import accumulate

import structlog
from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Histogram, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from perllm.broker.api.dependencies import TheApi, TheCaller
from perllm.broker.api.openapi.document import answers
from perllm.broker.api.request_limits import METHODS
from perllm.broker.api.webhooks.store import Webhooks
from perllm.broker.ledger import Gone, Ledger
from perllm.broker.messages import Counters, Heartbeat, NodeInfo, State
from perllm.broker.metrics import ENERGY_METHODS, FAMILIES, OTHER, OWN, Family, Labels, Sums, Value

log = structlog.get_logger(__name__)
router = APIRouter(tags=["Health"])

#: Nodes that have series of their own.
MAX_NODES = 1000
#: What the ledger counts.
TOTALS = ("submitted", "forgotten", *(str(state) for state in State if state.final))


class _Page:
    """Samples of families, in the order they are added."""

    def __init__(self) -> None:
        self._metrics: dict[str, Metric] = {}

    def add(self, name: str, value: Value, *labels: str) -> None:
        """A sample of the family of this name."""
        family = FAMILIES[name]
        metric = self._metrics.get(name)
        if metric is None:
            metric = self._metrics[name] = _empty(family)
        if isinstance(metric, HistogramMetricFamily):
            assert isinstance(value, list)
            counts = accumulate(value[1:])
            bounds = (*map(str, family.buckets), "+Inf")
            metric.add_metric(labels, list(zip(bounds, counts, strict=True)), value[0])
        elif isinstance(metric, CounterMetricFamily | GaugeMetricFamily):
            assert not isinstance(value, list)
            metric.add_metric(labels, value)

    def __iter__(self) -> Iterator[Metric]:
        return iter(self._metrics.values())


def _empty(family: Family) -> Metric:
    kinds: dict[str, type[Metric]] = {
        "counter": CounterMetricFamily,
        "gauge": GaugeMetricFamily,
        "histogram": HistogramMetricFamily,
    }
    return kinds[family.kind](family.name, family.about, labels=family.labels)  # type: ignore[call-arg]


class SystemMetrics(Collector):
    """Everything, read anew at every scrape: every API process gives the same. Raises Unreachable."""

    def __init__(self, ledger: Ledger, webhooks: Webhooks) -> None:
        self._ledger, self._webhooks = ledger, webhooks

    def collect(self) -> Iterator[Metric]:
        ledger, page = self._ledger, _Page()
        now = ledger.now()
        _add_sums(page, ledger, now)
        for state, count in ledger.counts().items():
            page.add("perllm_tasks", count, state)
        totals = ledger.totals()
        for event in TOTALS:
            page.add("perllm_tasks_ever", totals.get(event, 0), event)
        leader = ledger.leader()
        page.add("perllm_scheduler_leads", leader is not None)
        if leader is not None and leader.since:
            page.add("perllm_scheduler_led_seconds", max(0.0, now - leader.since))
        used, limit = ledger.server_memory()
        page.add("perllm_server_memory_bytes", used)
        page.add("perllm_server_memory_limit_bytes", limit)
        for outcome, count in self._webhooks.attempts().items():
            page.add("perllm_webhook_attempts", count, outcome)
        page.add("perllm_webhook_dropped", self._webhooks.dropped_ever())
        nodes = ledger.nodes()
        _add_nodes(page, nodes, ledger.gone(), now)
        distrusted = ledger.distrusted([info.name for info, _, _ in nodes[:MAX_NODES]])
        for info, _, _ in nodes[:MAX_NODES]:
            page.add("perllm_node_distrusted", info.name in distrusted, info.name, info.tier)
        yield from page


class TenantMetrics(Collector):
    """A tenant's own rows of what the scheduler has counted. Raises Unreachable."""

    def __init__(self, ledger: Ledger, tenant: str) -> None:
        self._ledger, self._tenant = ledger, tenant

    def collect(self) -> Iterator[Metric]:
        page = _Page()
        if self._tenant != OTHER:  # the name of all beyond the bound
            _add_sums(page, self._ledger, self._ledger.now(), self._tenant)
        yield from page


def _add_sums(page: _Page, ledger: Ledger, now: float, tenant: str | None = None) -> None:
    """What the scheduler has counted: all, or a tenant's."""
    data = ledger.metrics()
    if not data:
        return
    for family, labels, value in Sums.parse(data.get("sums")).rows():
        if tenant is None or _is_of(tenant, family, labels):
            page.add(family.name, value, *labels)
    at = data.get("at")
    if tenant is None and isinstance(at, int | float):
        page.add("perllm_scheduler_snapshot_age_seconds", max(0.0, now - at))


def _is_of(tenant: str, family: Family, labels: Labels) -> bool:
    return family.labels[:1] == ("tenant",) and labels[0] == tenant


def _add_nodes(page: _Page, nodes: list[tuple[NodeInfo, Heartbeat | None, bool]], gone: list[Gone], now: float) -> None:
    for info, beat, drains in nodes[:MAX_NODES]:
        of, counters = (info.name, info.tier), beat.counters if beat else Counters()
        page.add("perllm_node_up", 1, *of)
        page.add("perllm_node_slots", info.slots, *of)
        page.add("perllm_node_active", counters.active, *of)
        page.add("perllm_node_waiting", counters.waiting, *of)
        page.add("perllm_node_draining", drains, *of)
        page.add("perllm_node_tokens", counters.generated, *of)
        method = info.power.method if info.power.method in ENERGY_METHODS else OTHER
        page.add("perllm_node_energy_joules", counters.energy, *of, method, str(info.power.estimated).lower())
        if beat:
            page.add("perllm_node_silent_seconds", max(0.0, now - beat.at), *of)
            most = sum(offer.kv_tokens for offer in info.models)
            page.add("perllm_node_kv_cache_usage_ratio", min(max(1 - counters.free_kv / most, 0.0), 1.0), *of)
    for info, at, left in gone[:MAX_NODES]:
        if not left:
            page.add("perllm_node_up", 0, info.name, info.tier)
            page.add("perllm_node_silent_seconds", max(0.0, now - at), info.name, info.tier)


class Timer:
    """ASGI middleware: times each request until its answer is whole, and names it in the log: at debug level, or as a
    warning where we have failed."""

    def __init__(self, app: ASGIApp, registry: CollectorRegistry) -> None:
        self._app = app
        (family,) = OWN
        self._seconds = Histogram(family.name, family.about, family.labels, buckets=family.buckets, registry=registry)

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
    """For Prometheus: everything with an operator's key (`perllm api keys make --operator`), a tenant's own sums with
    any other. Where no key is needed, everything."""
    registry: CollectorRegistry = request.app.state.metrics
    if not caller.operator:
        registry = CollectorRegistry(auto_describe=False)
        registry.register(TenantMetrics(api.client.looks, caller.tenant))
    return Response(await api.slow.run(caller.tenant, generate_latest, registry), media_type=CONTENT_TYPE_LATEST)
