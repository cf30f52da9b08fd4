"""The protocol as a model: the ledger's operations, and what everybody, time and chance make of them.

A `World` is one state: the ledger, the node queues, and the memory of every process. `actions` lists every step that
may come next. What the ledger does is in the functions named as in `ledger.lua`; each is atomic there, so it is one
step here, and whatever runs beside it may do anything between two steps. Clocks are not modelled: a lease, a
registration, a leadership or a deadline may lapse at any moment. Network: a call may be carried out while its reply is
lost (it is repeated then), and a message may be taken from a queue by a worker that dies of it.

Steps are of two kinds. *Progress*: what a system without faults goes on to do. *Faults*: processes that die or freeze
(their leases lapse while they live), lost replies, cancellations, passed deadlines, graceful stops, restarts. Faults
are bounded by a budget; without them everything must come to its end.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

MAX_STRIKES = 2
NOBODY = -1
FINAL = frozenset({"succeeded", "failed", "expired", "rejected", "cancelled"})

#: Ways to build it wrong. Each must be caught.
BROKEN = {
    "unfenced completion": "the ledger takes any result for a task that is not final, whoever holds the task now",
    "last completion wins": "… and even for one that is final",
    "pop before claim": "taking the message is taking the task: what was dispatched has no lease",
    "no lease expiry": "leases of running work never end",
    "dispatch in two steps": "the scheduler looks whether a task is pending, and writes and pushes later",
    "unfenced scheduler": "the ledger does not compare the leader's epoch",
    "blind submission": "a repeated submission writes the task again",
}


class Task(NamedTuple):
    """One task in the ledger. `node` and `token` (the boot that claimed it) while placed."""

    state: str = "absent"
    attempt: int = 0
    strikes: int = 0
    node: int = NOBODY
    token: int = 0
    lapsed: bool = False  # its lease
    late: bool = False  # its deadline has passed


class Node(NamedTuple):
    """One node's registration in the ledger; boot 0: none."""

    boot: int = 0
    draining: bool = False
    lapsed: bool = False


class Worker(NamedTuple):
    """One worker process; boot 0: dead. It holds at most one task: (task, attempt, phase), and takes none before it has
    registered."""

    boot: int = 0
    joined: bool = False
    holds: tuple[int, int, str] | None = None  # phases: popped, claimed, done
    stopping: bool = False


class Scheduler(NamedTuple):
    """One scheduler process. `epoch` is what it believes to lead under; 0: it stands by."""

    alive: bool = True
    epoch: int = 0
    looked: tuple[int, int, int] | None = None  # broken "dispatch in two steps": task, attempt, node


class World(NamedTuple):
    """Everything there is."""

    tasks: tuple[Task, ...]
    nodes: tuple[Node, ...]
    queues: tuple[tuple[tuple[int, int], ...], ...]  # per node: (task, attempt), in any order
    workers: tuple[Worker, ...]
    schedulers: tuple[Scheduler, ...]
    accepted: tuple[bool, ...]  # producers that know their task is in
    epoch: int
    leader: int
    faults: int  # still to come
    boots: int  # ever
    wrong: str = ""  # what must never happen and did


class Action(NamedTuple):
    """One step: its name, its arguments, and what the ledger answered, if it was asked."""

    name: str
    arguments: tuple[int, ...] = ()
    reply: Any = None

    def __str__(self) -> str:
        said = f" → {self.reply}" if self.reply is not None else ""
        return f"{self.name}({', '.join(map(str, self.arguments))}){said}"


Step = tuple[Action, World, bool]  # what happened, what is then, and whether it was progress


def start(tasks: int, nodes: int, schedulers: int, faults: int) -> World:
    """Nodes are registered, the first scheduler leads, producers are about to submit."""
    workers = tuple(Worker(boot=n + 1, joined=True) for n in range(nodes))
    return World(
        tasks=(Task(),) * tasks,
        nodes=tuple(Node(w.boot) for w in workers),
        queues=((),) * nodes,
        workers=workers,
        schedulers=(Scheduler(epoch=1), *(Scheduler(),) * (schedulers - 1)),
        accepted=(False,) * tasks,
        epoch=1,
        leader=0,
        faults=faults,
        boots=nodes,
    )


def finished(world: World) -> bool:
    """Every task has ended, and nobody holds anything any more."""
    return all(t.state in FINAL for t in world.tasks) and not any(w.holds for w in world.workers)


def put(items: tuple[Any, ...], index: int, item: Any) -> tuple[Any, ...]:
    return (*items[:index], item, *items[index + 1 :])


def put_worker(world: World, n: int, worker: Worker) -> World:
    return world._replace(workers=put(world.workers, n, worker))


# --- the ledger


class Ledger:
    """The operations of `ledger.lua`, each one step. `broken` is a key of BROKEN."""

    def __init__(self, broken: str = "") -> None:
        self.broken = broken

    def submit(self, w: World, i: int) -> World:
        if w.tasks[i].state == "absent" or self.broken == "blind submission":
            return w._replace(tasks=put(w.tasks, i, Task("pending")))
        return w

    def dispatch(self, w: World, epoch: int, i: int, attempt: int, n: int, boot: int) -> tuple[World, str]:
        if epoch != w.epoch:
            if self.broken != "unfenced scheduler":
                return w, "not_leader"
            w = w._replace(wrong="a scheduler that does not lead placed a task")
        task, node = w.tasks[i], w.nodes[n]
        if self.broken != "dispatch in two steps":
            if task.state != "pending" or task.attempt + 1 != attempt:
                return w, "refused"
            if node.boot != boot or node.draining:
                return w, "node_gone"
        task = task._replace(state="dispatched", attempt=attempt, node=n, token=0, lapsed=task.late)
        queue = tuple(sorted((*w.queues[n], (i, attempt))))
        return w._replace(tasks=put(w.tasks, i, task), queues=put(w.queues, n, queue)), "ok"

    def take_back(self, w: World, epoch: int, i: int, attempt: int) -> tuple[World, str]:
        task = w.tasks[i]
        if epoch != w.epoch:
            return w, "not_leader"
        if task.state != "dispatched" or task.attempt != attempt:
            return w, "refused"
        return self._give_back(w, i, strike=False), "ok"

    def reject(self, w: World, epoch: int, i: int) -> tuple[World, str]:
        if epoch != w.epoch:
            return w, "not_leader"
        if w.tasks[i].state != "pending":
            return w, "refused"
        return self._end(w, i, "rejected"), "ok"

    def claim(self, w: World, i: int, attempt: int, n: int, boot: int) -> tuple[World, bool]:
        task = w.tasks[i]
        if task.attempt != attempt or task.node != n:
            return w, False
        if task.state == "dispatched":
            if task.late:
                return self._end(w, i, "expired"), False
            task = task._replace(state="running", token=boot, lapsed=False)
            return w._replace(tasks=put(w.tasks, i, task)), True
        return w, task.state == "running" and task.token == boot

    def complete(self, w: World, i: int, attempt: int, boot: int) -> tuple[World, str]:
        task = w.tasks[i]
        holds = task.attempt == attempt and task.token == boot
        if self.broken == "last completion wins" and task.state in FINAL:
            w = w._replace(wrong="a task that had ended got a result")
        elif self.broken == "unfenced completion" and task.state not in FINAL and not holds:
            w = w._replace(wrong="a result was taken from an attempt that does not hold the task")
        elif not holds:
            return w, "void"
        elif task.state != "running":
            return w, "ok" if task.state == "succeeded" else "void"
        return self._end(w, i, "succeeded"), "ok"

    def fail(self, w: World, i: int, attempt: int, boot: int) -> tuple[World, str]:
        if not self._runs(w, i, attempt, boot):
            return w, "void"
        return self._give_back(w, i, strike=True), "ok"

    def hand_back(self, w: World, i: int, attempt: int, boot: int) -> tuple[World, str]:
        if not self._runs(w, i, attempt, boot):
            return w, "void"
        return self._give_back(w, i, strike=False), "ok"

    def cancel(self, w: World, i: int) -> tuple[World, str]:
        state = w.tasks[i].state
        return (w if state in FINAL else self._end(w, i, "cancelled")), state

    def expire(self, w: World) -> tuple[World, int]:
        """What is overdue ends, also where no scheduler lives."""
        overdue = [i for i, t in enumerate(w.tasks) if t.late and (t.state != "running" or t.lapsed)]
        for i in overdue:
            w = self._end(w, i, "expired")
        return w, len(overdue)

    def register(self, w: World, n: int, boot: int) -> tuple[World, bool]:
        node = w.nodes[n]
        if node.boot not in (0, boot):
            if not node.lapsed:
                return w, False
            for i in self._on(w, n, "dispatched", "running"):
                w = self._give_back(w, i, strike=w.tasks[i].state == "running")
        return w._replace(nodes=put(w.nodes, n, Node(boot))), True

    def beat(self, w: World, n: int, boot: int, holds: tuple[int, int] | None) -> tuple[World, str]:
        if w.nodes[n].boot != boot:
            return w, "unknown"
        w = w._replace(nodes=put(w.nodes, n, w.nodes[n]._replace(lapsed=False)))
        if holds is None:
            return w, "ok"
        i, attempt = holds
        if not self._runs(w, i, attempt, boot):
            return w, "stop"
        return w._replace(tasks=put(w.tasks, i, w.tasks[i]._replace(lapsed=False))), "ok"

    def drain(self, w: World, n: int, boot: int) -> World:
        if w.nodes[n].boot != boot:
            return w
        w = w._replace(nodes=put(w.nodes, n, w.nodes[n]._replace(draining=True)))
        for i in self._on(w, n, "dispatched"):
            w = self._give_back(w, i, strike=False)
        return w

    def leave(self, w: World, n: int, boot: int) -> World:
        if w.nodes[n].boot != boot:
            return w
        for i in self._on(w, n, "dispatched", "running"):
            w = self._give_back(w, i, strike=False)
        return self._forget_node(w, n)

    def sweep(self, w: World) -> tuple[World, int]:
        mended = 0
        for n, node in enumerate(w.nodes):
            if node.boot and node.lapsed:
                for i in self._on(w, n, "dispatched"):
                    if self.broken != "pop before claim":
                        w = self._give_back(w, i, strike=False)
                w, mended = self._forget_node(w, n), mended + 1
        for i in range(len(w.tasks)):
            state, lapsed = w.tasks[i].state, w.tasks[i].lapsed
            if lapsed and (
                (state == "running" and self.broken != "no lease expiry")
                or (state == "dispatched" and self.broken != "pop before claim")
            ):
                w, mended = self._give_back(w, i, strike=state == "running"), mended + 1
        for i, task in enumerate(w.tasks):
            if task.state == "pending" and task.late:
                w, mended = self._end(w, i, "expired"), mended + 1
        return w, mended

    def lead(self, w: World, s: int) -> tuple[World, int]:
        if w.leader not in (NOBODY, s):
            return w, 0
        w = w._replace(epoch=w.epoch + (w.leader == NOBODY), leader=s)
        return w, w.epoch

    # --- parts of these

    def _end(self, w: World, i: int, state: str) -> World:
        task = w.tasks[i]
        return w._replace(tasks=put(w.tasks, i, task._replace(state=state, node=NOBODY, lapsed=False, late=False)))

    def _give_back(self, w: World, i: int, *, strike: bool) -> World:
        task = w.tasks[i]._replace(strikes=w.tasks[i].strikes + strike)
        w = w._replace(tasks=put(w.tasks, i, task))
        if strike and task.strikes >= MAX_STRIKES:
            return self._end(w, i, "failed")
        if task.late:
            return self._end(w, i, "expired")
        return w._replace(tasks=put(w.tasks, i, task._replace(state="pending", node=NOBODY, token=0, lapsed=False)))

    def _forget_node(self, w: World, n: int) -> World:
        return w._replace(nodes=put(w.nodes, n, Node()), queues=put(w.queues, n, ()))

    @staticmethod
    def _on(w: World, n: int, *states: str) -> list[int]:
        return [i for i, t in enumerate(w.tasks) if t.node == n and t.state in states]

    @staticmethod
    def _runs(w: World, i: int, attempt: int, boot: int) -> bool:
        task = w.tasks[i]
        return task.state == "running" and task.attempt == attempt and task.token == boot


# --- everybody else


def actions(w: World, ledger: Ledger) -> Iterator[Step]:
    """Every step that may come next and changes anything."""
    for i in range(len(w.tasks)):
        yield from _producer(w, ledger, i)
    for s, scheduler in enumerate(w.schedulers):
        if scheduler.alive:
            yield from _scheduler(w, ledger, s)
    for n, worker in enumerate(w.workers):
        if worker.boot:
            yield from _worker(w, ledger, n)
        elif w.faults:  # not promised: the others must do without
            again = Worker(boot=w.boots + 1)
            yield Action("restart", (n,)), _fault(put_worker(w, n, again), boots=w.boots + 1), False
    yield from _time(w)


def _fault(w: World, **changes: Any) -> World:
    return w._replace(faults=w.faults - 1, **changes)


def _producer(w: World, ledger: Ledger, i: int) -> Iterator[Step]:
    if not w.accepted[i]:
        after = ledger.submit(w, i)
        yield Action("submit", (i,)), after._replace(accepted=put(w.accepted, i, True)), True
        if w.faults and after != w:
            yield Action("submit, reply lost", (i,)), _fault(after), False
    if w.tasks[i].late:  # who waits for it
        after, ended = ledger.expire(w)
        if ended:
            yield Action("expire", (i,), ended), after, True
    if w.faults and w.tasks[i].state not in FINAL | {"absent"}:
        after, reply = ledger.cancel(w, i)
        yield Action("cancel", (i,), reply), _fault(after), False


def _scheduler(w: World, ledger: Ledger, s: int) -> Iterator[Step]:
    me = w.schedulers[s]

    def i_am(world: World, **changes: Any) -> World:
        return world._replace(schedulers=put(world.schedulers, s, me._replace(**changes)))

    if w.faults and any(other.alive for n, other in enumerate(w.schedulers) if n != s):
        yield Action("kill the scheduler", (s,)), _fault(i_am(w, alive=False, epoch=0, looked=None)), False
    if me.epoch == 0:
        after, epoch = ledger.lead(w, s)
        if epoch:
            yield Action("lead", (s,), epoch), i_am(after, epoch=epoch), True
            if w.faults and after != w:
                yield Action("lead, reply lost", (s,), epoch), _fault(after), False
        return
    after, mended = ledger.sweep(w)
    if mended:
        yield Action("sweep", (s,), mended), after, True
    for i, task in enumerate(w.tasks):
        if task.state == "dispatched" and w.faults:  # it believes that its node does not take it up
            after, reply = ledger.take_back(w, me.epoch, i, task.attempt)
            if reply == "ok":
                yield Action("take back", (s, i, task.attempt), reply), _fault(after), False
        if task.state != "pending":
            continue
        if w.faults:  # its own decision that no node will do
            after, reply = ledger.reject(w, me.epoch, i)
            if reply == "ok":
                yield Action("reject", (s, i), reply), _fault(after), False
        for n, node in enumerate(w.nodes):
            if not node.boot or node.draining:
                continue
            if ledger.broken == "dispatch in two steps":
                if me.looked is None and me.epoch == w.epoch:
                    yield Action("look", (s, i, n)), i_am(w, looked=(i, task.attempt + 1, n)), True
                continue
            after, reply = ledger.dispatch(w, me.epoch, i, task.attempt + 1, n, node.boot)
            if reply == "not_leader":
                after = i_am(after, epoch=0)
            yield Action("dispatch", (s, i, task.attempt + 1, n), reply), after, True
    if me.looked is not None:
        i, attempt, n = me.looked
        after, reply = ledger.dispatch(w, w.epoch, i, attempt, n, w.nodes[n].boot)
        yield Action("dispatch", (s, i, attempt, n), reply), i_am(after, looked=None), True


def _worker(w: World, ledger: Ledger, n: int) -> Iterator[Step]:
    me = w.workers[n]

    def i_am(world: World, **changes: Any) -> World:
        return put_worker(world, n, me._replace(**changes))

    others = any(o.boot and not o.stopping for m, o in enumerate(w.workers) if m != n)
    if w.faults and others:
        yield Action("kill the worker", (n,)), _fault(put_worker(w, n, Worker())), False
        if not me.stopping and w.nodes[n].boot == me.boot:
            yield Action("stop", (n,)), _fault(i_am(ledger.drain(w, n, me.boot), stopping=True)), False
    if w.nodes[n].boot != me.boot:
        after, reply = ledger.register(w, n, me.boot)
        if reply:
            if me.stopping:
                after = ledger.drain(after, n, me.boot)
            yield Action("register", (n,), reply), i_am(after, joined=True), True
    else:
        running = me.holds[:2] if me.holds and me.holds[2] != "popped" else None
        after, said = ledger.beat(w, n, me.boot, running)
        if said == "stop":
            after = i_am(after, holds=None)
        if w.leader == NOBODY:
            after, mended = ledger.sweep(after)
            said = f"{said}, unled: {mended}" if mended else said
        if after != w:
            yield Action("beat", (n,), said), after, True
    if me.holds is None:
        if me.stopping:
            yield Action("leave", (n,)), put_worker(ledger.leave(w, n, me.boot), n, Worker()), True
        elif me.joined:
            for message in dict.fromkeys(w.queues[n]):
                rest = list(w.queues[n])
                rest.remove(message)
                after = w._replace(queues=put(w.queues, n, tuple(rest)))
                yield Action("pop", (n, *message)), i_am(after, holds=(*message, "popped")), True
        return
    i, attempt, phase = me.holds
    match phase:
        case "popped":
            after, granted = ledger.claim(w, i, attempt, n, me.boot)
            held = (i, attempt, "claimed") if granted else None
            yield Action("claim", (n, i, attempt), granted), i_am(after, holds=held), True
            if w.faults and after != w:
                yield Action("claim, reply lost", (n, i, attempt), granted), _fault(after), False
        case "claimed":
            yield Action("generate", (n,)), i_am(w, holds=(i, attempt, "done")), True
            if w.faults:
                after, reply = ledger.fail(w, i, attempt, me.boot)
                yield Action("fail", (n, i, attempt), reply), _fault(i_am(after, holds=None)), False
            if me.stopping:
                after, reply = ledger.hand_back(w, i, attempt, me.boot)
                yield Action("hand back", (n, i, attempt), reply), i_am(after, holds=None), True
        case "done":
            after, reply = ledger.complete(w, i, attempt, me.boot)
            yield Action("complete", (n, i, attempt), reply), i_am(after, holds=None), True
            if w.faults and after != w:
                yield Action("complete, reply lost", (n, i, attempt), reply), _fault(after), False


def _time(w: World) -> Iterator[Step]:
    """What lapses. It is a fault where somebody lives who should have prevented it, else time's own progress. A
    dispatched task's lease is longer than a node's registration, so on a dead node it lapses after that."""

    def lapse(name: str, arguments: tuple[int, ...], prevented: bool, **changes: Any) -> Iterator[Step]:
        if not prevented:
            yield Action(name, arguments), w._replace(**changes), True
        elif w.faults:
            yield Action(name, arguments), _fault(w, **changes), False

    for i, task in enumerate(w.tasks):
        if task.node != NOBODY and not task.lapsed:
            worker, node = w.workers[task.node], w.nodes[task.node]
            held = worker.holds is not None and worker.holds[:2] == (i, task.attempt)
            if task.state == "running":
                held = held and worker.boot == task.token
            elif worker.boot != node.boot and not node.lapsed:
                continue
            else:
                held = bool(worker.boot) and (held or (i, task.attempt) in w.queues[task.node])
            yield from lapse("a lease lapses", (i,), held, tasks=put(w.tasks, i, task._replace(lapsed=True)))
        if w.faults and not task.late and task.state not in FINAL | {"absent"}:
            # The lease on what is dispatched ends with its deadline.
            late = put(w.tasks, i, task._replace(late=True, lapsed=task.lapsed or task.state == "dispatched"))
            yield Action("a deadline passes", (i,)), _fault(w, tasks=late), False
    for n, node in enumerate(w.nodes):
        if node.boot and not node.lapsed:
            lives = w.workers[n].boot == node.boot
            yield from lapse("a node falls silent", (n,), lives, nodes=put(w.nodes, n, node._replace(lapsed=True)))
    if w.leader != NOBODY:
        yield from lapse("leadership lapses", (), w.schedulers[w.leader].alive, leader=NOBODY)
