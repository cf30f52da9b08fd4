"""What a campaign showed, and what of it broke a promise. Pure but for reading the records."""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from attack.neighbour import ALLOWED, TOLD_WITHIN

#: The neighbour's share of operations on time must be at least this part of its share alone.
SHARE = 0.98
#: Seconds a node may be lost.
LOST = 5.0
#: Seconds before something happened in which its cause is looked for.
_SHORTLY = 6.0
#: A refusal, though of the server errors: RFC 9110, 9.1, for a method nobody knows.
_UNKNOWN_METHOD = "501"
_UNANSWERED = ("ConnectError", "ReadError", "WriteError", "RemoteProtocolError", "ConnectTimeout")


@dataclass
class Verdict:
    """`figures` are numbers, `kinds` what the hostile tenant tried and how it was answered, `failures` what broke."""

    figures: dict[str, Any] = field(default_factory=dict)
    kinds: dict[str, dict[str, int]] = field(default_factory=dict)
    memory: dict[str, dict[str, int]] = field(default_factory=dict)  # MB by part: alone, most, limit
    failures: list[str] = field(default_factory=list)

    def fail(self, what: str, details: Sequence[str] = (), most: int = 5) -> None:
        more = [f"… and {len(details) - most} more"] if len(details) > most else []
        self.failures.append("\n    ".join([what, *details[:most], *more]))


def judge(
    ops: Sequence[dict[str, Any]],
    lines: Sequence[dict[str, Any]],
    began: float,
    ended: float,
    *,
    share: float = SHARE,
) -> Verdict:
    """The neighbour's operations and the hostile tenant's requests held against what is promised. The attack went on
    from `began` to `ended`, s since the epoch."""
    verdict = Verdict()
    _neighbour(verdict, ops, began, ended, share, Suspects(lines, began))
    _hostile(verdict, lines)
    return verdict


class Suspects:
    """Which attacks were under way."""

    def __init__(self, lines: Sequence[dict[str, Any]], began: float) -> None:
        self._begun = [(x["at"], f"{x['kind']} {x['number']}") for x in lines if x.get("began")]
        self._began = began

    def around(self, at: float) -> str:
        """When it was, and the attacks that had begun shortly before."""
        near = [name for when, name in self._begun if at - _SHORTLY <= when <= at]
        return f"{at - self._began:+.1f} s; begun just before: {', '.join(near[-12:]) or 'none'}"


def _neighbour(
    verdict: Verdict, ops: Sequence[dict[str, Any]], began: float, ended: float, share: float, near: Suspects
) -> None:
    done = [o for o in ops if o["op"] in ALLOWED]
    alone, attacked = [o for o in done if o["at"] < began], [o for o in done if began <= o["at"] < ended]
    for name, some in (("alone", alone), ("attacked", attacked)):
        verdict.figures[f"on_time_{name}"] = _share(some)
        verdict.figures[f"operations_{name}"] = len(some)
        for op in ALLOWED:
            times = sorted(o["took"] for o in some if o["op"] == op)
            if times:
                verdict.figures[f"{op}_{name}_s_p50"] = round(statistics.median(times), 3)
                verdict.figures[f"{op}_{name}_s_max"] = times[-1]
    if not alone or not attacked:
        verdict.fail("the neighbour did nothing")
    late = [o for o in attacked if not _on_time(o)]
    needed = share * verdict.figures["on_time_alone"]
    if verdict.figures["on_time_attacked"] < needed:
        got = verdict.figures["on_time_attacked"]
        verdict.fail(f"the neighbour's share on time: {got:.3f}, needs {needed:.3f}", [_told(o, near) for o in late])
    broken = [o for o in attacked if o["failure"] and o["failure"].startswith(("5", *_UNANSWERED))]
    verdict.figures["neighbour_5xx_or_unanswered"] = len(broken)
    if broken:
        verdict.fail(
            f"{len(broken)} of the neighbour's requests got 5xx or no answer", [_told(o, near) for o in broken]
        )
    refused = [
        o for o in attacked if o["failure"] and o["failure"].startswith("4") and not o["failure"].startswith("422")
    ]
    if refused:
        verdict.fail(f"{len(refused)} of the neighbour's requests were refused", [_told(o, near) for o in refused])
    _webhooks(verdict, ops, attacked, near)


def _webhooks(
    verdict: Verdict, ops: Sequence[dict[str, Any]], attacked: Sequence[dict[str, Any]], near: Suspects
) -> None:
    told: dict[str, float] = {}
    for line in ops:
        if line["op"] == "told":
            told.setdefault(line["id"], line["at"])
    wanted = {o["id"]: o["at"] + o["took"] for o in attacked if o["op"] in ("chat", "batch") and not o["failure"]}
    lags = {i: told[i] - at for i, at in wanted.items() if i in told}
    verdict.figures["webhooks"] = len(wanted)
    verdict.figures["webhook_s_max"] = round(max(lags.values(), default=0.0), 3)
    bad = [f"never told, ended {near.around(at)}" for i, at in wanted.items() if i not in told]
    bad += [f"told {lag:.1f} s late, ended {near.around(wanted[i])}" for i, lag in lags.items() if lag > TOLD_WITHIN]
    verdict.figures["webhooks_late_or_missing"] = len(bad)
    if bad:
        verdict.fail(f"{len(bad)} of {len(wanted)} webhooks of the neighbour's came late or never", bad)


def _hostile(verdict: Verdict, lines: Sequence[dict[str, Any]]) -> None:
    attacks = Counter(x["kind"] for x in lines if x.get("began"))
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for line in lines:
        if "said" in line:
            said = line["said"]
            answers[line["kind"]][f"{said[0]}xx" if said.isdigit() and said != "429" else said] += 1
    verdict.kinds = {k: {"attacks": attacks[k], **dict(sorted(answers[k].items()))} for k in sorted(attacks)}
    verdict.figures["attacks"] = attacks.total()
    verdict.figures["hostile_requests"] = sum(c.total() for c in answers.values())
    broken = [x for x in lines if x.get("said", "").startswith("5") and x["said"] != _UNKNOWN_METHOD]
    verdict.figures["hostile_5xx"] = len(broken)
    if broken:
        by_kind = Counter(f"{x['kind']} {x['number']}: {x['request']} → {x['said']} {x['text'][:120]}" for x in broken)
        verdict.fail(f"{len(broken)} of the hostile tenant's requests got 5xx", list(by_kind), most=12)
    obeyed = [x for x in lines if x["kind"] == "flower" and x.get("said") == "200" and x["request"].startswith("POST")]
    if obeyed:
        verdict.fail(f"Flower obeyed a foreign page {len(obeyed)} times", [x["request"] for x in obeyed])


def _on_time(op: dict[str, Any]) -> bool:
    return not op["failure"] and op["took"] <= ALLOWED[op["op"]]


def _share(ops: Sequence[dict[str, Any]]) -> float:
    return round(sum(map(_on_time, ops)) / len(ops), 4) if ops else 0.0


def _told(op: dict[str, Any], near: Suspects) -> str:
    return f"{op['op']} {(op['failure'] or 'late')[:120]}, took {op['took']:.1f} s, {near.around(op['at'])}"
