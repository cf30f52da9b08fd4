"""The NVML meter and the attribution of its joules, on a GPU whose power follows a recorded profile.

The figures are those measured on an H200: 122 W idle with a model loaded, 426 to 690 W by batch size, and a counter in
mJ that moves every 20 to 100 ms.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perllm.broker.engine.energy import Attribution
from perllm.broker.errors import BadSetting
from perllm.cloud_worker.nvml import NVMLMeter, PowerLimitMeter, Unreadable, make_meter, no_gpu

IDLE = 122.0
#: Requests in the batch → W.
PROFILE = {0: IDLE, 1: 426.0, 2: 397.0, 4: 474.0, 8: 424.0, 16: 485.0, 32: 564.0, 64: 612.0}


@dataclass
class RecordedGPU:
    """Simulated time, true energy, and the counter as NVML shows it."""

    seed: int = 0
    name: str = "NVIDIA H200"
    shared: bool = False
    counts: bool = True
    tells_power: bool = True
    tells_limit: bool = True
    clock: float = 1000.0
    watts: float = IDLE
    true: float = 5.0e6  # J since the driver was loaded
    shown: float = 5.0e6
    _moves: float = 1000.0
    _random: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)

    def now(self) -> float:
        return self.clock

    def wait(self, seconds: float) -> None:
        """Let time pass at the present power."""
        until = self.clock + seconds
        while self._moves <= until:
            self.true += self.watts * (self._moves - self.clock)
            self.clock = self._moves
            self.shown = int(self.true * 1e3) / 1e3
            self._moves += self._random.uniform(0.02, 0.1)
        self.true += self.watts * (until - self.clock)
        self.clock = until

    def energy(self) -> float:
        if not self.counts:
            raise Unreadable("Not Supported")
        return self.shown

    def power(self) -> float:
        if not self.tells_power:
            raise Unreadable("Insufficient Permissions")
        return self.watts

    def power_limit(self) -> float:
        if not self.tells_limit:
            raise Unreadable("Insufficient Permissions")
        return 700.0

    def memory(self) -> tuple[int, int]:
        return 100 << 30, 140 << 30


def load(gpu: RecordedGPU, requests: int) -> None:
    gpu.watts = PROFILE[max(n for n in PROFILE if n <= requests)]


@dataclass
class Run:
    """Requests come and go, the engine steps, and every receipt is kept as it was when its request left."""

    gpu: RecordedGPU
    meter: NVMLMeter
    receipts: dict[int, tuple[float, float]] = field(default_factory=dict)  # inference, idle (J)

    def play(self, script: list[tuple[int, int, int]], step: Callable[[int], float]) -> Attribution:
        """`script`: (steps before it, tokens of prompt, tokens of output) of each request."""
        energy = Attribution(self.meter, clock=self.gpu.now)
        waiting = [(n, *request) for n, request in enumerate(script)]
        present: dict[int, list[int]] = {}  # request → [prompt still to prefill, output still to decode]
        while waiting or present:
            while waiting and (waiting[0][1] <= 0 or not present):
                n, steps, prompt, output = waiting.pop(0)
                if steps > 0:
                    load(self.gpu, 0)
                    self.gpu.wait(steps * 0.01)
                energy.enter(n)
                present[n] = [prompt, output]
            if waiting:
                n, steps, prompt, output = waiting[0]
                waiting[0] = (n, steps - 1, prompt, output)
            load(self.gpu, len(present))
            self.gpu.wait(step(len(present)))
            work = {}
            for n, left in present.items():
                work[n] = left[0] * 2.6e-5 if left[0] else 2e-5 + 5e-3 / len(present)
                left[:] = [0, left[1]] if left[0] else [0, left[1] - 1]
            energy.work(work)
            for n in [n for n, left in present.items() if left[1] <= 0]:
                used = energy.leave(n)
                self.receipts[n] = (used.inference, used.idle)
                del present[n]
        load(self.gpu, 0)
        return energy


def start(gpu: RecordedGPU) -> Run:
    meter = NVMLMeter([gpu], clock=gpu.now)
    meter.idle = IDLE
    meter.active = 300.0
    return Run(gpu, meter)


@pytest.mark.parametrize("seed", range(3))
def test_shares_of_a_busy_run_sum_to_the_counter(seed: int) -> None:
    """A run of 20 s and more: about one move of the counter stays uncharged at the end, whatever the run's length."""
    gpu = RecordedGPU(seed=seed)
    run = start(gpu)
    before = gpu.shown
    energy = run.play([(3, 256, 100)] * 1600, step=lambda n: 5e-3 + 2e-5 * n)
    energy.settle()
    counted = gpu.shown - before
    receipts = sum(inference + idle for inference, idle in run.receipts.values())
    assert counted > 10_000  # J: enough of a run to say something
    assert receipts == pytest.approx(counted, rel=0.01)
    assert receipts + energy.unattributed == pytest.approx(counted, rel=1e-9)


@given(
    seed=st.integers(0, 1 << 16),
    script=st.lists(st.tuples(st.integers(0, 40), st.integers(1, 4000), st.integers(1, 60)), min_size=1, max_size=40),
    step=st.floats(0.004, 0.3),
)
def test_shares_and_what_is_left_sum_to_the_counter_whatever_comes(
    seed: int, script: list[tuple[int, int, int]], step: float
) -> None:
    gpu = RecordedGPU(seed=seed)
    run = start(gpu)
    before = gpu.shown
    energy = run.play(script, step=lambda n: step)
    assert energy.settle() == pytest.approx(gpu.shown - before, rel=1e-9)
    receipts = sum(inference + idle for inference, idle in run.receipts.values())
    assert all(inference >= 0 and idle >= 0 for inference, idle in run.receipts.values())
    assert receipts + energy.unattributed == pytest.approx(gpu.shown - before, rel=1e-9, abs=1e-6)


def test_an_empty_node_s_idle_power_is_nobody_s() -> None:
    gpu = RecordedGPU()
    run = start(gpu)
    energy = run.play([(0, 256, 50), (6000, 256, 50)], step=lambda n: 5e-3)  # a minute with nothing to do between them
    gpu.wait(60.0)
    energy.settle()
    assert energy.unattributed == pytest.approx(IDLE * 120, rel=0.02)
    for inference, idle in run.receipts.values():
        assert idle == pytest.approx(IDLE * 51 * 5e-3, rel=0.05)
        assert inference == pytest.approx((426 - IDLE) * 51 * 5e-3, rel=0.35)  # within a counter's move of 0.1 s


def test_the_joules_of_several_gpus_are_added() -> None:
    two = [RecordedGPU(seed=1), RecordedGPU(seed=2)]
    meter = NVMLMeter(two)
    for gpu, watts in zip(two, (300.0, 500.0), strict=True):
        gpu.watts = watts
        gpu.wait(10.0)
    assert meter.read() == pytest.approx(8_000, rel=0.02)


def test_without_a_counter_power_is_integrated_and_called_estimated() -> None:
    gpu = RecordedGPU(counts=False)
    meter = NVMLMeter([gpu], clock=gpu.now)
    try:
        for watts in (100.0, 500.0, 700.0, 300.0):
            gpu.watts = watts
            for _ in range(100):
                gpu.wait(0.05)
                meter.read()
    finally:
        meter.close()
    assert meter.read() == pytest.approx(1600 * 5, rel=0.01)
    assert (meter.method, meter.estimated) == ("nvml, sampled power", True)


def test_a_counter_is_measured() -> None:
    meter = NVMLMeter([RecordedGPU()])
    assert (meter.method, meter.estimated, meter.read()) == ("nvml", False, 0.0)


def test_a_board_shared_by_mig_is_not_called_measured() -> None:
    meter = NVMLMeter([RecordedGPU(shared=True)])
    assert meter.estimated
    assert "MIG" in meter.method


def test_a_reload_of_the_driver_does_not_let_the_meter_fall() -> None:
    gpu = RecordedGPU()
    meter = NVMLMeter([gpu])
    gpu.wait(5.0)
    before = meter.read()
    gpu.true = gpu.shown = 3.0
    assert meter.read() == before
    gpu.wait(1.0)
    assert meter.read() == pytest.approx(before + IDLE, rel=0.15)


def test_a_lost_gpu_counts_no_further_while_the_others_do() -> None:
    lost, other = RecordedGPU(seed=1), RecordedGPU(seed=2)
    meter = NVMLMeter([lost, other])
    lost.wait(1.0)
    other.wait(1.0)
    before = meter.read()
    lost.counts = False
    lost.wait(9.0)
    other.wait(9.0)
    assert meter.read() == pytest.approx(before + 9 * IDLE, rel=0.02)


def test_without_permission_the_energy_is_estimated_from_busy_time() -> None:
    gpu = RecordedGPU(counts=False, tells_power=False)
    busy = 0.0
    meter = make_meter([gpu], lambda: busy, tdp=None, idle=100.0)
    assert isinstance(meter, PowerLimitMeter)
    assert meter.estimated
    before = meter.read()
    busy = 10.0
    assert meter.read() - before == pytest.approx(6_000, rel=0.02)  # 10 s at the 700 W limit, beyond 100 W idle


def test_nothing_readable_asks_for_the_user_s_own_figure() -> None:
    gpu = RecordedGPU(counts=False, tells_power=False, tells_limit=False)
    with pytest.raises(BadSetting, match=r"Insufficient Permissions.*PERLLM_TDP_WATTS"):
        make_meter([gpu], lambda: 0.0, tdp=None, idle=None)
    assert make_meter([gpu], lambda: 0.0, tdp=300.0, idle=None).active == pytest.approx(300 * 0.83)


def test_hidden_gpus_are_no_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "unset it" in (no_gpu() or "")
