"""NVIDIA GPUs through NVML: which this process may use, and the joules they take.

Source: NVML API Reference Guide, "Device Queries". CUDA is not touched, so it may be used before a fork.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Protocol

import structlog

from perllm.broker.errors import BadSetting

#: The energy counter moves every 20 to 100 ms (measured on an H200): differences over less mean nothing.
RESOLUTION = 0.1
#: Seconds between samples where power must be integrated for want of a counter.
SAMPLE_EVERY = 0.05
#: A GPU's idle power as part of its limit, where it cannot be read (an H200 of 700 W: 122 W with a model loaded).
IDLE_PART = 0.17

log = structlog.get_logger(__name__)


class Unreadable(Exception):
    """NVML does not give this value here; says why."""


class GPU(Protocol):
    """One GPU's readings."""

    name: str
    #: Whether other tenants' work is in its readings (MIG).
    shared: bool

    def energy(self) -> float:
        """Joules since the driver was loaded. Raises Unreadable."""

    def power(self) -> float:
        """Watts now. Raises Unreadable."""

    def power_limit(self) -> float:
        """Watts it may take at most. Raises Unreadable."""

    def memory(self) -> tuple[int, int]:
        """Bytes free and in all. Raises Unreadable."""


class NVMLDevice:
    """A real GPU, by its index or UUID as in CUDA_VISIBLE_DEVICES. Raises Unreadable when there is none of the name.

    A MIG instance has memory of its own but no energy or power reading: those are its board's.
    """

    def __init__(self, which: str) -> None:
        self._memory = _ask(*_finder(which))
        self._arrays = self._memory
        if which.startswith("MIG-"):
            self._arrays = _ask("nvmlDeviceGetDeviceHandleFromMigDeviceHandle", self._memory)
        self.name = str(_ask("nvmlDeviceGetName", self._arrays))
        try:
            self.shared = _ask("nvmlDeviceGetMigMode", self._arrays)[0] == 1
        except Unreadable:  # a GPU that knows no MIG
            self.shared = False

    def energy(self) -> float:
        return float(_ask("nvmlDeviceGetTotalEnergyConsumption", self._arrays)) / 1e3

    def power(self) -> float:
        return float(_ask("nvmlDeviceGetPowerUsage", self._arrays)) / 1e3

    def power_limit(self) -> float:
        return float(_ask("nvmlDeviceGetEnforcedPowerLimit", self._arrays)) / 1e3

    def memory(self) -> tuple[int, int]:
        info = _ask("nvmlDeviceGetMemoryInfo", self._memory)
        return int(info.free), int(info.total)


def _finder(which: str) -> tuple[str, Any]:
    return ("nvmlDeviceGetHandleByIndex", int(which)) if which.isdigit() else ("nvmlDeviceGetHandleByUUID", which)


def _ask(function: str, *arguments: Any) -> Any:
    """Call NVML. Raises Unreadable."""
    nvml = _loaded()
    try:
        return getattr(nvml, function)(*arguments)
    except nvml.NVMLError as error:
        raise Unreadable(str(error)) from None


@cache
def _loaded() -> Any:
    """The NVML module, initialised on first use. Raises Unreadable."""
    try:
        import pynvml  # noqa: PLC0415  only machines with a GPU need it
    except ImportError:
        raise Unreadable("nvidia-ml-py is not installed: pip install nvidia-ml-py") from None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        raise Unreadable(str(error)) from None
    return pynvml


def visible_gpus() -> list[str]:
    """The GPUs CUDA would show this process, by index or UUID. Raises Unreadable, saying why there are none."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        named = [name.strip() for name in chosen.split(",")]
        usable = [name for name in named if name not in ("", "-1")]
        if not usable:
            raise Unreadable("CUDA_VISIBLE_DEVICES hides all GPUs: unset it")
        for name in usable:
            NVMLDevice(name)
        return usable
    count = int(_ask("nvmlDeviceGetCount"))
    if not count:
        raise Unreadable("the driver knows no GPU")
    return [str(index) for index in range(count)]


def no_gpu() -> str | None:
    """Why no CUDA device can be used here; None when there is one."""
    try:
        visible_gpus()
    except Unreadable as error:
        return f"no NVIDIA GPU can be used here (NVML: {error})"
    return None


class _Counter:
    """A GPU's total energy counter (Volta and later), from zero on."""

    def __init__(self, gpu: GPU) -> None:
        self._gpu = gpu
        self._last = gpu.energy()
        self.joules = 0.0

    def update(self) -> None:
        now = self._gpu.energy()
        self.joules += max(0.0, now - self._last)  # it begins anew when the driver is loaded anew
        self._last = now


class _Integral:
    """A GPU's power, integrated over the moments it was read at (trapezoids)."""

    def __init__(self, gpu: GPU, clock: Callable[[], float]) -> None:
        self._gpu, self._clock = gpu, clock
        self._watts, self._at = gpu.power(), clock()
        self.joules = 0.0

    def update(self) -> None:
        watts, now = self._gpu.power(), self._clock()
        self.joules += (self._watts + watts) / 2 * (now - self._at)
        self._watts, self._at = watts, now


class NVMLMeter:
    """The joules of one engine's GPUs together, as a `perllm.broker.engine.energy.Meter`.

    Read from the energy counters; a GPU without one is sampled every `SAMPLE_EVERY` s and counts as estimated, as does
    one whose counter includes other MIG tenants. Raises Unreadable when a GPU gives neither. `idle` and `active` (W)
    are for the engine to set once it has measured them.
    """

    def __init__(self, gpus: Sequence[GPU], clock: Callable[[], float] = time.monotonic) -> None:
        self._lock = threading.Lock()
        self._readings: list[_Counter | _Integral] = []
        self._closed = threading.Event()
        self._lost = False
        self.method, self.estimated = "nvml", False
        self.resolution = RESOLUTION
        self.idle = self.active = 0.0
        for gpu in gpus:
            self._readings.append(self._reading(gpu, clock))
        if any(isinstance(reading, _Integral) for reading in self._readings):
            self.method, self.estimated = "nvml, sampled power", True
            threading.Thread(target=self._sample, name="perllm-power", daemon=True).start()
        if any(gpu.shared for gpu in gpus):
            log.warning(
                "mig_board_metered", hint="NVML meters whole boards only: other MIG instances' joules are in ours"
            )
            self.method, self.estimated = f"{self.method}, whole MIG board", True

    @staticmethod
    def _reading(gpu: GPU, clock: Callable[[], float]) -> _Counter | _Integral:
        try:
            return _Counter(gpu)
        except Unreadable as error:
            log.warning("energy_counter_unreadable", gpu=gpu.name, reason=str(error), hint="power is sampled instead")
            return _Integral(gpu, clock)

    def read(self) -> float:
        """Joules since the meter was made. A GPU that is lost counts no further. Thread-safe."""
        with self._lock:
            for reading in self._readings:
                try:
                    reading.update()
                except Unreadable as error:
                    if not self._lost:
                        self._lost = True
                        log.error("gpu_unreadable", reason=str(error))
            return sum(reading.joules for reading in self._readings)

    def _sample(self) -> None:
        while not self._closed.wait(SAMPLE_EVERY):
            self.read()

    def close(self) -> None:
        """Stop sampling. Idempotent."""
        self._closed.set()


class PowerLimitMeter:
    """Where NVML gives neither energy nor power: an estimate from the time the engine is busy at the power limit.

    `busy` is the engine's seconds inside steps so far; `idle` and `limit` are in W.
    """

    method = "gpu-model"
    estimated = True
    resolution = 0.0

    def __init__(self, idle: float, limit: float, busy: Callable[[], float]) -> None:
        self.idle, self.active = idle, max(0.0, limit - idle)
        self._busy, self._began, self._busy_then = busy, time.monotonic(), busy()

    def read(self) -> float:
        """Joules since the meter was made. Thread-safe."""
        return self.idle * (time.monotonic() - self._began) + self.active * (self._busy() - self._busy_then)

    def close(self) -> None:
        """Nothing to stop."""


def make_meter(
    gpus: Sequence[GPU], busy: Callable[[], float], *, tdp: float | None, idle: float | None
) -> NVMLMeter | PowerLimitMeter:
    """The best meter there is for an engine on `gpus`. `tdp` and `idle` (W, all of them together) are the user's own
    figures, for where NVML gives none. Raises BadSetting when nothing at all is known."""
    try:
        return NVMLMeter(gpus)
    except Unreadable as error:
        log.warning("power_unreadable", reason=str(error), hint="energy is estimated from busy time")
    try:
        limit = tdp or sum(gpu.power_limit() for gpu in gpus)
    except Unreadable as error:
        raise BadSetting(
            f"NVML gives neither energy nor power nor the power limit of the GPU ({error}): allow it (in a container: "
            "NVIDIA_DRIVER_CAPABILITIES=compute,utility) or set PERLLM_TDP_WATTS for an estimate"
        ) from None
    return PowerLimitMeter(idle if idle is not None else IDLE_PART * limit, limit, busy)
