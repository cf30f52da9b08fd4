"""What `/metrics` tells, on a real server: a leader session in the test's thread, the test playing the workers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector
from support import users
from support.make import node_info, output, receipt
from support.raw import redis_of

from perllm.broker.api.metrics import SystemMetrics, TenantMetrics
from perllm.broker.api.settings import ApiSettings
from perllm.broker.api.store import ApiStore
from perllm.broker.api.webhooks.store import Webhooks
from perllm.broker.ledger import Leader, Ledger
from perllm.broker.local.server import EmbeddedServer
from perllm.broker.messages import MAX_NAME, Counters, Energy, Heartbeat, State, Submitted, TaskSpec, new_id
from perllm.broker.metrics import FAMILIES
from perllm.scheduler.core.scheduler import SchedulerCore
from perllm.scheduler.core.task_groups import MAX_OF_TENANT, MAX_TENANTS
from perllm.scheduler.policies import make_policy
from perllm.scheduler.service import _LeaderLease, _LeaderSession

#: Names that would break a page, or a label, that is not careful.
HOSTILE = ('a"b\\c\n# TYPE perllm_tasks counter\n', "{}=,", "\u202eevil\U0001f600", "x" * 10_000, "other", " ")

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def scrape(collector: Collector) -> Samples:
    """Every sample by name and labels; each of a family that is in the catalogue, none twice."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(collector)
    found: Samples = {}
    for family in text_string_to_metric_families(generate_latest(registry).decode()):
        known = FAMILIES[family.name]
        assert family.type == known.kind
        for sample in family.samples:
            assert sample.name in known.samples
            assert set(sample.labels) - {"le"} == set(known.labels)
            key = sample.name, tuple(sorted(sample.labels.items()))
            assert key not in found
            found[key] = sample.value
    return found


class Bench:
    """A scheduler that goes step by step, under the users of compose/users.acl."""

    def __init__(self, url: str) -> None:
        settings = ApiSettings.model_validate(
            {"redis_url": url, "lease": 300, "heartbeat": 60, "max_strikes": 2, "retention": 600}
        )
        self.ledger = Ledger(settings)
        redis_of(self.ledger).flushall()
        roles = {
            role: ApiSettings.model_validate(settings.model_dump() | {"redis_url": users.url_of(role, url)})
            for role in ("scheduler", "api")
        }
        self.scheduler, self.api = Ledger(roles["scheduler"]), Ledger(roles["api"])
        self.webhooks = Webhooks(ApiStore(roles["api"]), self.api)
        self.core, self.session = self.lead("first")

    def lead(self, holder: str, policy: str = "cs-ucb") -> tuple[SchedulerCore, _LeaderSession]:
        """A new leader, as after the last one's death."""
        redis_of(self.ledger).delete("{perllm}:leader")
        core = SchedulerCore(make_policy(policy), reject_on_error=True)
        lease = _LeaderLease(self.scheduler, Leader(holder, self.ledger.now(), policy, ""), 3600)
        assert lease.acquire()
        session = _LeaderSession(self.scheduler, core, lease)
        session.take_over()
        return core, session

    def submit(self, count: int = 1, **fields: object) -> list[str]:
        spec = TaskSpec.model_validate({"prompt": "hi", "deadline": 600} | fields)
        return self.ledger.submit([(new_id(), spec) for _ in range(count)])

    def step(self) -> None:
        """Read all there is, and decide."""
        while self.session._read(block=None):
            pass
        self.session.step(block=0.001)
        while self.session._read(block=None):
            pass

    def complete(self, task_id: str, **fields: Any) -> None:
        record = self.ledger.task(task_id)
        assert record is not None
        assert record.node is not None
        assert self.ledger.claim(task_id, record.attempt, record.node, "token") is not None
        done = receipt(record.node, record.attempt, tokens=5).model_copy(update=fields)
        assert self.ledger.complete(task_id, record.attempt, "token", "succeeded", output(), done) == "ok"

    def all(self) -> Samples:
        self.session.save()
        return scrape(SystemMetrics(self.api, self.webhooks))

    def of(self, tenant: str) -> Samples:
        self.session.save()
        return scrape(TenantMetrics(self.api, tenant))


@pytest.fixture
def bench(valkey: EmbeddedServer) -> Iterator[Bench]:
    yield Bench(valkey.url)
    assert users.denied(valkey.url) == []


def value(samples: Samples, name: str, **labels: str) -> float:
    """The sum over all samples of this name with these labels."""
    return sum(v for (n, of), v in samples.items() if n == name and labels.items() <= dict(of).items())


def one_of_each(bench: Bench) -> list[str]:
    """A task that succeeds, one whose first attempt fails, one cancelled, one no context holds, one that waits."""
    bench.ledger.register(node_info("n", slots=8))
    bench.step()
    done, again, waits = bench.submit(3, tenant="t", service="s", deadline=3000)
    bench.step()
    energy = Energy(transfer=1.0, inference=2.0, idle=0.5, method="made-up", estimated=True)
    bench.complete(
        done, transfer=0.5, wait=0.25, prefill=0.25, decode=2.0, prompt_tokens=7, cached_tokens=3, energy=energy
    )
    assert bench.ledger.claim(again, 1, "n", "token") is not None
    bench.ledger.fail(again, 1, "token", "no memory", retry=True)
    (late,) = bench.submit(tenant="t", service="s", max_tokens=100_000)
    bench.step()
    bench.ledger.cancel(waits)
    bench.step()
    record = bench.ledger.task(late)
    assert record is not None
    assert record.state is State.REJECTED
    return [done, again, waits, late]


def test_every_end_is_told_once_with_its_times_tokens_and_joules(bench: Bench) -> None:
    one_of_each(bench)
    bench.submit(2, tenant="t", service="s", model="emulated", start_after=300)
    bench.ledger.drain("n", "boot-1", "for the test")
    bench.submit(3, tenant="t", service="s", model="emulated")
    bench.step()
    bench.session.sweep()
    told = bench.all()
    of = {"tenant": "t", "service": "s"}

    assert value(told, "perllm_requests_total", **of, model="emulated", state="succeeded", on_time="true") == 1
    assert value(told, "perllm_requests_total", **of, model="auto", state="rejected", on_time="false") == 1
    assert value(told, "perllm_requests_total", **of, model="auto", state="cancelled") == 1
    assert value(told, "perllm_requests_total") == 3
    assert value(told, "perllm_time_to_deadline_at_dispatch_seconds_count", **of) == value(
        told, "perllm_arm_pulls_total", node="n", model="emulated"
    )
    assert value(told, "perllm_time_to_deadline_at_end_seconds_count", **of) == 3
    assert value(told, "perllm_time_to_deadline_at_end_seconds_bucket", **of, model="emulated", le="1800.0") == 0
    assert value(told, "perllm_time_to_deadline_at_end_seconds_bucket", **of, model="emulated", le="3600.0") == 1
    assert 1.0 <= value(told, "perllm_time_to_first_token_seconds_sum", **of) < 600
    assert value(told, "perllm_time_per_output_token_seconds_sum", **of) == pytest.approx(2.0 / 4)
    assert value(told, "perllm_time_per_output_token_seconds_bucket", **of, le="0.5") == 1
    assert value(told, "perllm_request_queue_time_seconds_count", **of) == 1
    assert value(told, "perllm_e2e_request_latency_seconds_count", **of) == 1
    assert value(told, "perllm_prompt_tokens_total", **of) == 7
    assert value(told, "perllm_generation_tokens_total", **of) == 5
    assert value(told, "perllm_energy_joules_total", **of) == 3.5
    assert value(told, "perllm_energy_joules_total", **of, stage="idle") == 0.5
    assert value(told, "perllm_arm_energy_joules_total", node="n", model="emulated") == 3.5
    assert value(told, "perllm_prefix_cache_hits_total", node="n") == 3
    assert value(told, "perllm_prefix_cache_queries_total", node="n") == 7
    assert value(told, "perllm_receipts_total", node="n", method="other", estimated="true") == 1
    assert value(told, "perllm_attempts_replaced_total", node="n", cause="failed") == 1
    assert value(told, "perllm_decisions_total", action="reject", reason="context") == 1
    assert value(told, "perllm_decisions_total", action="dispatch") >= 3
    assert value(told, "perllm_backlog", **of, model="emulated") == 3  # what may not start yet is none
    assert value(told, "perllm_backlog", **of) == 3 + bench.ledger.counts()[State.PENDING] - 5
    assert 0 <= value(told, "perllm_backlog_oldest_seconds", **of, model="emulated") < 600
    assert value(told, "perllm_sweeps_total") == 1
    assert value(told, "perllm_scheduler_info", policy="cs-ucb") == 1
    assert value(told, "perllm_scheduler_leads") == 1
    assert value(told, "perllm_scheduler_takeovers_total") == 1
    assert 0 <= value(told, "perllm_scheduler_snapshot_age_seconds") < 60
    assert value(told, "perllm_server_memory_bytes") > 0
    assert value(told, "perllm_accounting_seconds_total") > 0


def test_nothing_is_counted_twice_or_lost_when_leaders_change(bench: Bench) -> None:
    one_of_each(bench)
    first = bench.all()
    counts = [key for key in first if key[0].endswith(("_total", "_count", "_bucket")) and key[0] in COUNTED]
    more = bench.submit(4, tenant="t", service="s")
    bench.step()
    bench.complete(more[0])
    bench.step()  # read, and not saved: the leader dies
    bench.core, bench.session = bench.lead("second")
    second = bench.all()
    assert all(second[key] >= first[key] for key in counts)
    assert value(second, "perllm_requests_total", state="succeeded") == 2
    assert value(second, "perllm_requests_total") == 4
    assert value(second, "perllm_generation_tokens_total", tenant="t") == 10
    bench.core, bench.session = bench.lead("third", "least-loaded")  # what was learned is of no use to it
    third = bench.all()
    assert {key: third[key] for key in counts} == {key: second[key] for key in counts}
    assert value(third, "perllm_scheduler_takeovers_total") == 3
    assert value(third, "perllm_scheduler_info") == 1


COUNTED = {name for family in FAMILIES.values() if family.name != "perllm_tasks_ever" for name in family.samples} - {
    "perllm_scheduler_takeovers_total",
    "perllm_accounting_seconds_total",
}


def test_series_are_bounded_whatever_tenants_and_services_are_called(bench: Bench) -> None:
    bench.ledger.register(node_info("n"))
    bench.step()
    bench.ledger.drain("n", "boot-1", "for the test")

    def come(tenant: str, service: str, model: str | None = None) -> None:
        """As whoever may submit could write it, past every check."""
        event = Submitted(id=new_id(), at=bench.ledger.now(), deadline=9e9, tenant=tenant, service=service, model=model)
        redis_of(bench.ledger).xadd("{perllm}:requests", {"e": event.model_dump_json()})

    for name in HOSTILE:
        come(name, name, name)
    for i in range(40):
        come("many", f"service {i}", f"model {i}")
    for i in range(100):
        come(f"tenant {i}", "s", "emulated")
    while bench.session._read(block=None):
        pass
    told = bench.all()
    assert value(told, "perllm_backlog") == len(HOSTILE) + 140
    backlog = [dict(labels) for name, labels in told if name == "perllm_backlog"]
    assert {of["model"] for of in backlog} == {"other", "emulated"}
    assert len({of["tenant"] for of in backlog}) <= MAX_TENANTS + 1
    assert len([of for of in backlog if of["tenant"] == "many"]) == MAX_OF_TENANT + 1
    assert {HOSTILE[0], HOSTILE[1]} <= {of["tenant"] for of in backlog}
    assert max(len(text) for of in backlog for text in of.values()) <= MAX_NAME


def test_a_tenant_sees_its_own_and_no_other(bench: Bench) -> None:
    one_of_each(bench)
    bench.submit(tenant="u", service="secret")
    bench.submit(tenant="other", service="secret")
    bench.step()
    mine = bench.of("t")
    assert value(mine, "perllm_requests_total", state="succeeded") == 1
    assert {dict(labels).get("tenant") for _, labels in mine} == {"t"}
    for stranger in ("nobody", "other", ""):
        assert bench.of(stranger) == {}


def test_nodes_are_told_of_alive_and_dead_and_with_what_was_learned(bench: Bench, valkey: EmbeddedServer) -> None:
    ledger = bench.ledger
    infos = {name: node_info(name) for name in ("lives", "died", "left")}
    for info in infos.values():
        ledger.register(info)
    beat = Heartbeat(at=0, node="lives", boot="boot-1", counters=Counters(active=1, waiting=3, free_kv=2048, energy=9))
    ledger.beat(beat, [])
    ledger.leave("left", "boot-1", "its work is done")
    redis_of(ledger).zadd("{perllm}:nodes", {"died": 1})
    bench.step()
    bench.session.sweep()
    (task_id,) = bench.submit()
    bench.step()
    bench.complete(task_id, payload_bytes=100_000, transfer=1.0, prompt_tokens=9)
    bench.step()
    told = bench.all()
    up = {dict(labels)["node"]: v for (name, labels), v in told.items() if name == "perllm_node_up"}
    assert up == {"lives": 1, "died": 0}
    assert value(told, "perllm_node_kv_cache_usage_ratio", node="lives") == 0.75
    assert value(told, "perllm_node_waiting", node="lives") == 3
    registered = value(told, "perllm_node_bandwidth_bytes_per_second", node="lives", source="registered")
    learned = value(told, "perllm_node_bandwidth_bytes_per_second", node="lives", source="learned")
    assert registered == infos["lives"].bandwidth
    assert learned < registered
    bounds = [value(told, "perllm_arm_token_seconds", node="lives", bound=b) for b in ("lower", "mean", "upper")]
    assert bounds == sorted(set(bounds))
    for role in ("producer", "worker", "api", "monitor"):  # whoever shows nodes may know
        reader = Ledger(ApiSettings.model_validate({"redis_url": users.url_of(role, valkey.url)}))
        assert reader.learned()["lives"].bandwidth == pytest.approx(learned)
        reader.close()


@pytest.mark.parametrize(
    "spoilt", ["", "[]", "{", '{"sums": 3, "position": 7}', '{"at": "x", "sums": {"perllm_tasks": 1}}']
)
def test_what_cannot_be_read_is_passed_over(bench: Bench, spoilt: str) -> None:
    redis_of(bench.ledger).set("{perllm}:metrics", spoilt)
    redis_of(bench.ledger).set("{perllm}:learned", spoilt)
    assert value(scrape(SystemMetrics(bench.api, bench.webhooks)), "perllm_scheduler_leads") == 1
    bench.core, bench.session = bench.lead("second")
    assert value(bench.all(), "perllm_requests_total") == 0
    assert bench.ledger.learned() == {}


def test_what_cannot_be_counted_stops_nothing(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    one_of_each(bench)
    before = bench.all()
    metrics = bench.session._metrics
    for name in ("_dispatched", "_note_beliefs"):
        monkeypatch.setattr(metrics, name, lambda *_: 1 / 0)
    (task_id,) = bench.submit(tenant="t")
    bench.step()
    bench.complete(task_id)
    bench.step()
    after = bench.all()
    assert after["perllm_requests_total", LAST] == before["perllm_requests_total", LAST]  # as it was last told
    saved = bench.ledger.load_snapshot()
    assert saved is not None
    assert saved["position"] == bench.ledger.first_and_last_event()[1]
    monkeypatch.undo()
    assert value(bench.all(), "perllm_requests_total", state="succeeded") == 2


LAST = tuple(
    sorted({"tenant": "t", "service": "s", "model": "emulated", "state": "succeeded", "on_time": "true"}.items())
)
