"""What is measured, by name: the families of `/metrics`, and the sums the scheduler keeps of them.

Names and histograms follow vLLM's metrics and OpenTelemetry's conventions for generative AI where those have the thing
(docs/metrics.md). The leading scheduler keeps the families of `KEPT` and writes them down as JSON (`Sums.dump`); the
HTTP API reads that, and adds those of `READ` from the ledger and of `OWN` from its own process, at every scrape. So any
number of API processes tell the same, and nothing is counted twice.

A label's values come from closed sets or bounded ones: what a client makes up becomes "other" (`OTHER`).
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, NamedTuple

#: What a label says of all beyond its bound.
OTHER = "other"
#: Ways of measuring energy that are told apart.
ENERGY_METHODS = frozenset(("nvml", "rapl", "cpu-model", "remote-price", "emulated"))

Kind = Literal["counter", "gauge", "histogram"]
Labels = tuple[str, ...]


class Family(NamedTuple):
    """One metric. Without the `_total` of a counter, as Prometheus's libraries have it."""

    name: str
    kind: Kind
    labels: Labels
    about: str
    buckets: tuple[float, ...] = ()  # of a histogram: upper bounds

    @property
    def samples(self) -> tuple[str, ...]:
        """The names its samples have."""
        if self.kind == "counter":
            return (f"{self.name}_total",)
        return tuple(f"{self.name}_{part}" for part in ("bucket", "sum", "count")) if self.buckets else (self.name,)


# Whose task it is: the first three labels of whatever a tenant may see of its own.
_OF_TASK = ("tenant", "service", "model")
_OF_ARM = ("node", "model")
_OF_NODE = ("node", "tier")

_LONG = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0, 3600.0)
_LEFT = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0, 3600.0, 86_400.0)
_FIRST_TOKEN = (0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
_PER_TOKEN = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5)
_REQUEST = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)

#: Kept by the leading scheduler.
KEPT = (
    Family("perllm_requests", "counter", (*_OF_TASK, "state", "on_time"), "Tasks that ended, by their final state."),
    Family(
        "perllm_time_to_deadline_at_dispatch_seconds",
        "histogram",
        _OF_TASK,
        "Seconds left to the deadline when a task was sent to a node.",
        _LEFT,
    ),
    Family(
        "perllm_time_to_deadline_at_end_seconds",
        "histogram",
        _OF_TASK,
        "Seconds left to the deadline when a task ended before it.",
        _LEFT,
    ),
    Family("perllm_lateness_seconds", "histogram", _OF_TASK, "Seconds a task ended after its deadline.", _LEFT),
    Family(
        "perllm_request_queue_time_seconds",
        "histogram",
        _OF_TASK,
        "Seconds from the time a task might start until a node took it up.",
        _LONG,
    ),
    Family(
        "perllm_time_to_first_token_seconds",
        "histogram",
        _OF_TASK,
        "Seconds from then to the first token, of tasks that succeeded.",
        _FIRST_TOKEN,
    ),
    Family(
        "perllm_time_per_output_token_seconds",
        "histogram",
        _OF_TASK,
        "Seconds per token after the first, of tasks that succeeded.",
        _PER_TOKEN,
    ),
    Family(
        "perllm_e2e_request_latency_seconds",
        "histogram",
        _OF_TASK,
        "Seconds from the time a task might start to its end, of tasks that succeeded.",
        _LONG,
    ),
    Family("perllm_prompt_tokens", "counter", _OF_TASK, "Tokens of prompts, of attempts with a receipt."),
    Family("perllm_generation_tokens", "counter", _OF_TASK, "Tokens generated, of attempts with a receipt."),
    Family("perllm_energy_joules", "counter", (*_OF_TASK, "stage"), "Joules by receipts, and of what."),
    Family("perllm_backlog", "gauge", _OF_TASK, "Tasks that wait for a node and might start."),
    Family("perllm_backlog_oldest_seconds", "gauge", _OF_TASK, "Seconds the longest waiting of them has waited."),
    Family("perllm_arm_pulls", "counter", _OF_ARM, "Tasks sent to this model on this node."),
    Family("perllm_arm_prompt_tokens", "counter", _OF_ARM, "Tokens of prompts, by receipts."),
    Family("perllm_arm_generation_tokens", "counter", _OF_ARM, "Tokens generated, by receipts."),
    Family("perllm_arm_energy_joules", "counter", _OF_ARM, "Joules by receipts, share of idle included."),
    Family("perllm_prefix_cache_queries", "counter", _OF_ARM, "Tokens of prompts looked up in the prefix cache."),
    Family("perllm_prefix_cache_hits", "counter", _OF_ARM, "Those of them that were there."),
    Family("perllm_arm_samples", "gauge", _OF_ARM, "Measurements the learned speed rests on; they fade."),
    Family(
        "perllm_arm_token_seconds",
        "gauge",
        (*_OF_ARM, "bound"),
        "Learned seconds of a step with one sequence: mean, and lower and upper confidence bound.",
    ),
    Family("perllm_arm_prefill_token_seconds", "gauge", _OF_ARM, "Learned seconds per token of a prompt."),
    Family(
        "perllm_node_bandwidth_bytes_per_second",
        "gauge",
        ("node", "source"),
        "Bandwidth of the link to a node: registered, and learned.",
    ),
    Family("perllm_node_link_latency_seconds", "gauge", ("node",), "Learned seconds of a transfer beside its bytes."),
    Family("perllm_node_dispatch_delay_seconds", "gauge", ("node",), "Learned seconds from dispatch to claim."),
    Family("perllm_node_slot_price", "gauge", ("node",), "Price of a slot of it, on-time value per second."),
    Family("perllm_receipts", "counter", ("node", "method", "estimated"), "Receipts by how their energy was measured."),
    Family("perllm_attempts_replaced", "counter", ("node", "cause"), "Attempts that ended without a result, by cause."),
    Family("perllm_decisions", "counter", ("action", "reason"), "Decisions about tasks, waiting included."),
    Family("perllm_scheduler_info", "gauge", ("policy",), "1 for the policy that leads."),
    Family("perllm_scheduler_takeovers", "counter", (), "How often a scheduler began to lead."),
    Family("perllm_stream_lag_seconds", "gauge", (), "Age of the oldest event read, the worst since last told."),
    Family("perllm_sweeps", "counter", (), "Sweeps of what time has broken."),
    Family("perllm_sweep_mended", "counter", (), "Things they mended."),
    Family("perllm_sweep_seconds", "gauge", (), "Seconds a sweep took, the worst since last told."),
    Family("perllm_accounting_seconds", "counter", (), "Seconds the scheduler spent on these metrics."),
)
#: Read from the server at every scrape.
READ = (
    Family("perllm_tasks", "gauge", ("state",), "Tasks held, final ones until they are forgotten."),
    Family("perllm_tasks_ever", "counter", ("event",), "Tasks since the cell began."),
    Family("perllm_scheduler_leads", "gauge", (), "1 while a scheduler leads."),
    Family("perllm_scheduler_led_seconds", "gauge", (), "Since this leader asked to lead."),
    Family("perllm_scheduler_snapshot_age_seconds", "gauge", (), "Since the leader last saved what it learned."),
    Family("perllm_server_memory_bytes", "gauge", (), "Memory the Redis server's data takes."),
    Family("perllm_server_memory_limit_bytes", "gauge", (), "Memory it may take; 0: no limit."),
    Family("perllm_webhook_attempts", "counter", ("outcome",), "Posts to webhooks: delivered, failed, given_up."),
    Family("perllm_webhook_dropped", "counter", (), "Events that became no delivery, since too many were pending."),
    Family("perllm_node_up", "gauge", _OF_NODE, "1 while it beats, 0 once it died; one that left is not told of."),
    Family("perllm_node_slots", "gauge", _OF_NODE, "Tasks it runs at once."),
    Family("perllm_node_active", "gauge", _OF_NODE, "Tasks it runs now."),
    Family("perllm_node_waiting", "gauge", _OF_NODE, "Tasks it has taken up that wait for its engine."),
    Family("perllm_node_draining", "gauge", _OF_NODE, "1 while it takes nothing new."),
    Family("perllm_node_distrusted", "gauge", _OF_NODE, "1 while it is sent little, since it took up nothing."),
    Family("perllm_node_silent_seconds", "gauge", _OF_NODE, "Since its last heartbeat, or since it died."),
    Family("perllm_node_kv_cache_usage_ratio", "gauge", _OF_NODE, "Used part of its KV cache."),
    Family("perllm_node_tokens", "counter", _OF_NODE, "Tokens generated since it started."),
    Family(
        "perllm_node_energy_joules",
        "counter",
        (*_OF_NODE, "method", "estimated"),
        "Energy since it started, idle included.",
    ),
)
#: Each API process's own.
OWN = (
    Family(
        "perllm_api_request_seconds",
        "histogram",
        ("method", "route", "status"),
        "Seconds until an answer was whole, by route; streams count to their end.",
        _REQUEST,
    ),
)
FAMILIES = {family.name: family for family in (*KEPT, *READ, *OWN)}

#: A row's value: a number, or a histogram's sum and its counts, one per bucket and one beyond.
Value = float | list[float]


class Sums:
    """The values of families by labels, kept in memory and written down whole."""

    def __init__(self) -> None:
        self._rows: dict[str, dict[Labels, Value]] = {family.name: {} for family in KEPT}

    def add(self, name: str, labels: Labels = (), value: float = 1.0) -> None:
        """Count."""
        rows = self._rows[name]
        rows[labels] = rows.get(labels, 0.0) + value  # type: ignore[operator]

    def set(self, name: str, labels: Labels, value: float) -> None:
        """Note."""
        self._rows[name][labels] = value

    def observe(self, name: str, labels: Labels, value: float) -> None:
        """One more value of a histogram."""
        buckets = FAMILIES[name].buckets
        row = self._rows[name].get(labels)
        if row is None:
            row = self._rows[name][labels] = [0.0] * (len(buckets) + 2)
        assert isinstance(row, list)
        row[0] += value
        row[1 + bisect_left(buckets, value)] += 1

    def clear(self, name: str) -> None:
        """Forget a family's values, to note them anew."""
        self._rows[name].clear()

    def keep(self, keep: Callable[[Family, Labels], bool]) -> None:
        """Forget the rows of which `keep` says no."""
        for name, rows in self._rows.items():
            family = FAMILIES[name]
            for labels in [labels for labels in rows if not keep(family, labels)]:
                del rows[labels]

    def rows(self) -> Iterator[tuple[Family, Labels, Value]]:
        """Everything."""
        for name, rows in self._rows.items():
            for labels, value in rows.items():
                yield FAMILIES[name], labels, value

    def dump(self) -> dict[str, Any]:
        """As JSON-able data."""
        return {name: [[*labels, value] for labels, value in rows.items()] for name, rows in self._rows.items() if rows}

    @classmethod
    def parse(cls, data: Any) -> Sums:
        """What `dump` returned. What is not as this release has it is left out: another wrote it."""
        sums = cls()
        if not isinstance(data, dict):
            return sums
        for family in KEPT:
            for row in _rows_of(data.get(family.name)):
                if (value := _value(family, row)) is not None:
                    sums._rows[family.name][tuple(row[:-1])] = value
        return sums


def _rows_of(given: Any) -> Iterable[list[Any]]:
    return (row for row in given if isinstance(row, list)) if isinstance(given, list) else ()


def _value(family: Family, row: list[Any]) -> Value | None:
    *labels, value = row or [None]
    if len(labels) != len(family.labels) or not all(isinstance(label, str) for label in labels):
        return None
    if family.kind != "histogram":
        return value if _number(value) else None
    whole = isinstance(value, list) and len(value) == len(family.buckets) + 2 and all(map(_number, value))
    return value if whole else None


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def markdown() -> str:
    """All of it as a table, for docs/metrics.md."""
    lines = []
    for title, families in (
        ("Kept by the scheduler", KEPT),
        ("Read from the server", READ),
        ("Each API process's own", OWN),
    ):
        lines += [f"### {title}", "", "| metric | type | labels | what |", "|---|---|---|---|"]
        for family in families:
            name = family.samples[0] if family.kind == "counter" else family.name
            labels = ", ".join(family.labels) or "–"
            lines.append(f"| `{name}` | {family.kind} | {labels} | {family.about} |")
        lines.append("")
    return "\n".join(lines)
