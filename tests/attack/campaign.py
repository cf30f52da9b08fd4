"""One campaign: the neighbour alone, then beside the hostile tenant; then everything is held against the promises."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from chaos.checker import Violation, check
from chaos.history import History, Told
from chaos.observer import dump
from support import users
from support.wait import eventually

from attack import neighbour
from attack.hostile import Plan, start_plan
from attack.verdict import LOST, SHARE, Suspects, Verdict, judge
from attack.world import EDGES, MORE_MEMORY, Watch, World

#: What of the chaos run's invariants concerns a run in which nothing was killed on purpose.
_INVARIANTS = ("lost", "doubled", "overwritten", "path", "drift")
_MB = 1 << 20
#: Seconds beyond its time after which the hostile process is told to end.
_LATER = 20.0

#: Told of the phase, and of seconds left in it.
Show = Callable[[str, float], None]


def run(
    folder: Path,
    seed: int,
    alone: float,
    seconds: float,
    *,
    only: Sequence[str] = (),
    share: float = SHARE,
    show: Show = lambda *_: None,
) -> Verdict:
    """Attack a fresh system in `folder` for so many seconds, after so many with the neighbour alone."""
    with World(folder) as world:
        show("starting", 0)
        world.await_ready()
        watch = world.watch = Watch(world)
        calm, wild = folder / "neighbour.jsonl", folder / "hostile.jsonl"
        friend = world.spawn("neighbour", ["attack.neighbour", world.url, world.keys["neighbour"], str(calm)])
        eventually(lambda: _lives(friend, world, "neighbour") and calm.exists() and calm.stat().st_size, "it is ready")
        watch.phase = "alone"
        _pass(world, alone, "alone", show)
        plan = Plan(
            url=world.url,
            key=world.keys["hostile"],
            flower=world.flower,
            inbox=users.url_of("producer", world.server.url),
            canary=world.canary.url,
            file=str(wild),
            seed=seed,
            seconds=seconds,
            only=only,
        )
        began, watch.phase = time.time(), "attacked"
        foe = world.spawn("hostile", ["attack.lowly", start_plan(plan)])
        _pass(world, seconds + _LATER, "attacked", show, until=foe)
        ended = time.time()
        show("finishing", 0)
        alive = sorted(world.parts())
        overdue = world.overdue()
        _end(friend)
        stopped = foe.poll() if foe.poll() is not None else _end(foe)
        watch.close()
        ops, lines = neighbour.read(calm), neighbour.read(wild)
        verdict = judge(ops, lines, began, ended, share=share)
        if stopped != 0:
            verdict.fail(f"the hostile process ended with status {stopped}", world.log("hostile").splitlines()[-5:])
        near = Suspects(lines, began)
        _nodes(verdict, watch, near)
        _memory(verdict, watch)
        _ends(verdict, world, near, alive)
        verdict.figures["overdue"] = overdue
        if overdue:
            verdict.fail(f"{overdue} tasks had not ended 10 s after their deadlines")
        verdict.figures["canary_visits"] = len(world.canary.visits)
        if world.canary.visits:
            verdict.fail("a webhook reached a private address", world.canary.visits)
        accepted = [(o["id"], o["at"], o["at"] + o["took"]) for o in ops if o["op"] == "chat" and o["id"]]
        _ledger(verdict, world, accepted)
    verdict.figures["failures"] = len(verdict.failures)
    return verdict


def _pass(world: World, seconds: float, phase: str, show: Show, until: subprocess.Popen[bytes] | None = None) -> None:
    """Let time go by, but no longer than the process `until` lives."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0 and (until is None or until.poll() is None):
        world.tend()
        show(phase, left)
        time.sleep(min(0.25, left))


def _lives(process: subprocess.Popen[bytes], world: World, name: str) -> bool:
    assert process.poll() is None, world.log(name)
    return True


def _end(process: subprocess.Popen[bytes]) -> int | None:
    """Let a process come to its end; its status."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    try:
        return process.wait(timeout=90)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def _nodes(verdict: Verdict, watch: Watch, near: Suspects) -> None:
    verdict.figures["node_lost_s_max"] = round(max((g.seconds for g in watch.gaps), default=0.0), 1)
    lost = [f"{g.node} for {g.seconds:.1f} s, until {near.around(g.at)}" for g in watch.gaps if g.seconds > LOST]
    if lost:
        verdict.fail(f"a node was lost, or stood still, for longer than {LOST:g} s", lost)


def _memory(verdict: Verdict, watch: Watch) -> None:
    alone, attacked = watch.peaks["alone"], watch.peaks["attacked"]
    for part in sorted(attacked):
        base = max(alone[part], watch.peaks["start"][part])
        most, limit = attacked[part] // _MB, (base + MORE_MEMORY) // _MB
        verdict.memory[part] = {"alone": base // _MB, "most": most, "limit": limit}
        if most > limit:
            verdict.fail(f"{part} took {most} MB; alone {base // _MB} MB, the limit is {limit} MB")


def _ends(verdict: Verdict, world: World, near: Suspects, alive: list[str]) -> None:
    verdict.figures["crashes"] = len(world.crashes)
    if world.crashes:
        verdict.fail(f"{len(world.crashes)} parts ended", [f"{what}; {near.around(at)}" for at, what in world.crashes])
    parts = {"supervisor", "server", "scheduler", "inbox", "api", "webhooks", "flower", *(f"edge.{e}" for e in EDGES)}
    if missing := parts - set(alive):
        verdict.fail(f"not there at the end: {', '.join(sorted(missing))}")


def _ledger(verdict: Verdict, world: World, accepted: list[tuple[str, float, float]]) -> None:
    """Stop the system, end what has not ended, and look whether the ledger agrees with itself and with its events."""
    if (status := world.stop_system()) != 0:
        verdict.fail(f"the system did not stop when asked: status {status}", world.log("system").splitlines()[-3:])
    for state in [s for s in world.ledger.counts() if not s.final]:
        ids = world.ledger.ids(state)
        for start in range(0, len(ids), 1000):
            world.ledger.cancel_many(ids[start : start + 1000])
    world.observer.close()
    events = [e._replace(key=e.id, window=0.0) for e in world.observer.events]
    history = History(
        tried={e.id for e in events},
        told=[Told(i, i, begun, at) for i, begun, at in accepted],
        saw=[],
        events=events,
        undone=set(),
        outages=[],
        dump=dump(world.ledger),
        max_strikes=world.settings.max_strikes,
        retained=world.settings.retention_tasks,
    )
    wrong: list[Violation] = [v for v in check(history).violations if v.kind in _INVARIANTS]
    verdict.figures["tasks"] = len({e.id for e in events if e.type == "submitted"})
    verdict.figures["ledger_violations"] = len(wrong)
    verdict.figures["unreadable"] = len(unreadable := world.unreadable())
    if unreadable:
        verdict.fail(f"{len(unreadable)} records cannot be read back", unreadable)
    if wrong:
        verdict.fail("the ledger contradicts itself", [f"{v.kind} {v.subject}: {v.detail}" for v in wrong])


def details(verdict: Verdict) -> dict[str, Any]:
    """What the result's file holds beside the figures."""
    return json.loads(json.dumps({"memory_mb": verdict.memory, "kinds": verdict.kinds, "failed": verdict.failures}))
