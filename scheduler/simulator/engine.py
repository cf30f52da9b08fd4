"""An inference engine with iteration-level continuous batching and chunked prefill.

Requests join and leave between steps. While prompts wait to be prefilled, steps are taken one by one: each decodes
every running request and prefills up to `chunk` tokens, first come first served. While nothing is prefilled, the
batch does not change until a request ends, so the whole series of steps is taken at once: with K context tokens held
and B requests, step i costs base + slope·(K + i·B), and n steps cost an arithmetic series. Whatever happens meanwhile
cuts the series at the end of the step in progress. The result is that of stepping one by one.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from perllm.broker.messages import Counters
from perllm.scheduler.simulator.clock import Clock, Timer
from perllm.scheduler.simulator.speed_changes import PiecewiseConstant
from perllm.scheduler.simulator.step_table import StepTable

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
class Request:
    """One request inside the engine. Times s, energies J, counts in tokens."""

    id: str
    prompt: int
    output: int  # what it will generate if nothing stops it
    reserve: int  # KV cache set aside for it
    ended: Callable[[Request], None]  # called when it leaves, done or stopped
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
class _StepSeries:
    """`steps` steps of one kind in a row from `start` (s): the first takes `first` s, each next one `growth` s more."""

    start: float
    steps: int
    first: float
    growth: float

    @property
    def end(self) -> float:
        return self.start + elapsed(self.first, self.growth, self.steps)


class Engine:
    """The batch, who waits for it, and the running totals a worker would report."""

    def __init__(
        self,
        clock: Clock,
        table: StepTable,
        step_time_factor: PiecewiseConstant,
        *,
        slots: int,
        kv_tokens: int,
        chunk: int,
    ) -> None:
        self._clock, self._table, self._step_time_factor = clock, table, step_time_factor
        self._slots, self._kv_tokens, self._chunk = slots, kv_tokens, chunk
        self._waiting: deque[Request] = deque()
        self._prefilling: deque[Request] = deque()
        self._decoding: dict[str, Request] = {}
        self._ends: list[tuple[int, int, Request]] = []  # heap of (last step, order, request); stale ones skipped
        self._order = 0
        self._stopping: list[Request] = []
        self._kv_used = 0
        self._context = 0  # tokens held by the decoding requests
        # Totals as of the last boundary between steps
        self._born = clock.now
        self._steps = self._generated = self._prefilled = self._sequence_steps = 0
        self._context_steps = 0.0
        self._busy = self._joules = 0.0
        self._share = self._idle_share = 0.0  # J a request that was always decoding / in the batch would have got
        self._longest = (0, 0.0, 0.0)  # window, longest step in it, longest in the one before
        # The plan from that boundary on
        self._planned: list[_StepSeries] = []
        self._chunks: list[tuple[Request, int]] = []
        self._timer: Timer | None = None
        self._until = 0.0

    # --- work in and out

    def enter(self, request: Request) -> None:
        """Accept a request; it joins the batch at the next step boundary with a free slot and KV room."""
        request.entered = self._clock.now
        request.before = self.counters()
        self._waiting.append(request)
        self._interrupt()

    def stop(self, request: Request) -> None:
        """End a request at the next step boundary with what it has."""
        request.stopping = True
        self._stopping.append(request)
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
        steps, context_steps, busy, joules, last = 0, 0.0, 0.0, 0.0, self._planned[0].start if self._planned else now
        longest = self._longest_until(now)
        context = self._context
        if not self._chunks:  # a step with prefill is planned alone, and over when it is accounted for
            for series in self._planned:
                if now <= series.start:
                    break
                done = (
                    series.steps if now >= series.end else steps_until(series.first, series.growth, now - series.start)
                )
                if series.start + elapsed(series.first, series.growth, done) > now:
                    done -= 1
                time = elapsed(series.first, series.growth, done)
                context_steps += done * context + active * (done * (done - 1) / 2)
                context += done * active
                steps, busy, last = steps + done, busy + time, series.start + time
                if done and last > now - _WINDOW:
                    longest = max(longest, series.first + series.growth * (done - 1))
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
            since_progress=now - last if self._planned else 0.0,
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
        for index, series in enumerate(self._planned):
            if now > series.end:
                continue
            if now <= series.start:
                del self._planned[index:]
            else:
                series.steps = min(series.steps, steps_until(series.first, series.growth, now - series.start))
                del self._planned[index + 1 :]
            break
        until = self._planned[-1].end if self._planned else now
        if until < self._until:
            self._timer.cancel()
            self._set_timer(until)

    def _set_timer(self, until: float) -> None:
        self._until = until
        self._timer = self._clock.at(until, self._boundary)

    def _boundary(self) -> None:
        """Between two steps: account for those taken, let requests leave and join, plan the next."""
        self._timer = None
        ended: list[Request] = []
        for series in self._planned:
            if self._chunks:
                self._account_mixed(series, ended)
            else:
                self._account_decode(series)
        self._planned, self._chunks = [], []
        self._leave(ended)
        self._join()
        self._plan()
        for request in ended:
            request.ended(request)

    def _account_decode(self, series: _StepSeries) -> None:
        """Take decode steps into the totals."""
        n, active, time = series.steps, len(self._decoding), elapsed(series.first, series.growth, series.steps)
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
        self._note_step(series.end, series.first + series.growth * (n - 1))

    def _account_mixed(self, series: _StepSeries, ended: list[Request]) -> None:
        """Take one step that also prefilled into the totals. Decoding and prefilling share its energy by the time each
        would have added."""
        table, active, time = self._table, len(self._decoding), series.first
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
        self._note_step(series.end, time)
        for request, n in self._chunks:
            request.prefilled += n
            request.joules += prefill_joules * n / tokens
            if request.prefilled == request.prompt:
                self._first_token(request, ended)

    def _first_token(self, request: Request, ended: list[Request]) -> None:
        """The step that ends a prefill yields the first token."""
        self._prefilling.remove(request)
        self._generated += 1
        request.first_token = self._clock.now
        if request.output == 1:
            self._release(request, 1, ended)
            return
        request.last_step = self._steps + request.output - 1
        request.joules -= self._share
        self._decoding[request.id] = request
        self._context += request.prompt + 1
        self._order += 1
        heapq.heappush(self._ends, (request.last_step, self._order, request))

    def _leave(self, ended: list[Request]) -> None:
        """Let go who is done or stopped."""
        for request in self._stopping:
            if self._decoding.get(request.id) is request:
                assert request.last_step is not None
                self._leave_decoding(request, request.output - (request.last_step - self._steps), ended)
            elif request in self._prefilling:
                self._prefilling.remove(request)
                self._release(request, 0, ended)
            elif request in self._waiting:
                self._waiting.remove(request)
                ended.append(request)
        self._stopping.clear()
        while self._ends:
            last, _, request = self._ends[0]
            gone = self._decoding.get(request.id) is not request
            if not gone and last > self._steps:
                break
            heapq.heappop(self._ends)
            if not gone:
                self._leave_decoding(request, request.output, ended)

    def _leave_decoding(self, request: Request, generated: int, ended: list[Request]) -> None:
        del self._decoding[request.id]
        self._context -= request.prompt + generated
        request.joules += self._share
        self._release(request, generated, ended)

    def _release(self, request: Request, generated: int, ended: list[Request]) -> None:
        self._kv_used -= request.reserve
        request.generated = generated
        request.idle_joules += self._idle_share
        ended.append(request)

    def _join(self) -> None:
        """Take waiting requests into the batch, in order, while slots and KV cache last."""
        while self._waiting and len(self._decoding) + len(self._prefilling) < self._slots:
            if self._kv_used + self._waiting[0].reserve > self._kv_tokens:
                break
            request = self._waiting.popleft()
            self._kv_used += request.reserve
            request.idle_joules -= self._idle_share
            self._prefilling.append(request)

    def _plan(self) -> None:
        """Plan from this boundary to the next change of the batch."""
        now, active = self._clock.now, len(self._decoding)
        if self._prefilling:
            room = self._chunk
            for request in self._prefilling:
                if room == 0:
                    break
                if request.started is None:
                    request.started = now
                n = min(room, request.prompt - request.prefilled)
                self._chunks.append((request, n))
                room -= n
            frozen, factor, _ = self._factor_at(now)
            duration = frozen + factor * self._table.mixed(active, self._context, self._chunk - room)
            self._planned.append(_StepSeries(now, 1, duration, 0.0))
        elif active:
            self._plan_decode(now, active)
        else:
            return
        self._set_timer(self._planned[-1].end)

    def _plan_decode(self, time: float, active: int) -> None:
        """Decode steps until the first request ends, a new series whenever the node's speed changes."""
        left, context = self._ends[0][0] - self._steps, float(self._context)
        while left > 0:
            frozen, factor, until = self._factor_at(time)
            first = factor * self._table.decode(active, context)
            growth = factor * self._table.slope[active] * active
            if frozen:
                series = _StepSeries(time, 1, frozen + first, 0.0)
            else:
                series = _StepSeries(time, min(left, steps_until(first, growth, until - time)), first, growth)
            self._planned.append(series)
            left, context, time = left - series.steps, context + active * series.steps, series.end

    def _factor_at(self, time: float) -> tuple[float, float, float]:
        """Seconds a step starting at `time` is frozen for, the factor on its time, and until when that holds."""
        factor, until = self._step_time_factor.at(time)
        frozen = 0.0
        while math.isinf(factor):
            frozen = until - time
            factor, until = self._step_time_factor.at(until)
        return frozen, factor, until

    def _note_step(self, at: float, duration: float) -> None:
        window, here, before = self._longest
        current = int(at / _WINDOW)
        if current == window:
            self._longest = (window, max(here, duration), before)
        else:
            self._longest = (current, duration, here if current == window + 1 else 0.0)
