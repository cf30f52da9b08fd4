"""Every state the model can reach, breadth first, and what must hold in all of them.

`python -m model.explore` (in tests/) explores larger bounds and prints one JSON line.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from dataclasses import dataclass, field

from model.protocol import FINAL, Action, Ledger, World, actions, finished, start


@dataclass
class Report:
    """What was found. `trace` leads to the first fault found, by a shortest way."""

    states: int = 0
    steps: int = 0
    ends: int = 0  # states from which nothing goes on
    wrong: str = ""
    trace: list[str] = field(default_factory=list)
    met: Counter[str] = field(default_factory=Counter)  # actions, with their replies

    def __str__(self) -> str:
        if not self.wrong:
            return f"{self.states} states, {self.steps} steps, {self.ends} ends: all is well"
        return "\n".join([f"{self.wrong} ({self.states} states seen):", *self.trace])


def explore(first: World, ledger: Ledger) -> Report:
    """Visit every state. Checked: nothing accepted is lost; a final state never changes, so there is one result at
    most; only who holds a task completes it; only who leads places it. And of the whole: without faults there is no way
    round in circles, and no end but with every task final, so every task ends, in whatever order things happen."""
    report = Report()
    index = {first: 0}
    came: list[tuple[int, Action | None]] = [(-1, None)]
    onward: list[list[int]] = []  # per state: those that progress leads to
    worlds = [first]
    for number, world in enumerate(worlds):  # grows as it goes
        progress = []
        for action, after, is_progress in actions(world, ledger):
            report.steps += 1
            report.met[f"{action.name}: {action.reply}" if action.reply is not None else action.name] += 1
            known = index.get(after)
            if known is None:
                known = index[after] = len(worlds)
                worlds.append(after)
                came.append((number, action))
            if is_progress:
                progress.append(known)
            if wrong := _wrong(world, after):
                report.states, report.wrong = len(worlds), wrong
                report.trace = [*_trace(came, number), str(action)]
                return report
        onward.append(progress)
        if not progress:
            report.ends += 1
            if not finished(world):
                report.states, report.wrong = len(worlds), "a task is stuck: nothing will end it"
                report.trace = _trace(came, number)
                return report
    report.states = len(worlds)
    if (circle := _circle(onward)) is not None:
        report.wrong, report.trace = "it may go round in circles for ever", _trace(came, circle)
    return report


def _wrong(before: World, after: World) -> str:
    if after.wrong:
        return after.wrong
    for old, new, accepted in zip(before.tasks, after.tasks, after.accepted, strict=True):
        if old.state in FINAL and new != old:
            return "a final state changed"
        if accepted and new.state == "absent":
            return "an accepted task is lost"
    return ""


def _trace(came: list[tuple[int, Action | None]], number: int) -> list[str]:
    steps = []
    while (action := came[number][1]) is not None:
        steps.append(str(action))
        number = came[number][0]
    return steps[::-1]


def _circle(onward: list[list[int]]) -> int | None:
    """A state on or before a circle of steps, or None."""
    entering = [0] * len(onward)
    for targets in onward:
        for target in targets:
            entering[target] += 1
    free = [n for n, count in enumerate(entering) if count == 0]
    for number in free:  # grows as it goes
        for target in onward[number]:
            entering[target] -= 1
            if entering[target] == 0:
                free.append(target)
    return next((n for n, count in enumerate(entering) if count), None)


if __name__ == "__main__":
    tasks, nodes, schedulers, faults = (int(a) for a in sys.argv[1:5]) if len(sys.argv) > 4 else (2, 2, 2, 2)
    found = explore(start(tasks, nodes, schedulers, faults), Ledger(sys.argv[5] if len(sys.argv) > 5 else ""))
    print(found)
    bounds = {"tasks": tasks, "nodes": nodes, "schedulers": schedulers, "faults": faults}
    print(json.dumps(bounds | {"states": found.states, "steps": found.steps, "ends": found.ends, "wrong": found.wrong}))
