"""Writes compose/grafana/dashboards/*.json, by Grafana's own builders: `python scripts/build_dashboards.py`.

Every expression is PromQL over the families of `broker/metrics.py`; tests/unit/test_monitoring.py holds the files to
this script, and checks what they ask for.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from grafana_foundation_sdk.builders import common, dashboard, prometheus, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import LegendDisplayMode, LegendPlacement, TooltipDisplayMode
from grafana_foundation_sdk.models.dashboard import DataSourceRef, VariableRefresh

FOLDER = Path(__file__).parents[1] / "compose" / "grafana" / "dashboards"
SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
#: Panels in a row, and how high they are, in Grafana's units of a 24th of the width and of 30 pixels.
IN_A_ROW, HEIGHT = 3, 7
#: What a panel shows: PromQL, and what its lines are called.
Lines = list[tuple[str, str]]
#: A panel: title, unit by Grafana's name, lines.
Panel = tuple[str, str, Lines]

RATE = "[$__rate_interval]"


def quantiles(family: str, where: str = "") -> Lines:
    """A histogram's median and 95th and 99th percentile."""
    return [
        (f"histogram_quantile({q}, sum by (le) (rate({family}_bucket{where}{RATE})))", f"p{round(q * 100)}")
        for q in (0.5, 0.95, 0.99)
    ]


def rate(counter: str, by: str, where: str = "", legend: str | None = None) -> Lines:
    """A counter's increase per second, by a label."""
    return [(f"sum by ({by}) (rate({counter}{where}{RATE}))", legend or f"{{{{{by}}}}}")]


def on_time(by: str = "", where: str = "") -> Lines:
    """The share of the tasks that ended, those cancelled apart, which were on time."""
    group = f" by ({by})" if by else ""
    inner = where.strip("{}")
    good = ",".join(x for x in (inner, 'on_time="true"') if x)
    all_ = ",".join(x for x in (inner, 'state!="cancelled"') if x)
    expression = (
        f"sum{group} (rate(perllm_requests_total{{{good}}}{RATE})) "
        f"/ sum{group} (rate(perllm_requests_total{{{all_}}}{RATE}))"
    )
    return [(expression, f"{{{{{by}}}}}" if by else "on time")]


def of_tasks(where: str) -> list[Panel]:
    """What tasks meet, of all or of those that `where` picks."""
    return [
        ("On time, share", "percentunit", on_time(where=where)),
        ("Ended, by state", "reqps", rate("perllm_requests_total", "state", where)),
        ("Backlog, by service", "short", [(f"sum by (service) (perllm_backlog{where})", "{{service}}")]),
        (
            "Oldest in the backlog, by service",
            "s",
            [(f"max by (service) (perllm_backlog_oldest_seconds{where})", "{{service}}")],
        ),
        ("Time in queue", "s", quantiles("perllm_request_queue_time_seconds", where)),
        ("Time to first token", "s", quantiles("perllm_time_to_first_token_seconds", where)),
        ("Time per output token", "s", quantiles("perllm_time_per_output_token_seconds", where)),
        ("End to end", "s", quantiles("perllm_e2e_request_latency_seconds", where)),
        ("Left to the deadline at dispatch", "s", quantiles("perllm_time_to_deadline_at_dispatch_seconds", where)),
        ("Left to the deadline at the end", "s", quantiles("perllm_time_to_deadline_at_end_seconds", where)),
        ("Lateness", "s", quantiles("perllm_lateness_seconds", where)),
        (
            "Tokens",
            "short",
            [
                (f"sum(rate(perllm_prompt_tokens_total{where}{RATE}))", "prompt tokens/s"),
                (f"sum(rate(perllm_generation_tokens_total{where}{RATE}))", "generated tokens/s"),
            ],
        ),
        ("Power, by receipts", "watt", rate("perllm_energy_joules_total", "stage", where)),
    ]


OVERVIEW: list[Panel] = [
    *of_tasks(""),
    ("On time, by tenant", "percentunit", on_time("tenant")),
    ("On time, by model", "percentunit", on_time("model")),
    ("Backlog, by tenant", "short", [("sum by (tenant) (perllm_backlog)", "{{tenant}}")]),
    ("Nodes", "short", [("sum(perllm_node_up)", "live"), ("count(perllm_node_up == 0) or vector(0)", "dead")]),
    ("Tasks held, by state", "short", [("perllm_tasks", "{{state}}")]),
    ("Tokens, by model", "short", rate("perllm_arm_generation_tokens_total", "model")),
    ("Power, by model", "watt", rate("perllm_arm_energy_joules_total", "model")),
    ("Receipts, by how energy was measured", "reqps", rate("perllm_receipts_total", "method")),
    ("Attempts replaced, by cause", "reqps", rate("perllm_attempts_replaced_total", "cause")),
    (
        "Server memory",
        "bytes",
        [("perllm_server_memory_bytes", "used"), ("perllm_server_memory_limit_bytes > 0", "limit")],
    ),
    ("Webhook attempts", "reqps", rate("perllm_webhook_attempts_total", "outcome")),
    ("API requests, by status", "reqps", rate("perllm_api_request_seconds_count", "status")),
]
_NODE = '{node="$node"}'
NODE: list[Panel] = [
    (
        "Alive",
        "short",
        [
            (f"perllm_node_up{_NODE}", "up"),
            (f"perllm_node_draining{_NODE}", "draining"),
            (f"perllm_node_distrusted{_NODE}", "distrusted"),
        ],
    ),
    ("Silent", "s", [(f"perllm_node_silent_seconds{_NODE}", "since its last heartbeat")]),
    (
        "Tasks",
        "short",
        [
            (f"perllm_node_active{_NODE}", "active"),
            (f"perllm_node_waiting{_NODE}", "waiting"),
            (f"perllm_node_slots{_NODE}", "slots"),
        ],
    ),
    ("Tokens generated", "short", [(f"rate(perllm_node_tokens_total{_NODE}{RATE})", "tokens/s")]),
    ("Power, idle included", "watt", [(f"rate(perllm_node_energy_joules_total{_NODE}{RATE})", "{{method}}")]),
    ("KV cache used", "percentunit", [(f"perllm_node_kv_cache_usage_ratio{_NODE}", "used")]),
    (
        "Prefix cache hits",
        "percentunit",
        [
            (
                f"sum by (model) (rate(perllm_prefix_cache_hits_total{_NODE}{RATE})) "
                f"/ sum by (model) (rate(perllm_prefix_cache_queries_total{_NODE}{RATE}))",
                "{{model}}",
            )
        ],
    ),
    ("Tasks sent to it, by model", "reqps", rate("perllm_arm_pulls_total", "model", _NODE)),
    ("Attempts replaced, by cause", "reqps", rate("perllm_attempts_replaced_total", "cause", _NODE)),
    (
        "Joules per generated token",
        "joule",
        [
            (
                f"sum by (model) (rate(perllm_arm_energy_joules_total{_NODE}{RATE})) "
                f"/ sum by (model) (rate(perllm_arm_generation_tokens_total{_NODE}{RATE}))",
                "{{model}}",
            )
        ],
    ),
    ("Receipts, by how energy was measured", "reqps", rate("perllm_receipts_total", "method", _NODE)),
    ("Bandwidth", "Bps", [(f"perllm_node_bandwidth_bytes_per_second{_NODE}", "{{source}}")]),
]
SCHEDULER: list[Panel] = [
    (
        "Leads",
        "short",
        [("perllm_scheduler_leads", "leads"), ("changes(perllm_scheduler_takeovers_total[1h])", "takeovers in 1 h")],
    ),
    ("Policy", "short", [("perllm_scheduler_info", "{{policy}}")]),
    ("Snapshot's age", "s", [("perllm_scheduler_snapshot_age_seconds", "age")]),
    ("Stream lag", "s", [("perllm_stream_lag_seconds", "lag")]),
    (
        "Sweep",
        "s",
        [("perllm_sweep_seconds", "took, worst"), (f"rate(perllm_sweep_mended_total{RATE})", "things mended/s")],
    ),
    ("Spent on these metrics", "percentunit", [(f"rate(perllm_accounting_seconds_total{RATE})", "of one core")]),
    (
        "Decisions, by action and reason",
        "reqps",
        [(f"sum by (action, reason) (rate(perllm_decisions_total{RATE}))", "{{action}}: {{reason}}")],
    ),
    (
        "Pulls, by arm",
        "reqps",
        [(f"sum by (node, model) (rate(perllm_arm_pulls_total{RATE}))", "{{node}} {{model}}")],
    ),
    (
        "Share of pulls, by node",
        "percentunit",
        [
            (
                f"sum by (node) (rate(perllm_arm_pulls_total{RATE})) / scalar(sum(rate(perllm_arm_pulls_total{RATE})))",
                "{{node}}",
            )
        ],
    ),
    ("Learned time per token, with bounds", "s", [("perllm_arm_token_seconds", "{{node}} {{model}} {{bound}}")]),
    ("Learned prefill time per token", "s", [("perllm_arm_prefill_token_seconds", "{{node}} {{model}}")]),
    ("Samples", "short", [("perllm_arm_samples", "{{node}} {{model}}")]),
    ("Bandwidth", "Bps", [("perllm_node_bandwidth_bytes_per_second", "{{node}} {{source}}")]),
    ("Link latency", "s", [("perllm_node_link_latency_seconds", "{{node}}")]),
    ("Dispatch delay", "s", [("perllm_node_dispatch_delay_seconds", "{{node}}")]),
    ("Slot price", "short", [("perllm_node_slot_price", "{{node}}")]),
    ("Left to the deadline at dispatch", "s", quantiles("perllm_time_to_deadline_at_dispatch_seconds")),
]
#: Title, panels, and the label to choose by with where its values are found.
BOARDS: dict[str, tuple[str, list[Panel], tuple[str, str] | None]] = {
    "overview": ("PerLLM: overview", OVERVIEW, None),
    "node": ("PerLLM: one node", NODE, ("node", "label_values(perllm_node_up, node)")),
    "tenant": (
        "PerLLM: one tenant",
        of_tasks('{tenant="$tenant"}'),
        ("tenant", "label_values(perllm_requests_total, tenant)"),
    ),
    "scheduler": ("PerLLM: the scheduler's mind", SCHEDULER, None),
}


def _panel(title: str, unit: str, lines: Lines) -> timeseries.Panel:
    panel = timeseries.Panel().title(title).unit(unit).datasource(SOURCE).span(24 // IN_A_ROW).height(HEIGHT)
    panel = panel.min(0).fill_opacity(8).tooltip(common.VizTooltipOptions().mode(TooltipDisplayMode.MULTI))
    legend = common.VizLegendOptions().show_legend(True)
    panel = panel.legend(legend.display_mode(LegendDisplayMode.LIST).placement(LegendPlacement.BOTTOM))
    for number, (expression, called) in enumerate(lines):
        query = prometheus.Dataquery().datasource(SOURCE).expr(expression).legend_format(called)
        panel = panel.with_target(query.ref_id(chr(ord("A") + number)))
    return panel


def build() -> Iterator[tuple[str, str]]:
    """Each dashboard's file name and text."""
    for name, (title, panels, choice) in BOARDS.items():
        board = dashboard.Dashboard(title).uid(f"perllm-{name}").tags(["perllm"]).refresh("30s").time("now-3h", "now")
        board = board.with_variable(dashboard.DatasourceVariable("datasource").label("Prometheus").type("prometheus"))
        if choice is not None:
            label, query = choice
            variable = dashboard.QueryVariable(label).query(query).datasource(SOURCE)
            board = board.with_variable(variable.refresh(VariableRefresh.ON_TIME_RANGE_CHANGED))
        for panel in panels:
            board = board.with_panel(_panel(*panel))
        yield f"{name}.json", JSONEncoder(sort_keys=True, indent=1).encode(board.build()) + "\n"


if __name__ == "__main__":
    for file, text in build():
        (FOLDER / file).write_text(text)
