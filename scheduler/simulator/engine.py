"""An inference engine with iteration-level continuous batching and chunked prefill.

Sequences join and leave between steps. While prompts wait to be prefilled, steps are taken one by one: each decodes
every running sequence and prefills up to `chunk` tokens, first come first served. While nothing is prefilled, the
batch does not change until a sequence ends, so the whole run of steps is taken at once: with K context tokens held and
B sequences, step i costs base + slope·(K + i·B), and n steps cost an arithmetic series. Whatever happens meanwhile cuts
the run at the end of the step in progress. The result is that of stepping one by one.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from perllm.broker.messages import Counters
from perllm.scheduler.simulator.clock import Clock, Timer
from perllm.scheduler.simulator.speed_changes import Pace
from perllm.scheduler.simulator.tables import StepTable

#: The longest step is remembered for between one and two of these, s.
_WINDOW = 30.0


def elapsed(first: float, growth: float, steps: int) -> float:
    """Seconds of `steps` steps of which the first takes `first` and each next one `growth` more."""
    return steps * first + growth * (steps * (steps - 1) / 2)


def steps_until(first: float, growth: float, span: float) -> int:
    """The fewest steps (at least 1) that take `span` seconds or more."""
    if growth > 0:
        b = first - growth / 2
        steps = math.ceil((math.sqrt(b * b + 2 * growth * max(span, 0.0)) - b) / growth)
    else:
        steps = math.ceil(span / first)
    steps = max(steps, 1)
    while steps > 1 and elapsed(first, growth, steps - 1) >= span:
        steps -= 1
    while elapsed(first, growth, steps) < span:
        steps += 1
    return steps


@dataclass(slots=True, eq=False)
class Sequence:
    """One request inside the engine. Times s, energies J, counts in tokens."""

    id: str
    prompt: int
    output: int  # what it will generate if nothing stops it
    reserve: int  # KV cache set aside for it
    ended: Callable[[Sequence], None]  # called when it leaves, done or stopped
    entered: float = 0.0
    started: float | None = None  # its first prefill step began
    first_token: float | None = None
    prefilled: int = 0
    generated: int = 0  # set when it leaves
    last_step: int | None = None  # the engine's step count at which it is done, once it decodes
    stopping: bool = False
    joules: float = 0.0  # of its prefill; of everything when it has left
    idle_joules: float = 0.0  # its share of the idle power while in the batch
    before: Counters = field(default_factory=Counters)


@dataclass(slots=True)
class _Run:
    """Steps of one kind in a row: `steps` of them from `start`."""

    start: float
    steps: int
    first: float
    growth: float

    @property
    def end(self) -> float:
        return self.start + elapsed(self.first, self.growth, self.steps)


class Engine:
    """The batch, who waits for it, and the running totals a worker would report."""

    def __init__(self, clock: Clock, table: StepTable, pace: Pace, *, slots: int, kv_tokens: int, chunk: int) -> None:
        self._clock, self._table, self._pace = clock, table, pace
        self._slots, self._kv_tokens, self._chunk = slots, kv_tokens, chunk
        self._waiting: deque[Sequence] = deque()
        self._prefilling: deque[Sequence] = deque()
        self._decoding: dict[str, Sequence] = {}
        self._ends: list[tuple[int, int, Sequence]] = []  # heap of (last step, order, sequence); stale ones skipped
        self._order = 0
        self._stopping: list[Sequence] = []
        self._kv_used = 0
        self._context = 0  # tokens held by the decoding sequences
        # Totals as of the last boundary between steps
        self._born = clock.now
        self._steps = self._generated = self._prefilled = self._sequence_steps = 0
        self._context_steps = 0.0
        self._busy = self._joules = 0.0
        self._share = self._idle_share = 0.0  # J a sequence that was always decoding / in the batch would have got
        self._longest = (0, 0.0, 0.0)  # window, longest step in it, longest in the one before
        # The plan from that boundary on
        self._runs: list[_Run] = []
        self._chunks: list[tuple[Sequence, int]] = []
        self._timer: Timer | None = None
        self._until = 0.0

    # --- work in and out

    def enter(self, sequence: Sequence) -> None:
        """Accept a request; it joins the batch at the next step boundary with a free slot and KV room."""
        sequence.entered = self._clock.now
        sequence.before = self.counters()
        self._waiting.append(sequence)
        self._interrupt()

    def stop(self, sequence: Sequence) -> None:
        """End a request at the next step boundary with what it has."""
        sequence.stopping = True
        self._stopping.append(sequence)
        self._interrupt()

    def halt(self) -> None:
        """The machine is gone: nothing ends any more."""
        if self._timer is not None:
            self._timer.cancel()

    # --- what a worker reports

    @property
    def joules(self) -> float:
        """Energy so far beyond idle power, J, as of the last boundary between steps."""
        return self._joules

    def counters(self) -> Counters:
        """Totals and state now. Only whole steps count."""
        now, active = self._clock.now, len(self._decoding)
        steps, context_steps, busy, joules, last = 0, 0.0, 0.0, 0.0, self._runs[0].start if self._runs else now
        longest = self._longest_until(now)
        context = self._context
        if not self._chunks:  # a step with prefill is planned alone, and over when it is accounted for
            for run in self._runs:
                if now <= run.start:
                    break
                done = run.steps if now >= run.end else steps_until(run.first, run.growth, now - run.start)
                if run.start + elapsed(run.first, run.growth, done) > now:
                    done -= 1
                time = elapsed(run.first, run.growth, done)
                context_steps += done * context + active * (done * (done - 1) / 2)
                context += done * active
                steps, busy, last = steps + done, busy + time, run.start + time
                if done and last > now - _WINDOW:
                    longest = max(longest, run.first + run.growth * (done - 1))
                joules += (self._table.watts[active] - self._table.idle_watts) * time
        return Counters.model_construct(
            steps=self._steps + steps,
            busy=self._busy + busy,
            generated=self._generated + steps * active,
            prefilled=self._prefilled,
            sequence_steps=self._sequence_steps + steps * active,
            context_steps=int(self._context_steps + context_steps),
            active=active + len(self._prefilling),
            waiting=len(self._waiting),
            free_kv=self._kv_tokens - self._kv_used,
            since_progress=now - last if self._runs else 0.0,
            longest_step=longest,
            energy=self._joules + joules + self._table.idle_watts * (now - self._born),
        )

    def progress(self) -> dict[str, int]:
        """Tokens generated so far by everyone inside."""
        done = self.counters().steps if self._decoding else 0
        found = {s.id: 0 for s in self._waiting}
        found |= {s.id: 0 for s in self._prefilling}
        for s in self._decoding.values():
            assert s.last_step is not None
            found[s.id] = s.output - (s.last_step - done)
        return found

    def _longest_until(self, now: float) -> float:
        window, here, before = self._longest
        passed = int(now / _WINDOW) - window
        return max(here, before) if passed == 0 else here if passed == 1 else 0.0

    # --- steps

    def _interrupt(self) -> None:
        """Something changes: act at the end of the step in progress, or now when there is none."""
        now = self._clock.now
        if self._timer is None:
            self._boundary()
            return
        for index, run in enumerate(self._runs):
            if now > run.end:
                continue
            if now <= run.start:
                del self._runs[index:]
            else:
                run.steps = min(run.steps, steps_until(run.first, run.growth, now - run.start))
                del self._runs[index + 1 :]
            break
        until = self._runs[-1].end if self._runs else now
        if until < self._until:
            self._timer.cancel()
            self._set_timer(until)

    def _set_timer(self, until: float) -> None:
        self._until = until
        self._timer = self._clock.at(until, self._boundary)

    def _boundary(self) -> None:
        """Between two steps: account for those taken, let sequences leave and join, plan the next."""
        self._timer = None
        ended: list[Sequence] = []
        for run in self._runs:
            if self._chunks:
                self._account_mixed(run, ended)
            else:
                self._account(run)
        self._runs, self._chunks = [], []
        self._leave(ended)
        self._join()
        self._plan()
        for sequence in ended:
            sequence.ended(sequence)

    def _account(self, run: _Run) -> None:
        """Take `run.steps` pure decode steps into the totals."""
        n, active, time = run.steps, len(self._decoding), elapsed(run.first, run.growth, run.steps)
        joules = (self._table.watts[active] - self._table.idle_watts) * time
        self._steps += n
        self._busy += time
        self._generated += n * active
        self._sequence_steps += n * active
        self._context_steps += n * self._context + active * (n * (n - 1) / 2)
        self._context += n * active
        self._joules += joules
        self._share += joules / active
        self._idle_share += self._table.idle_watts * time / active
        self._note_step(run.end, run.first + run.growth * (n - 1))

    def _account_mixed(self, run: _Run, ended: list[Sequence]) -> None:
        """Take one step that also prefilled into the totals. Decoding and prefilling share its energy by the time each
        would have added."""
        table, active, time = self._table, len(self._decoding), run.first
        tokens = sum(n for _, n in self._chunks)
        decode = table.decode(active, self._context) if active else 0.0
        decode_time = time * decode / table.mixed(active, self._context, tokens)
        decode_joules = (table.watts[active] - table.idle_watts) * decode_time
        prefill_joules = (table.prefill_watts - table.idle_watts) * (time - decode_time)
        self._steps += 1
        self._busy += time
        self._generated += active
        self._sequence_steps += active
        self._prefilled += tokens
        self._context_steps += self._context
        self._context += active
        self._joules += decode_joules + prefill_joules
        if active:
            self._share += decode_joules / active
        self._idle_share += table.idle_watts * time / (active + len(self._prefilling))
        self._note_step(run.end, time)
        for sequence, n in self._chunks:
            sequence.prefilled += n
            sequence.joules += prefill_joules * n / tokens
            if sequence.prefilled == sequence.prompt:
                self._first_token(sequence, ended)

    def _first_token(self, sequence: Sequence, ended: list[Sequence]) -> None:
        """The step that ends a prefill yields the first token."""
        self._prefilling.remove(sequence)
        self._generated += 1
        sequence.first_token = self._clock.now
        if sequence.output == 1:
            self._release(sequence, 1, ended)
            return
        sequence.last_step = self._steps + sequence.output - 1
        sequence.joules -= self._share
        self._decoding[sequence.id] = sequence
        self._context += sequence.prompt + 1
        self._order += 1
        heapq.heappush(self._ends, (sequence.last_step, self._order, sequence))

    def _leave(self, ended: list[Sequence]) -> None:
        """Let go who is done or stopped."""
        for sequence in self._stopping:
            if self._decoding.get(sequence.id) is sequence:
                assert sequence.last_step is not None
                self._leave_decoding(sequence, sequence.output - (sequence.last_step - self._steps), ended)
            elif sequence in self._prefilling:
                self._prefilling.remove(sequence)
                self._release(sequence, 0, ended)
            elif sequence in self._waiting:
                self._waiting.remove(sequence)
                ended.append(sequence)
        self._stopping.clear()
        while self._ends:
            last, _, sequence = self._ends[0]
            gone = self._decoding.get(sequence.id) is not sequence
            if not gone and last > self._steps:
                break
            heapq.heappop(self._ends)
            if not gone:
                self._leave_decoding(sequence, sequence.output, ended)

    def _leave_decoding(self, sequence: Sequence, generated: int, ended: list[Sequence]) -> None:
        del self._decoding[sequence.id]
        self._context -= sequence.prompt + generated
        sequence.joules += self._share
        self._release(sequence, generated, ended)

    def _release(self, sequence: Sequence, generated: int, ended: list[Sequence]) -> None:
        self._kv_used -= sequence.reserve
        sequence.generated = generated
        sequence.idle_joules += self._idle_share
        ended.append(sequence)

    def _join(self) -> None:
        """Take waiting sequences into the batch, in order, while slots and KV cache last."""
        while self._waiting and len(self._decoding) + len(self._prefilling) < self._slots:
            if self._kv_used + self._waiting[0].reserve > self._kv_tokens:
                break
            sequence = self._waiting.popleft()
            self._kv_used += sequence.reserve
            sequence.idle_joules -= self._idle_share
            self._prefilling.append(sequence)

    def _plan(self) -> None:
        """Plan from this boundary to the next change of the batch."""
        now, active = self._clock.now, len(self._decoding)
        if self._prefilling:
            room = self._chunk
            for sequence in self._prefilling:
                if room == 0:
                    break
                if sequence.started is None:
                    sequence.started = now
                n = min(room, sequence.prompt - sequence.prefilled)
                self._chunks.append((sequence, n))
                room -= n
            frozen, factor, _ = self._pace_at(now)
            duration = frozen + factor * self._table.mixed(active, self._context, self._chunk - room)
            self._runs.append(_Run(now, 1, duration, 0.0))
        elif active:
            self._plan_decode(now, active)
        else:
            return
        self._set_timer(self._runs[-1].end)

    def _plan_decode(self, time: float, active: int) -> None:
        """Runs of decode steps until the first sequence ends, a new one whenever the pace changes."""
        left, context = self._ends[0][0] - self._steps, float(self._context)
        while left > 0:
            frozen, factor, until = self._pace_at(time)
            first = factor * self._table.decode(active, context)
            growth = factor * self._table.slope[active] * active
            if frozen:
                run = _Run(time, 1, frozen + first, 0.0)
            else:
                run = _Run(time, min(left, steps_until(first, growth, until - time)), first, growth)
            self._runs.append(run)
            left, context, time = left - run.steps, context + active * run.steps, run.end

    def _pace_at(self, time: float) -> tuple[float, float, float]:
        """Seconds a step starting at `time` is frozen for, the factor on its time, and until when that holds."""
        factor, until = self._pace.at(time)
        frozen = 0.0
        while math.isinf(factor):
            frozen = until - time
            factor, until = self._pace.at(until)
        return frozen, factor, until

    def _note_step(self, at: float, duration: float) -> None:
        window, here, before = self._longest
        current = int(at / _WINDOW)
        if current == window:
            self._longest = (window, max(here, duration), before)
        else:
            self._longest = (current, duration, here if current == window + 1 else 0.0)
