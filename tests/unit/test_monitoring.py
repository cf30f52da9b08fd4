"""compose/'s monitoring: the dashboards and alerts ask for what is there, in PromQL, and the alerts fire when they
should. Grafana itself is not run."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from perllm.broker.metrics import FAMILIES, markdown

ROOT = Path(__file__).parents[2]
PROMETHEUS = ROOT / "compose" / "prometheus"
DASHBOARDS = sorted((ROOT / "compose" / "grafana" / "dashboards").glob("*.json"))
ALERTS: list[dict[str, Any]] = yaml.safe_load((PROMETHEUS / "alerts.yml").read_text())["groups"][0]["rules"]
SAMPLES = {name for family in FAMILIES.values() for name in family.samples}

needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is not here: install Debian's package prometheus"
)


def promtool(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["promtool", *map(str, arguments)], capture_output=True, text=True, check=False)


def board(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(path.read_text())
    return loaded


def expressions(path: Path) -> list[str]:
    """What a dashboard asks for, its variables put in as Grafana does."""
    found = [target["expr"] for panel in board(path)["panels"] for target in panel["targets"]]
    for variable in board(path)["templating"]["list"]:
        found += re.findall(r"label_values\((.+), \w+\)", variable["query"])
    return [e.replace("$__rate_interval", "1m").replace("$node", "n").replace("$tenant", "t") for e in found]


def strangers(expression: str) -> set[str]:
    """Metrics, and labels of them, that do not exist."""
    found = set(re.findall(r"\bperllm_\w+", expression)) - SAMPLES
    for name, chosen in re.findall(r"\b(perllm_\w+)\{([^}]*)\}", expression):
        known = {label for family in FAMILIES.values() if name in family.samples for label in family.labels}
        found |= set(re.findall(r"(\w+)\s*[!=]=?~?\s*\"", chosen)) - known
    return found


def rules_of(expressions: list[str]) -> str:
    rules = [{"record": f"checked:{number}", "expr": e} for number, e in enumerate(expressions)]
    return yaml.safe_dump({"groups": [{"name": "checked", "rules": rules}]})


def test_there_are_the_dashboards() -> None:
    assert [path.stem for path in DASHBOARDS] == ["node", "overview", "scheduler", "tenant"]


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_a_dashboard_is_whole_and_asks_for_what_is_there(path: Path) -> None:
    loaded = board(path)
    assert loaded["uid"] == f"perllm-{path.stem}"
    assert len({panel["title"] for panel in loaded["panels"]}) == len(loaded["panels"])
    places = set()
    for panel in loaded["panels"]:
        at = panel["gridPos"]
        assert 0 <= at["x"] <= 24 - at["w"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & places, panel["title"]
        places |= cells
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert [target["refId"] for target in panel["targets"]] == list("ABCDEF"[: len(panel["targets"])])
        assert all(target["expr"] and target["legendFormat"] for target in panel["targets"])
    chosen = {variable["name"] for variable in loaded["templating"]["list"]} - {"datasource"}
    assert chosen == {path.stem} & {"node", "tenant"}
    assert expressions(path)
    assert {name for expression in expressions(path) for name in strangers(expression)} == set()


def test_the_dashboards_are_what_the_script_makes() -> None:
    pytest.importorskip("grafana_foundation_sdk")
    where = importlib.util.spec_from_file_location("build_dashboards", ROOT / "scripts" / "build_dashboards.py")
    assert where is not None
    assert where.loader is not None
    script = importlib.util.module_from_spec(where)
    where.loader.exec_module(script)
    assert dict(script.build()) == {path.name: path.read_text() for path in DASHBOARDS}


@needs_promtool
def test_every_expression_is_promql(tmp_path: Path) -> None:
    asked = [e for path in DASHBOARDS for e in expressions(path)]
    file = tmp_path / "rules.yml"
    for broken in (False, True):
        file.write_text(rules_of([*asked, "sum(perllm_tasks"] if broken else asked))
        checked = promtool("check", "rules", file)
        assert (checked.returncode != 0) is broken, checked.stderr


def test_what_does_not_exist_is_noticed() -> None:
    assert strangers("sum(perllm_backlogs)") == {"perllm_backlogs"}
    assert strangers('rate(perllm_requests{state="x"}[1m])')  # a counter without its _total
    assert strangers('perllm_backlog{node="x"}') == {"node"}


def test_alerts_ask_for_what_is_there_and_have_their_page() -> None:
    text = (ROOT / "docs" / "metrics.md").read_text()
    tests = (PROMETHEUS / "alerts_test.yml").read_text()
    for alert in ALERTS:
        assert strangers(alert["expr"]) == set()
        assert alert["labels"]["severity"] in ("critical", "warning", "info")
        assert f"\n### {alert['alert']}\n" in text
        assert re.search(rf"alertname: {alert['alert']}\n *exp_alerts:", tests), "is never seen to fire"
        assert re.search(rf"alertname: {alert['alert']}\}}", tests), "is never seen not to"
    assert len(re.findall(r"^### PerLLM", text, re.MULTILINE)) == len(ALERTS)


@needs_promtool
def test_alerts_fire_when_they_should() -> None:
    done = promtool("test", "rules", PROMETHEUS / "alerts_test.yml")
    assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
def test_prometheus_takes_its_configuration() -> None:
    done = promtool("check", "config", "--syntax-only", PROMETHEUS / "prometheus.yml")
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_services_are_unprivileged_bounded_and_on_loopback(tmp_path: Path) -> None:
    file = ROOT / "compose" / "monitoring.yaml"
    for name, service in yaml.safe_load(file.read_text())["services"].items():
        assert int(service["user"].split(":")[0]) > 0, name
        assert service["read_only"]
        assert service["cap_drop"] == ["ALL"]
        assert set(service["deploy"]["resources"]["limits"]) == {"cpus", "memory", "pids"}
        assert re.search(r":v?\d+\.\d+\.\d+$", service["image"])
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            assert not source.startswith(".") or (file.parent / source).is_dir(), volume
    check = [str(Path(sys.executable).parent / "check-jsonschema"), "--builtin-schema", "vendor.compose-spec"]
    assert subprocess.run([*check, str(file)], check=False, capture_output=True).returncode == 0


def test_the_page_has_every_metric() -> None:
    assert markdown().strip() in (ROOT / "docs" / "metrics.md").read_text()
