"""The server dies and its replica takes its place: what was accepted is done. `make chaos ARGS="--failover 1"` does
this again and again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import celery
import pytest
from support import users
from support.cluster import Cluster
from support.replicated import NAME, Replicated
from support.wait import eventually

from perllm import Client
from perllm.broker.errors import Unreachable
from perllm.broker.messages import State
from perllm.broker.settings import Settings


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Replicated]:
    with Replicated(tmp_path_factory.mktemp("servers"), users.rules()) as started:
        yield started


def submitted(cluster: Cluster) -> list[str] | None:
    """Ids of tasks that were accepted; None where they were not."""
    try:
        return cluster.submit(5)
    except Unreachable:
        return None


def test_what_was_accepted_is_done_by_the_replica_that_takes_over(servers: Replicated, tmp_path: Path) -> None:
    with Cluster(servers.url, tmp_path, replicas=1) as cluster:
        cluster.scheduler()
        cluster.start_nodes("one")
        first = [cluster.result(i).state for i in cluster.submit(5)]
        accepted = cluster.submit(20)
        with Client(settings=Settings(redis_url=cluster.url_of("producer"), replicas=1)) as client:
            accepted.append(client.submit("hello", max_tokens=2, deadline=600).id)
        dead = servers.kill()
        with pytest.raises(Unreachable, match=r"0 of the 1 replicas .* not accepted|No master found"):
            cluster.submit(1)
        servers.revive(dead)
        later = eventually(lambda: submitted(cluster), "tasks are accepted again")
        states = [cluster.result(i).state for i in (*accepted, *later)]
        cluster.start_inbox()
        url = cluster.settings.celery_url
        producer = celery.Celery(broker=url, backend=url)
        producer.conf.broker_transport_options = producer.conf.result_backend_transport_options = {"master_name": NAME}
        sent = producer.send_task("perllm.generate", ["hello"], {"max_tokens": 2}, queue="inbox")
        assert sent.get(timeout=60)["state"] == "succeeded"
    assert users.denied(servers.url) == []
    assert {*first, *states} == {State.SUCCEEDED}
