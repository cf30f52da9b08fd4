"""The model's steps, taken on the real ledger: what it answers, and what it holds then."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

from support.make import node_info, output, receipt, why
from support.raw import prefix_of, redis_of

from model.protocol import NOBODY, Action, Ledger, World, actions
from perllm.broker.ledger import Dispatch, End
from perllm.broker.ledger import Ledger as RealLedger
from perllm.broker.messages import Counters, Heartbeat, TaskSpec
from perllm.broker.queues.app import node_message

SPEC = TaskSpec(prompt="hello", deadline=1e6)


class Stage:
    """A real ledger in the state of a world that has just started."""

    def __init__(self, ledger: RealLedger, world: World) -> None:
        self.ledger, self.redis, self.p = ledger, redis_of(ledger), prefix_of(ledger)
        self.redis.flushall()
        self.past = ledger.now() - 1
        for n, node in enumerate(world.nodes):
            assert self.ledger.register(_info(n, node.boot)) is None
        assert self.ledger.lead("s0", 600) == 1

    def take(self, before: World, action: Action) -> Any:
        """Do in earnest what the model did; returns the answer."""
        arguments = action.arguments
        match action.name.removesuffix(", reply lost"), arguments:
            case "submit", (i,):
                assert self.ledger.submit([(f"t{i}", SPEC)]) == [f"t{i}"]
            case "cancel", (i,):
                return self.cancel(i)
            case "expire", _:
                return self.expire()
            case "lead", (s,):
                return self.ledger.lead(f"s{s}", 600) or 0
            case "sweep", _:
                return self.ledger.sweep()
            case "take back", (s, i, attempt):
                return self.ledger.take_back(before.schedulers[s].epoch, [(f"t{i}", attempt)], "idle")[0]
            case "reject", (s, i):
                return self.reject(before.schedulers[s].epoch, i)
            case "dispatch", (s, i, attempt, n):
                return self.dispatch(before.schedulers[s].epoch, i, attempt, n, before.nodes[n].boot)
            case "pop", (n, i, attempt):
                for raw in self.redis.lrange(f"edge.n{n}", 0, -1):
                    if _message(raw) == (i, attempt):
                        self.redis.lrem(f"edge.n{n}", 1, raw)
                        break
            case ("claim" | "complete" | "fail" | "hand back") as name, (n, i, attempt):
                return self.attempt(name, n, i, attempt, before.workers[n].boot)
            case "register", (n,):
                answer = self.ledger.register(_info(n, before.workers[n].boot)) is None
                if before.workers[n].stopping:
                    self.ledger.drain(f"n{n}", f"boot-{before.workers[n].boot}", "stopping")
                return answer
            case "beat", (n,):
                worker = before.workers[n]
                holds = worker.holds[:2] if worker.holds and worker.holds[2] != "popped" else None
                said = self.beat(n, worker.boot, holds)
                mended = 0 if self.ledger.led() else self.ledger.sweep()
                return f"{said}, unled: {mended}" if mended else said
            case "stop", (n,):
                self.ledger.drain(f"n{n}", f"boot-{before.workers[n].boot}", "stopping")
            case "leave", (n,):
                self.ledger.leave(f"n{n}", f"boot-{before.workers[n].boot}", "stopped")
            case "a lease lapses", (i,):
                self.redis.zadd(f"{self.p}in:{before.tasks[i].state}", {f"t{i}": self.past})
            case "a deadline passes", (i,):
                self.redis.hset(f"{self.p}task:t{i}", "deadline", self.past)
                if (state := before.tasks[i].state) != "running":
                    self.redis.zadd(f"{self.p}in:{state}", {f"t{i}": self.past})
            case "a node falls silent", (n,):
                self.redis.zadd(f"{self.p}nodes", {f"n{n}": self.past})
            case "leadership lapses", _:
                self.redis.delete(f"{self.p}leader")
            case "generate" | "restart" | "kill the worker" | "kill the scheduler", _:
                pass  # in a process's own memory
            case _:
                raise NotImplementedError(str(action))
        return None

    def cancel(self, i: int) -> str:
        was = self.ledger.cancel(f"t{i}")
        self.ledger.announce()
        return was or "absent"

    def expire(self) -> int:
        ended = self.ledger.expire()
        self.ledger.announce()
        return ended

    def reject(self, epoch: int, i: int) -> str:
        return self.ledger.end(epoch, [End(f"t{i}", "rejected", why("reject"))])[0]

    def dispatch(self, epoch: int, i: int, attempt: int, n: int, boot: int) -> str:
        message = node_message(f"t{i}", attempt, f"edge.n{n}")
        one = Dispatch(f"t{i}", attempt, f"n{n}", f"boot-{boot}", "emulated", f"edge.n{n}", message, why())
        return self.ledger.dispatch(epoch, [one])[0]

    def attempt(self, name: str, n: int, i: int, attempt: int, boot: int) -> str | bool:
        task_id, token = f"t{i}", f"boot-{boot}"
        match name:
            case "claim":
                return self.ledger.claim(task_id, attempt, f"n{n}", token) is not None
            case "complete":
                return self.ledger.complete(task_id, attempt, token, "succeeded", output(), receipt(f"n{n}"))
            case "fail":
                return self.ledger.fail(task_id, attempt, token, "broke", retry=True)
            case _:
                return self.ledger.hand_back(task_id, attempt, token, "stopping")

    def beat(self, n: int, boot: int, holds: tuple[int, int] | None) -> str:
        heartbeat = Heartbeat(at=0, node=f"n{n}", boot=f"boot-{boot}", counters=Counters())
        stops = self.ledger.beat(heartbeat, [(f"t{holds[0]}", holds[1], f"boot-{boot}")] if holds else [])
        return "unknown" if stops is None else "stop" if stops else "ok"

    def seen(self, world: World) -> dict[str, Any]:
        """What the server holds, as `told` says it of the model."""
        now = self.ledger.now()
        pipe = self.redis.pipeline(transaction=False)
        tasks, nodes = range(len(world.tasks)), range(len(world.nodes))
        for i in tasks:
            pipe.hgetall(f"{self.p}task:t{i}")
            pipe.exists(f"{self.p}result:t{i}")
            for state in (
                "pending",
                "dispatched",
                "running",
                "succeeded",
                "failed",
                "expired",
                "rejected",
                "cancelled",
            ):
                pipe.zscore(f"{self.p}in:{state}", f"t{i}")
        for n in nodes:
            pipe.hmget(f"{self.p}node:n{n}", "boot", "draining")
            pipe.zscore(f"{self.p}nodes", f"n{n}")
            pipe.lrange(f"edge.n{n}", 0, -1)
            pipe.smembers(f"{self.p}node:n{n}:tasks")
        pipe.mget(f"{self.p}epoch", f"{self.p}leader")
        rows: Iterator[Any] = iter(pipe.execute())
        found: dict[str, Any] = {}
        for i in tasks:
            fields = {k.decode(): v.decode() for k, v in next(rows).items()}
            kept = bool(next(rows))
            scores = {state: score for state in STATES if (score := next(rows)) is not None}
            if not fields:
                found[f"t{i}"] = ("absent",)
                continue
            placed = fields["state"] in ("dispatched", "running")
            assert list(scores) == [fields["state"]], "it is in exactly the set of its state"
            final, withdrawn = fields["state"] in STATES[3:], "withdrawn" in fields
            assert kept == (final and not withdrawn), "who has ended has a result, or was ended by its producer"
            found[f"t{i}"] = (
                fields["state"],
                int(fields["attempt"]),
                int(fields["strikes"]),
                fields["node"] if placed else "",
                fields.get("token", ""),
                placed and scores[fields["state"]] < now,
                fields["state"] in STATES[:3] and float(fields["deadline"]) < now,
            )
        for n in nodes:
            boot, draining = next(rows)
            until, queue, held = next(rows), next(rows), next(rows)
            found[f"n{n}"] = (boot.decode() if boot else "", bool(draining), until is not None and until < now)
            found[f"queue {n}"] = sorted(map(_message, queue))
            found[f"on {n}"] = sorted(i.decode() for i in held)
        epoch, leader = next(rows)
        found["leader"] = (int(epoch), leader.decode() if leader else "")
        return found


STATES = ("pending", "dispatched", "running", "succeeded", "failed", "expired", "rejected", "cancelled")


def told(world: World) -> dict[str, Any]:
    """What the model says the server holds."""
    found: dict[str, Any] = {}
    for i, t in enumerate(world.tasks):
        node, token = f"n{t.node}" if t.node != NOBODY else "", f"boot-{t.token}" if t.token else ""
        known = (t.state, t.attempt, t.strikes, node, token, t.lapsed, t.late)
        found[f"t{i}"] = known if t.state != "absent" else ("absent",)
    for n, node_ in enumerate(world.nodes):
        found[f"n{n}"] = (f"boot-{node_.boot}" if node_.boot else "", node_.draining, node_.lapsed)
        found[f"queue {n}"] = sorted(world.queues[n])
        found[f"on {n}"] = [f"t{i}" for i, t in enumerate(world.tasks) if t.node == n]
    found["leader"] = (world.epoch, f"s{world.leader}" if world.leader != NOBODY else "")
    return found


def walk(stage: Stage, world: World, chance: random.Random, steps: int) -> Counter[str]:
    """Take random steps in the model and on the stage, comparing after each; now and then a call that nobody in his
    right mind would make. Returns what was met. Raises AssertionError with the way there."""
    model, way, met = Ledger(), [], Counter[str]()
    for _ in range(steps):
        if chance.random() < 0.2:
            action, after, answer = _odd_call(stage, model, world, chance)
        elif choices := list(actions(world, model)):
            onward = [c for c in choices if c[2]]
            action, after, _ = chance.choice(onward if onward and chance.random() < 0.6 else choices)
            answer = stage.take(world, action)
        else:
            break
        way.append(str(action))
        met[action.name if action.reply is None else f"{action.name}: {action.reply}"] += 1
        assert answer == action.reply, f"it answered {answer!r}:\n" + "\n".join(way)
        world = after
        seen, expected = stage.seen(world), told(world)
        different = {k: (seen[k], expected[k]) for k in seen if seen[k] != expected[k]}
        assert not different, f"seen and expected differ: {different}\n" + "\n".join(way)
    return met


def _odd_call(stage: Stage, model: Ledger, w: World, chance: random.Random) -> tuple[Action, World, Any]:
    """Any call with any arguments, as from a process that is far behind or mistaken."""
    i, n, s = (chance.randrange(len(x)) for x in (w.tasks, w.nodes, w.schedulers))
    attempt = w.tasks[i].attempt + chance.choice([0, 0, 0, -1, 1])
    boot = chance.choice([w.nodes[n].boot, w.tasks[i].token, 99]) or 99
    epoch = w.epoch - chance.choice([0, 1])
    after, reply, answer = w, None, None
    match chance.choice(
        [
            "dispatch",
            "dispatch",
            "dispatch",
            "reject",
            "take back",
            "claim",
            "complete",
            "fail",
            "hand back",
            "beat",
            "cancel",
            "lead",
            "submit",
        ]
    ):
        case "dispatch":
            n = next((n for n, node in enumerate(w.nodes) if node.draining), n)
            if chance.random() < 0.7:  # nothing odd but perhaps the node
                epoch, attempt, boot = w.epoch, w.tasks[i].attempt + 1, w.nodes[n].boot or 99
            after, reply = model.dispatch(w, epoch, i, attempt, n, boot)
            name, answer = "dispatch", stage.dispatch(epoch, i, attempt, n, boot)
        case "reject":
            after, reply = model.reject(w, epoch, i)
            name, answer = "reject", stage.reject(epoch, i)
        case "take back":
            after, reply = model.take_back(w, epoch, i, attempt)
            name, answer = "take back", stage.ledger.take_back(epoch, [(f"t{i}", attempt)], "idle")[0]
        case "claim":
            after, reply = model.claim(w, i, attempt, n, boot)
            name, answer = "claim", stage.attempt("claim", n, i, attempt, boot)
        case ("complete" | "fail" | "hand back") as name:
            after, reply = getattr(model, name.replace(" ", "_"))(w, i, attempt, boot)
            answer = stage.attempt(name, n, i, attempt, boot)
        case "beat":
            after, reply = model.beat(w, n, boot, (i, attempt))
            name, answer = "beat", stage.beat(n, boot, (i, attempt))
        case "cancel":
            after, reply = model.cancel(w, i) if w.tasks[i].state != "absent" else (w, "absent")
            name, answer = "cancel", stage.cancel(i)
        case "lead":
            after, reply = model.lead(w, s)
            name, answer = "lead", stage.ledger.lead(f"s{s}", 600) or 0
        case _:
            name, after = "submit", model.submit(w, i)
            assert stage.ledger.submit([(f"t{i}", SPEC)]) == [f"t{i}"]
    return Action(f"odd {name}", (s, n, i, attempt, boot, epoch), reply), after, answer


def _info(n: int, boot: int) -> Any:
    return node_info(f"n{n}", boot=f"boot-{boot}")


def _message(raw: bytes) -> tuple[int, int]:
    headers = json.loads(raw)["headers"]
    return int(headers["id"][1:]), int(headers["kwargsrepr"].split("'attempt': ")[1].split(",")[0])
