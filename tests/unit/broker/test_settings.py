"""Settings: what is accepted, how the server's address is spelt, and what an error says."""

from __future__ import annotations

from pathlib import Path

import pytest

from perllm.broker.api.settings import ApiSettings
from perllm.broker.connection import connect
from perllm.broker.errors import BadSetting
from perllm.broker.settings import Settings, environment, load_settings, models
from perllm.cloud_worker.settings import CloudSettings
from perllm.edge_worker.settings import EdgeSettings

SECRET = "hunter2"


@pytest.mark.parametrize(
    ("url", "says"),
    [
        (f"http://:{SECRET}@host", "must begin with redis://, rediss://, unix:// or sentinel://"),
        ("", "must begin with"),
        (f"redis://:{SECRET}@host:99999", "Port out of range"),
        (f"redis://:{SECRET}@host:port", "redis://host:6379/0"),
        (f"redis://:{SECRET}@host/name", "redis://host:6379/0"),
        ("redis://", "must name a host"),
        ("redis://[::1", "Invalid IPv6"),
        ("unix://", "unix:///run/redis.sock"),
        ("unix://run/redis.sock", "by its whole path"),
        (f"sentinel://:{SECRET}@host,other", "must name sentinels and their primary"),
        (f"sentinel://:{SECRET}@host,other:x/tasks", "'other:x' is no host and port"),
        ("sentinel://host,/tasks", "lacks its host"),
        ("sentinel://host/tasks/one", "must name sentinels and their primary"),
    ],
)
def test_a_bad_url_is_one_line_without_its_secret(monkeypatch: pytest.MonkeyPatch, url: str, says: str) -> None:
    monkeypatch.setenv("PERLLM_REDIS_URL", url)
    with pytest.raises(BadSetting, match=r"^PERLLM_REDIS_URL: .*") as caught:
        load_settings()
    assert says in str(caught.value)
    assert SECRET not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("url", ["redis://host?colour=blue", "redis://host?db=x"])
def test_an_option_there_is_not_is_a_bad_setting(url: str) -> None:
    with pytest.raises(BadSetting, match=r"^PERLLM_REDIS_URL: "):
        connect(Settings(redis_url=url))


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("PERLLM_LEASE", "soon"),
        ("PERLLM_LEASE", "nan"),
        ("PERLLM_LEASE", "0.1"),
        ("PERLLM_SLOTS", ""),
        ("PERLLM_SLOTS", "-1"),
        ("PERLLM_NODE_NAME", "a b"),
        ("PERLLM_CELL", "a}b"),
        ("PERLLM_ENGINE", "gpt"),
        ("PERLLM_RETENTION", "0"),
        ("PERLLM_BANDWIDTH", "inf"),
        ("PERLLM_GRACE", "nan"),
        ("PERLLM_HEARTBEAT", "inf"),
    ],
)
def test_an_error_names_the_variable(monkeypatch: pytest.MonkeyPatch, variable: str, value: str) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(BadSetting, match=rf"^{variable}: "):
        load_settings(EdgeSettings)


@pytest.mark.parametrize(
    ("url", "address", "celery"),
    [
        ("redis://:p%40ss@host", "redis://host:6379", "redis://:p%40ss@host"),
        ("redis://user:pw@[::1]:7000/2", "redis://[::1]:7000", "redis://user:pw@[::1]:7000/2"),
        ("rediss://user:pw@host/1", "rediss://host:6379", "rediss://user:pw@host/1?ssl_cert_reqs=required"),
        (
            "rediss://host?ssl_ca_certs=%2Fca.pem",
            "rediss://host:6379",
            "rediss://host?ssl_ca_certs=%2Fca.pem&ssl_cert_reqs=required",
        ),
        ("rediss://host?ssl_cert_reqs=none", "rediss://host:6379", "rediss://host?ssl_cert_reqs=none"),
        (
            "sentinel://user:p%40ss@a,[::1]:7000/tasks/2?sentinel_password=x",
            "sentinel://a:26379,[::1]:7000/tasks",
            "sentinel://user:p%40ss@a:26379/2;sentinel://user:p%40ss@[::1]:7000/2",
        ),
        ("unix:///run/r.sock", "unix:///run/r.sock", "redis+socket:///run/r.sock?virtual_host=0"),
        ("unix://u:p@/run/r.sock?db=3", "unix:///run/r.sock", "redis+socket://u:p@/run/r.sock?virtual_host=3"),
    ],
)
def test_one_server_in_every_spelling(url: str, address: str, celery: str) -> None:
    settings = Settings(redis_url=url)
    assert settings.address == address
    assert settings.celery_url == celery


def test_no_secret_in_a_repr() -> None:
    assert SECRET not in repr(Settings(redis_url=f"redis://:{SECRET}@host"))


def test_a_data_folder_may_be_relative_and_hold_any_character(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    settings = Settings(data_dir=Path("da ta#1%20?"))
    assert settings.data_dir == tmp_path / "da ta#1%20?"
    assert connect(settings).get_connection_kwargs()["path"] == str(settings.socket)
    assert settings.address == f"unix://{settings.socket}"
    assert Settings(data_dir=Path("~/x")).data_dir == Path.home() / "x"


@pytest.mark.parametrize("server", ["10.0.0.53", "10.0.0.53:5353", "[fd00::53]", "[fd00::53]:53"])
def test_a_name_server_is_an_address(server: str) -> None:
    assert load_settings(ApiSettings, webhook_dns=[server]).webhook_dns == (server,)


@pytest.mark.parametrize("server", ["", "dns.example", "10.0.0.53:x", "10.0.0.53:99999", "fd00::53", "a@10.0.0.53"])
def test_a_name_server_that_is_no_address_is_named(server: str) -> None:
    with pytest.raises(BadSetting, match="PERLLM_WEBHOOK_DNS"):
        load_settings(ApiSettings, webhook_dns=[server])


def test_paths_and_all_else_that_was_set_hold_in_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    lines = (
        "PERLLM_LOG_JSON=1",
        "PERLLM_MODEL=some/name",
        "PERLLM_WEBHOOK_ALLOW='[\"10.0.0.0/8\"]'",
        "PERLLM_API_QUOTA='{\"files\": 5}'",
        'PERLLM_API_QUOTAS=\'{"acme": {"files": 10}}\'',
    )
    (tmp_path / ".env").write_text("\n".join(lines))
    monkeypatch.setenv("PERLLM_MODEL_CACHE", "cache")
    monkeypatch.setenv("PERLLM_ADAPTERS", '{"a": "b"}')
    given = {"redis_url": "rediss://u:p%40@h?ssl_ca_certs=c%20a.pem"}
    here = [load_settings(one, **given) for one in models().values()]
    variables = environment(load_settings(**given))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    assert [load_settings(one) for one in models().values()] == here
    assert Settings().url == f"rediss://u:p%40@h?ssl_ca_certs={tmp_path}/c%20a.pem"
    edge = EdgeSettings()
    assert (edge.model_cache, edge.model) == (tmp_path / "cache", "some/name")
    assert CloudSettings().adapters == {"a": tmp_path / "b"}


def test_a_home_that_is_not_known_is_one_error() -> None:
    with pytest.raises(BadSetting, match="PERLLM_DATA_DIR: "):
        load_settings(data_dir="~nobody-of-this-name/x")
