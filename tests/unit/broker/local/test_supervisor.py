"""How the processes on one machine share its cores, and how they are kept running."""

from __future__ import annotations

import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.wait import eventually

import perllm.broker.local.supervisor as stack_module
from perllm.broker.errors import BadSetting
from perllm.broker.local import process
from perllm.broker.local.supervisor import LONGEST_PAUSE, PAUSE, Supervisor, pause, share_cores
from perllm.broker.settings import Settings, load_settings


@given(cores=st.integers(1, 256), edges=st.integers(0, 16), clouds=st.integers(0, 4))
def test_engines_never_use_more_threads_than_cores_while_there_are_enough(cores: int, edges: int, clouds: int) -> None:
    edge, cloud = share_cores(cores, edges, clouds)
    assert min(edge, cloud) >= 1
    assert edges * edge + clouds * cloud <= max(cores, edges + clouds)


# --- when a part is started again


@given(st.integers(0, 10_000))
def test_pauses_grow_and_are_bounded(failures: int) -> None:
    now, later = pause(failures), pause(failures + 1)
    assert 0 <= now <= LONGEST_PAUSE
    assert later >= min(PAUSE * 0.75, LONGEST_PAUSE)
    assert pause(failures + 3) > now or now >= 0.75 * LONGEST_PAUSE
    assert (now == 0) is (failures == 0)


@pytest.fixture
def stack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Supervisor]:
    """A stack of nothing, to launch parts of our own in."""
    monkeypatch.setattr(stack_module, "PAUSE", 0.05)
    monkeypatch.setattr(stack_module, "LONGEST_PAUSE", 0.2)
    one = Supervisor(Settings(data_dir=tmp_path), edges=(), clouds=())
    one._make_folders()
    yield one
    one.stop()


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def tend_until(stack: Supervisor, seen: Callable[[list[str]], object]) -> list[str]:
    lines = list[str]()

    def look() -> bool:
        lines.extend(stack.tend())
        return bool(seen(lines))

    eventually(look, "the stack has tended to it")
    return lines


def test_a_part_that_keeps_ending_is_started_for_ever_and_it_is_said_why(stack: Supervisor, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    runs.touch()
    stack._launch("bad", python(f"open({str(runs)!r}, 'a').write('x'); raise SystemExit('error: no luck')"))
    stack._launch("good", python("import time; time.sleep(600)"))
    good = stack._children[1].process
    lines = tend_until(stack, lambda said: len(runs.read_text()) >= 6)
    assert all(line.startswith("bad ended (status 1: no luck); started again in 0.") for line in lines)
    assert len(lines) <= 7  # one each time, not one each look
    assert stack._children[1].process is good  # neighbours are left alone
    assert good is not None
    assert good.poll() is None


def test_a_part_that_has_lived_is_started_at_once(stack: Supervisor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stack_module, "STEADY", 0.0)
    stack._launch("worker", python("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"))
    lines = tend_until(stack, lambda said: len(said) >= 3)
    assert set(lines) == {"worker ended (signal 11); started again at once"}


def test_a_part_that_cannot_even_be_started_is_tried_again(stack: Supervisor, tmp_path: Path) -> None:
    stack._launch("part", python("pass"))
    stack._children[0].command = [str(tmp_path / "program")]
    tend_until(stack, lambda said: sum("could not be started" in line for line in said) >= 3)
    (tmp_path / "program").write_text("#!/bin/sh\nsleep 600\n")
    (tmp_path / "program").chmod(0o700)
    tend_until(stack, lambda said: stack._children[0].running)


def test_a_wrong_setting_ends_the_start_only(stack: Supervisor) -> None:
    stack._launch("part", python("import sys; print('error: PERLLM_X: no', file=sys.stderr); sys.exit(2)"))

    eventually(lambda: not stack._children[0].running, "it has ended")
    with pytest.raises(BadSetting, match=r"^part did not start: PERLLM_X: no \(log: "):
        stack.waiting_for()
    assert len(tend_until(stack, lambda said: len(said) >= 2)) >= 2  # later, it is a part like any other


def test_logs_are_kept_small_while_they_are_written(stack: Supervisor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stack_module, "keep_small", lambda log: process.keep_small(log, 10_000))
    stack._launch(
        "loud", python("import itertools\nfor n in itertools.count(): print(n, 'x' * 100, flush=n % 50 == 0)")
    )
    log = stack.logs / "loud.log"
    old = stack.logs / "loud.log.1"
    heads = set[bytes]()

    def turned() -> bool:
        list(stack.tend())
        if old.exists():
            heads.add(old.read_bytes()[:10])
        return len(heads) >= 3

    eventually(turned, "the log is begun anew")
    assert b"\0" not in log.read_bytes()[:1000]  # no hole: who writes it goes on at the new end
    assert (stat.S_IMODE(log.stat().st_mode), stat.S_IMODE(old.stat().st_mode)) == (0o600, 0o600)


# --- what its parts import and read


def test_nothing_is_imported_from_where_the_user_happens_to_be(
    stack: Supervisor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder somebody else has filled: modules named as ours and as libraries, and Flower's configuration, which is
    code. `python -m` and `celery -A` would both import from the working directory first."""
    trap = tmp_path / "trap"
    trap.mkdir()
    for name in ("structlog", "broker", "celeryconfig", "flowerconfig", "sitecustomize"):
        (trap / f"{name}.py").write_text(
            f"open({str(tmp_path / 'sprung')!r}, 'w').close()\nraise ImportError('sprung')"
        )
    (trap / ".env").write_text("PERLLM_CELL=mine\nPERLLM_MODEL=weights.gguf\n")
    (trap / "weights.gguf").touch()
    monkeypatch.chdir(trap)
    stack.settings = load_settings(data_dir=stack.settings.data_dir, redis_url="redis://127.0.0.1:1")
    report = (
        "import os; from perllm.edge_worker.settings import EdgeSettings; x = EdgeSettings(); "
        "print('\\nsaw', x.cell, x.model, os.getcwd())"
    )
    stack._launch("module", [sys.executable, "-m", "perllm.scheduler"])
    stack._launch("celery", [sys.executable, "-m", "celery", "-A", "perllm.broker", "report"])
    stack._launch("probe", python(report))
    logs = {child.name: child for child in stack._children}
    eventually(lambda: not any(child.running for child in stack._children), "all have ended")
    assert not (tmp_path / "sprung").exists()
    assert "no Redis server answers" in logs["module"].last_words()
    assert "software -> celery" in logs["celery"].log_path.read_text()
    # what `.env` says there is still in force, and its paths are still those the user meant
    assert logs["probe"].last_words() == f"saw mine {trap / 'weights.gguf'} {stack.settings.data_dir / 'run'}"
