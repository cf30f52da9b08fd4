"""Recorded prompts: read, replayed with their text, and refused by file, line and field."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from perllm.broker.errors import BadSetting
from perllm.scheduler.simulator.scenario import Scenario, Texts, load_scenario
from perllm.scheduler.simulator.text_trace import read_text_trace
from perllm.scheduler.simulator.workload import make_arrivals

LINES = (
    '{"class": "code", "prompt": "'
    + "x" * 33
    + '", "output_chars": 66}\n{"class": "talk", "prompt": "hi", "output_chars": 0}\n'
)


def test_a_replay_carries_each_text_once_with_its_sizes() -> None:
    scenario = load_scenario("texts")
    arrivals = make_arrivals(scenario, 10.0, 1)
    known = read_text_trace("gpteacher-600")
    sizes = dict(zip(known.texts, zip(known.prompts, known.outputs, strict=True), strict=True))
    assert sorted(a.text or "" for a in arrivals) == sorted(known.texts)
    assert all((a.event.prompt_tokens, a.output) == sizes[a.text or ""] for a in arrivals if a.output < 512)
    assert [a.text for a in arrivals] != [a.text for a in make_arrivals(scenario, 10.0, 2)]


def test_a_text_goes_to_the_service_named_as_its_class() -> None:
    raw = load_scenario("texts").model_dump()
    raw["service"] = [raw["service"][0], raw["service"][0] | {"name": "tools"}]
    known = read_text_trace("gpteacher-600")
    classes = dict(zip(known.texts, known.classes, strict=True))
    arrivals = make_arrivals(Scenario.model_validate(raw), 10.0, 1)
    assert all(a.event.service == "tools" for a in arrivals if classes[a.text or ""] == "tools")
    assert {a.event.service for a in arrivals if classes[a.text or ""] == "code"} == {"default", "tools"}


@pytest.mark.parametrize("name", ["some.jsonl", "some.jsonl.gz"])
def test_files_are_read_gzipped_or_not(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(gzip.compress(LINES.encode()) if name.endswith(".gz") else LINES.encode())
    found = read_text_trace(str(path))
    assert (found.prompts, found.outputs, found.classes) == ([10, 1], [20, 1], ["code", "talk"])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "no prompts in it"),
        (b"{}\n", "line 1: class"),
        (LINES.encode() + b'{"class": "a", "prompt": "", "output_chars": 1}\n', "line 3: prompt"),
        (LINES.encode() + b"nonsense\n", "line 3"),
        (b"\xff\xfe", "not UTF-8"),
        (None, "No such file"),
    ],
)
def test_a_bad_file_is_named_with_line_and_field(tmp_path: Path, content: bytes | None, said: str) -> None:
    path = tmp_path / "bad.jsonl"
    if content is not None:
        path.write_bytes(content)
    arrivals = Texts(kind="texts", file=str(path))
    with pytest.raises(BadSetting, match=said):
        make_arrivals(load_scenario("texts").model_copy(update={"arrivals": arrivals}), 1.0, 0)


def test_a_torn_gzip_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "torn.jsonl.gz"
    path.write_bytes(gzip.compress(LINES.encode())[:-12])
    with pytest.raises(BadSetting, match="torn"):
        read_text_trace(str(path))
    path.write_bytes(b"not gzip")
    with pytest.raises(BadSetting, match="torn"):
        read_text_trace(str(path))
