"""CPU meters: which RAPL counters are read, wrap-around, what is not believed, and the estimate in their place."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from perllm.broker.engine.settings import EngineSettings
from perllm.edge_worker import meters
from perllm.edge_worker.meters import CpuModelMeter, RaplMeter, core_watts, make_meter, zones

RANGE = 262_143_328_850


def zone(root: Path, path: str, name: str, energy: int = 0, largest: int = RANGE) -> Path:
    folder = root / path
    folder.mkdir(parents=True)
    (folder / "name").write_text(f"{name}\n")
    (folder / "energy_uj").write_text(f"{energy}\n")
    (folder / "max_energy_range_uj").write_text(f"{largest}\n")
    return folder


@pytest.fixture
def powercap(tmp_path: Path) -> Path:
    """Two sockets with everything a kernel may show: core, uncore and dram zones, the platform, and MMIO twins."""
    for socket in (0, 1):
        package = f"intel-rapl:{socket}"
        zone(tmp_path, package, f"package-{socket}")
        zone(tmp_path, f"{package}/{package}:0", "core")
        zone(tmp_path, f"{package}/{package}:1", "uncore")
        zone(tmp_path, f"{package}/{package}:2", "dram")
        zone(tmp_path, f"{package}:0", "core")  # sysfs lists subzones beside their parents as well
        zone(tmp_path, f"{package}:2", "dram")
        zone(tmp_path, f"intel-rapl-mmio:{socket}", f"package-{socket}")
    zone(tmp_path, "intel-rapl:2", "psys")
    return tmp_path


def test_packages_and_their_memory_are_counted_once(powercap: Path) -> None:
    names = [(path.name, (path / "name").read_text().strip()) for path in zones(powercap)]
    assert names == [
        ("intel-rapl:0", "package-0"), ("intel-rapl:1", "package-1"), ("intel-rapl:0:2", "dram"),
        ("intel-rapl:1:2", "dram"),
    ]  # fmt: skip


def test_the_platform_stands_in_only_without_packages(tmp_path: Path) -> None:
    psys = zone(tmp_path, "intel-rapl:0", "psys")
    assert zones(tmp_path) == [psys]
    assert zones(tmp_path / "absent") == []


@pytest.fixture
def stat(tmp_path: Path) -> Path:
    path = tmp_path / "stat"
    path.write_text("cpu  100 0 0 1000 0 0 0 0 0 0\n")
    return path


@pytest.fixture
def one_package(tmp_path: Path) -> Iterator[Path]:
    """A package whose counter moves until told to stop."""
    folder = zone(tmp_path, "intel-rapl:0", "package-0", energy=1_000_000)
    stop = threading.Event()

    def run() -> None:
        energy = 1_000_000
        while not stop.wait(0.001):
            energy += 50_000  # 50 W
            unseen = folder / "energy_uj.new"
            unseen.write_text(f"{energy}\n")
            unseen.rename(folder / "energy_uj")

    thread = threading.Thread(target=run)
    thread.start()
    folder.joinpath("running").touch()
    yield folder
    stop.set()
    thread.join()


def set_energy(folder: Path, micro: int) -> None:
    (folder / "energy_uj").write_text(f"{micro}\n")


def meter_of(folder: Path, stat: Path, **options: float) -> RaplMeter:
    return RaplMeter(threads=1, cores=1, powercap=folder.parent, stat=stat, **options)  # type: ignore[arg-type]


def test_a_counter_that_stands_still_is_not_believed(tmp_path: Path, stat: Path) -> None:
    folder = zone(tmp_path, "intel-rapl:0", "package-0", energy=5)
    with pytest.raises(ValueError, match="stand still"):
        meter_of(folder, stat, probe=0.005)


class _Ticking:
    """Makes a counter move during the probe only."""

    def __init__(self, folder: Path, values: list[int]) -> None:
        self._folder, self._values = folder, values

    def __call__(self, _: float) -> None:
        set_energy(self._folder, self._values.pop(0))


def test_wrap_around_is_added_back(tmp_path: Path, stat: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = zone(tmp_path, "intel-rapl:0", "package-0", energy=900, largest=1000)
    monkeypatch.setattr(meters.time, "sleep", _Ticking(folder, [990]))
    meter = meter_of(folder, stat, idle=1e9)  # all of it is idle power, so all of it is ours
    first = meter.read()
    set_energy(folder, 40)  # 990 → 1000 → 40
    second = meter.read()
    set_energy(folder, 140)
    assert second - first == pytest.approx(50e-6)
    assert meter.read() - second == pytest.approx(100e-6)


def test_the_nodes_part_is_its_share_of_the_busy_time(
    tmp_path: Path, stat: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = zone(tmp_path, "intel-rapl:0", "package-0", energy=0)
    cpu = [0.0]
    monkeypatch.setattr(meters.time, "sleep", _Ticking(folder, [10]))
    monkeypatch.setattr(meters.time, "process_time", lambda: cpu[0])
    meter = meter_of(folder, stat, idle=0.0)
    before = meter.read()
    cpu[0] = 1.0
    stat.write_text("cpu  500 0 0 2000 0 0 0 0 0 0\n")  # 4 s of the machine's time, 1 s of it ours
    set_energy(folder, 8_000_010)
    assert meter.read() - before == pytest.approx(2.0)
    assert (meter.method, meter.estimated) == ("rapl", False)


def test_real_time_reading(one_package: Path, stat: Path) -> None:
    meter = meter_of(one_package, stat)
    start, began = meter.read(), time.monotonic()
    while time.monotonic() - began < 0.05:
        pass
    assert meter.read() >= start
    assert meter.idle > 0


def test_unreadable_counters_fall_back_to_an_estimate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refused(**_: object) -> RaplMeter:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(meters, "RaplMeter", refused)
    meter = make_meter(EngineSettings(tdp_watts=100, idle_watts=20), threads=1)
    assert isinstance(meter, CpuModelMeter)
    assert (meter.method, meter.estimated) == ("cpu-model", True)


def test_the_model_charges_cpu_time_and_the_nodes_part_of_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    now, cpu = [100.0], [5.0]
    monkeypatch.setattr(meters.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(meters.time, "process_time", lambda: cpu[0])
    meter = CpuModelMeter(tdp=100, idle=20, threads=2, cores=8)
    assert (meter.idle, meter.active) == (5, 20)
    now[0] += 10
    cpu[0] += 3
    assert meter.read() == pytest.approx(10 * 5 + 3 * 10)


@pytest.mark.parametrize(
    ("model", "watts"),
    [
        ("AMD EPYC 9654 96-Core Processor", 3.8),
        ("Intel(R) Xeon(R) Platinum 8480+", 6.5),
        ("13th Gen Intel(R) Core(TM) i7-1360P", 3.5),
        ("AMD Ryzen 9 5950X 16-Core Processor", 8.0),
        ("AMD EPYC", meters.UNKNOWN_CORE_WATTS),
        ("", meters.UNKNOWN_CORE_WATTS),
    ],
)
def test_watts_per_core(model: str, watts: float) -> None:
    assert core_watts(model) == watts
