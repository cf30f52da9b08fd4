"""A CPU node's power: RAPL where the kernel shows it, otherwise a model of the CPU, always called an estimate."""

from __future__ import annotations

import re
import threading
import time
from pathlib import Path

import structlog

from perllm.broker.engine.cores import machine_cores
from perllm.broker.engine.energy import Meter
from perllm.broker.engine.settings import EngineSettings

log = structlog.get_logger(__name__)

POWERCAP = Path("/sys/class/powercap")
#: Seconds a RAPL counter is watched before it is trusted: masked ones (virtual machines, containers) stand still.
PROBE_SECONDS = 0.05
#: A machine's idle power as part of its TDP, where nothing better is known.
IDLE_PART = 0.2
#: W per physical core at full load, where the CPU is not in the table: about what server CPUs are rated.
UNKNOWN_CORE_WATTS = 4.0

#: Part of the model name → W per physical core (rated TDP / cores), from the makers' data sheets.
CORE_WATTS = (
    (r"EPYC 9[0-9]{2}5", 3.1),  # Turin: 9755 500/128, 9655 400/96, 9965 500/192
    (r"EPYC 9[0-9]{2}4", 3.8),  # Genoa: 9654 360/96, 9554 360/64, 9754 360/128
    (r"EPYC 7[0-9]{2}3", 4.2),  # Milan: 7763 280/64, 7543 225/32
    (r"EPYC 7[0-9]{2}2", 4.2),  # Rome: 7742 225/64, 7402 180/24
    (r"Xeon.*(?:84[0-9]{2}|Platinum 8[45])", 6.5),  # Sapphire and Emerald Rapids: 8480+ 350/56, 8592+ 350/64
    (r"Xeon.*(?:83[0-9]{2}|63[0-9]{2})", 6.8),  # Ice Lake: 8380 270/40, 6338 205/32
    (r"Xeon.*(?:82[0-9]{2}|81[0-9]{2})", 7.3),  # Cascade Lake, Skylake: 8280 205/28
    (r"Xeon.*E5-26[0-9]{2}", 7.5),  # 2690 v4 135/14
    (r"Neoverse-N1|Graviton", 3.0),  # Altra Q80-30 210/80
    (r"Ryzen.*[0-9]{4}(?:U|HS?)\b", 3.5),  # mobile: 7840U 28/8
    (r"Ryzen", 8.0),  # 5950X 105/16, 7700X 105/8
    (r"Core.*(?:[0-9]{4,5}|[0-9]{3})(?:U|P|H|HX|HK)\b", 3.5),  # mobile: 1360P 28/12, 13700H 45/14
    (r"Core", 9.0),  # 12700K 125/12, 9900K 95/8
    (r"Cortex-A7[26]", 1.2),  # Raspberry Pi 4 and 5
)  # fmt: skip


def cpu_model() -> str:
    """The CPU's name as the kernel reports it."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""
    names = re.findall(r"^(?:model name|Model|Hardware)\s*:\s*(.+)$", text, re.MULTILINE)
    return names[0] if names else ""


def core_watts(model: str) -> float:
    """W per physical core at full load for a CPU of this name."""
    return next((watts for pattern, watts in CORE_WATTS if re.search(pattern, model)), UNKNOWN_CORE_WATTS)


class CpuModelMeter:
    """An estimate: the node's part of the machine's idle power, and its CPU time at the rest of the machine's TDP.

    `tdp` and `idle` are those of the machine, W; the node's part of them is `threads` of its `cores`.
    """

    method = "cpu-model"
    estimated = True
    resolution = 0.0

    def __init__(self, *, tdp: float, idle: float, threads: int, cores: int) -> None:
        self._per_cpu_second = max(0.0, tdp - idle) / cores
        self.idle = idle * min(1.0, threads / cores)
        self.active = self._per_cpu_second * threads
        self._began, self._cpu = time.monotonic(), time.process_time()

    def read(self) -> float:
        """Joules since it was made. Thread-safe."""
        cpu = time.process_time() - self._cpu
        return self.idle * (time.monotonic() - self._began) + self._per_cpu_second * cpu


class _Zone:
    """One powercap zone's counter, J, freed of its wrap-around."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "energy_uj"
        self._range = int((folder / "max_energy_range_uj").read_text())
        self._last = self._raw()
        self._total = 0

    def _raw(self) -> int:
        return int(self._file.read_text())

    def read(self) -> float:
        now = self._raw()
        self._total += now - self._last if now >= self._last else now - self._last + self._range
        self._last = now
        return self._total / 1e6


class RaplMeter:
    """The CPU packages' own energy counters (and their memory's), through powercap.

    Raises OSError or ValueError where they cannot be read. A whole machine's counter is shared with whatever else runs
    there: above its idle power, this node is given the part of it that its share of the machine's busy CPU time is.
    """

    method = "rapl"
    estimated = False
    resolution = 0.005  # the counters move about every millisecond

    def __init__(
        self,
        *,
        threads: int,
        cores: int,
        idle: float | None = None,
        powercap: Path = POWERCAP,
        stat: Path = Path("/proc/stat"),
        probe: float = PROBE_SECONDS,
    ) -> None:
        self._zones = [_Zone(folder) for folder in zones(powercap)]
        if not self._zones:
            raise FileNotFoundError("no RAPL zones")
        self._stat = stat
        self._lock = threading.Lock()
        self._began = time.monotonic()
        time.sleep(probe)
        moved = self._joules()
        if moved <= 0:
            raise ValueError("the RAPL counters stand still")
        power = moved / (time.monotonic() - self._began)
        part = min(1.0, threads / cores)
        machine_idle = idle if idle is not None else power
        self.idle = machine_idle * part
        self.active = max(power, machine_idle) * part
        self._machine_idle, self._part = machine_idle, part
        self._read, self._at = self._joules(), time.monotonic()
        self._cpu, self._busy = time.process_time(), self._busy_seconds()
        self._total = 0.0

    def _joules(self) -> float:
        return sum(zone.read() for zone in self._zones)

    def _busy_seconds(self) -> float:
        """CPU seconds the whole machine has worked."""
        fields = self._stat.read_text().split("\n", 1)[0].split()[1:]
        user, nice, system, _idle, _wait, irq, softirq = map(int, fields[:7])
        return (user + nice + system + irq + softirq) / 100  # USER_HZ

    def read(self) -> float:
        """Joules of this node since it was made. Thread-safe."""
        with self._lock:
            joules, now = self._joules(), time.monotonic()
            cpu, busy = time.process_time(), self._busy_seconds()
            energy, seconds = joules - self._read, now - self._at
            idle = min(energy, self._machine_idle * seconds)
            ours = cpu - self._cpu
            share = min(1.0, ours / max(busy - self._busy, ours)) if ours > 0 else 0.0
            self._total += idle * self._part + (energy - idle) * share
            self._read, self._at, self._cpu, self._busy = joules, now, cpu, busy
            return self._total


def zones(powercap: Path = POWERCAP) -> list[Path]:
    """The zones whose counters add up to the CPUs and their memory, none counted twice.

    Packages contain their core and uncore zones; memory (`dram`) is beside them; `psys` contains everything, and is
    used only where no package is shown. A package may be shown twice (MSR and MMIO interface): once is enough.
    """
    packages: dict[str, Path] = {}
    whole: list[Path] = []
    found = powercap.glob("intel-rapl*:*") if powercap.is_dir() else ()
    for folder in sorted(found, key=lambda folder: (folder.name.startswith("intel-rapl-mmio"), folder.name)):
        name = _name(folder)
        if name.startswith("package") and folder.name.count(":") == 1:
            packages.setdefault(name, folder)
        elif name == "psys":
            whole.append(folder)
    memory = [
        zone
        for folder in packages.values()
        for zone in sorted(folder.glob(f"{folder.name}:*"))
        if _name(zone) == "dram"
    ]
    return [*packages.values(), *memory] or whole


def _name(folder: Path) -> str:
    try:
        return (folder / "name").read_text().strip()
    except OSError:
        return ""


def make_meter(settings: EngineSettings, threads: int) -> Meter:
    """The best meter there is for an engine of so many threads on this machine."""
    cores = machine_cores()
    try:
        return RaplMeter(threads=threads, cores=cores, idle=settings.idle_watts)
    except PermissionError:
        log.warning("rapl_unreadable", hint="energy is estimated; 'chmod a+r /sys/class/powercap/*/energy_uj' as root")
    except (OSError, ValueError) as error:
        log.debug("rapl_absent", reason=str(error))
    tdp = settings.tdp_watts or core_watts(cpu_model()) * cores
    idle = settings.idle_watts if settings.idle_watts is not None else IDLE_PART * tdp
    return CpuModelMeter(tdp=tdp, idle=min(idle, tdp), threads=threads, cores=cores)
