"""Energy counters, faked: what is told where they grow, wrap, reset, vanish or are shared; nothing is ever estimated."""

import importlib
import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lockstep.model.measure import energy as meter
from lockstep.model.measure.energy import (
    Energy,
    EnergyMeter,
    Factors,
    nvidia_sources,
    rapl_sources,
    tell_joules,
)
from lockstep.model.measure.stages import StageMeter
from lockstep.model.values import StageCost


class FakeSource:
    """Readings given one after the other; an exception among them is raised."""

    kind = "counter"

    def __init__(self, *readings, name: str = "gpu 0: fake"):
        self.readings, self.name, self.closed = list(readings), name, False

    def read(self) -> float:
        value = self.readings.pop(0) if len(self.readings) > 1 else self.readings[0]
        if isinstance(value, Exception):
            raise value
        return value

    def close(self) -> None:
        self.closed = True


class FakeNVML:
    """Boards with an energy counter in millijoules, or with power only, or with neither."""

    class NVMLError(Exception):
        pass

    def __init__(self, millijoules=None, milliwatts=None, pids=(), broken=False, boards=1):
        self.millijoules, self.milliwatts, self.pids, self.broken = millijoules, milliwatts, pids, broken
        self.boards = boards

    def nvmlInit(self):
        if self.broken:
            raise self.NVMLError("driver not loaded")

    def nvmlDeviceGetCount(self):
        return self.boards

    def nvmlDeviceGetHandleByIndex(self, index):
        return index

    def nvmlDeviceGetUUID(self, board):
        return f"GPU-{board}"

    def nvmlDeviceGetName(self, board):
        return b"Fake H100"

    def nvmlDeviceGetTotalEnergyConsumption(self, board):
        if self.millijoules is None:
            raise self.NVMLError("not supported")
        return self.millijoules

    def nvmlDeviceGetPowerUsage(self, board):
        if self.milliwatts is None:
            raise self.NVMLError("not supported")
        return self.milliwatts

    def nvmlDeviceGetComputeRunningProcesses(self, board):
        return [SimpleNamespace(pid=pid) for pid in self.pids]


def window(*sources) -> Energy:
    with EnergyMeter(sources).window() as taken:
        pass
    return taken[0]


def test_a_growing_counter_is_subtracted():
    taken = window(FakeSource(1000.0, 1250.0), FakeSource(5.0, 15.0, name="cpu package-0"))
    assert taken.joules == {"gpu 0: fake": 250.0, "cpu package-0": 10.0}
    assert taken.gross == 260
    assert taken.net is None  # nobody measured the rest


@pytest.mark.parametrize("readings", [(1000.0, 3.0), (OSError("gone"), 5.0), (5.0, OSError("gone"))])
def test_a_counter_that_was_reset_or_is_gone_is_not_measured(readings):
    taken = window(FakeSource(*readings), FakeSource(1.0, 2.0, name="cpu package-0"))
    assert taken.gross is None  # a sum without the board would look like less than it was
    assert taken.to_dict() == {"joules": None, "reason": "not measured", "seconds": pytest.approx(0, abs=0.1)}


def test_no_source_is_not_measured():
    assert window().to_dict(2.0, Factors(400, 0.3))["joules"] is None


def test_a_window_is_measured_also_where_its_work_fails():
    readings = EnergyMeter([FakeSource(1.0, 4.0)]).window()
    with pytest.raises(MemoryError), readings as taken:
        raise MemoryError
    assert taken[0].gross == 3


def test_net_is_gross_less_the_rest():
    measured = EnergyMeter([FakeSource(0.0, 1.0, 10.0, 30.0)])
    measured.rest(0.05)
    watts = measured.idle_watts["gpu 0: fake"]
    assert 5 < watts <= 20  # one joule in 50 ms or a little more
    taken = Energy(0.5, {"gpu 0: fake": 20.0}, {"gpu 0: fake": "counter"}, {"gpu 0: fake": watts})
    assert taken.net == pytest.approx(20 - 0.5 * watts)


def test_what_is_told_of_joules_and_only_factors_of_the_user_are_used():
    taken = Energy(10.0, {"gpu": 7200.0}, {"gpu": "counter"}, {"gpu": 20.0})
    plain = taken.to_dict(4.0)
    assert (plain["joules"], plain["net_joules"], plain["wh"], plain["mean_watts"]) == (7200, 7000, 2, 720)
    assert plain["joules_per_clip_second"] == 1800
    assert plain["sources"] == {"gpu": {"joules": 7200, "kind": "counter"}}
    assert not {"grams_co2e", "price"} & set(plain)
    priced = taken.to_dict(4.0, Factors(grams_per_kwh=400.0, price_per_kwh=0.25))
    assert (priced["grams_co2e"], priced["price"]) == (pytest.approx(0.8), pytest.approx(0.0005))
    assert taken.rough is False
    assert window(FakeSource(1.0, 2.0)).rough  # shorter than a counter's tick


# NVIDIA


def test_an_energy_counter_is_preferred_and_read_in_joules():
    nvml = FakeNVML(millijoules=5_000_000, milliwatts=300_000)
    (source,) = nvidia_sources([], nvml)
    assert (source.name, source.kind, source.read()) == ("gpu 0: Fake H100", "counter", 5000)
    nvml.millijoules = None
    with pytest.raises(OSError, match="not supported"):
        source.read()


def test_power_is_summed_where_there_is_no_counter_and_says_so():
    notes: list[str] = []
    nvml = FakeNVML(milliwatts=200_000)
    (source,) = nvidia_sources(notes, nvml)
    assert source.kind == "integrated"
    assert "no energy counter" in notes[0]
    first, started = source.read(), time.monotonic()
    time.sleep(0.2)
    joules, seconds = source.read() - first, time.monotonic() - started
    assert joules == pytest.approx(
        200 * seconds, rel=0.05
    )  # both clocks read within a fraction of a millisecond
    nvml.milliwatts = None
    with pytest.raises(OSError, match="not supported"):
        source.read()
    source.close()
    assert not source._thread.is_alive()


def test_boards_that_count_nothing_and_drivers_that_fail_are_named():
    for nvml, said in (
        (FakeNVML(), "energy is not measured: not supported"),
        (FakeNVML(broken=True), "driver not"),
    ):
        notes: list[str] = []
        assert nvidia_sources(notes, nvml) == []
        assert said in notes[0]


def test_other_processes_on_the_board_are_told():
    notes: list[str] = []
    nvidia_sources(notes, FakeNVML(millijoules=1, pids=(os.getpid(), 1, 2)))
    assert "shared with 2 other processes" in notes[0]
    nvidia_sources(alone := [], FakeNVML(millijoules=1, pids=(os.getpid(),)))
    assert alone == []
    nvidia_sources(pair := [], FakeNVML(millijoules=1, pids=(os.getpid(), 1)))
    assert "shared with 1 other process," in pair[0]


def test_in_a_container_this_process_is_not_taken_for_another():
    """The driver tells the host's numbers of processes, which are not those that a container has."""
    nvidia_sources(notes := [], FakeNVML(millijoules=1, pids=(os.getpid() + 1,)))
    assert notes == []


def test_only_the_board_that_works_on_the_clip_is_counted():
    def names(notes: list[str], uuid: str | None) -> list[str]:
        return [source.name for source in nvidia_sources(notes, FakeNVML(millijoules=1, boards=3), uuid)]

    assert names([], "GPU-1") == ["gpu 1: Fake H100"]
    assert len(names([], None)) == 3
    notes: list[str] = []
    assert len(names(notes, "MIG-7")) == 3
    assert notes == ["which board the work is done on is not known: all of them are counted"]


def test_a_run_on_the_processor_counts_no_board(monkeypatch):
    monkeypatch.setattr(meter, "nvidia_sources", lambda notes, **_: [FakeSource(1.0)])
    monkeypatch.setattr(meter, "rapl_sources", lambda notes: [FakeSource(1.0, name="cpu package-0")])
    assert [source.name for source in meter.find_sources([], torch.device("cpu"))] == ["cpu package-0"]
    assert len(meter.find_sources([])) == 2


def test_without_the_package_nothing_is_guessed(monkeypatch):
    def absent(name):
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", absent)
    notes: list[str] = []
    assert nvidia_sources(notes) == []
    assert "nvidia-ml-py is not installed" in notes[0]


# RAPL


def package(folder: Path, microjoules: int, name: str = "package-0") -> Path:
    path = folder / "intel-rapl:0"
    path.mkdir(exist_ok=True)
    (path / "energy_uj").write_text(f"{microjoules}\n")
    (path / "max_energy_range_uj").write_text("262143328850\n")
    (path / "name").write_text(f"{name}\n")
    return path


def test_processor_counters_are_read_and_wrap(tmp_path):
    path = package(tmp_path, 262_143_000_000)
    (tmp_path / "intel-rapl:0:0").mkdir()  # a part of the package, already counted in it
    (source,) = rapl_sources([], tmp_path)
    first = source.read()
    (path / "energy_uj").write_text("671150\n")
    assert source.name == "cpu package-0"
    assert source.read() - first == pytest.approx(1.0)
    (path / "energy_uj").write_text("2671150\n")
    assert source.read() - first == pytest.approx(3.0)


def test_a_processor_counter_that_wraps_between_two_readings_is_followed(tmp_path):
    """At the stage's two ends the counter only seems to have grown by 50 kJ."""
    path = package(tmp_path, 200_000_000_000)
    source = meter._RaplCounter(path, poll_seconds=0.005)
    first = source.read()
    for microjoules in (10_000_000_000, 250_000_000_000):
        package(tmp_path, microjoules)
        until = time.monotonic() + 10
        while source._last != microjoules and time.monotonic() < until:
            time.sleep(0.005)
    assert source.read() - first == pytest.approx(50_000 + 262_143.328850)
    source.close()
    assert not source._thread.is_alive()


def test_a_counter_of_the_whole_board_does_not_count_the_package_twice(tmp_path):
    package(tmp_path, 1_000_000)
    board = tmp_path / "intel-rapl:1"
    board.mkdir()
    for name, text in (("energy_uj", "5000000"), ("max_energy_range_uj", "262143328850"), ("name", "psys")):
        (board / name).write_text(text)
    assert [source.name for source in rapl_sources([], tmp_path)] == ["cpu package-0"]


def test_processor_counters_that_cannot_be_read_are_named(tmp_path):
    notes: list[str] = []
    assert rapl_sources(notes, tmp_path) == []
    assert "shows no RAPL counter" in notes[0]
    path = package(tmp_path, 1)
    (path / "energy_uj").write_text("broken")
    assert rapl_sources(notes, tmp_path) == []
    assert "intel-rapl:0" in notes[1]


def test_a_counter_for_root_only_says_how_to_enable_it(tmp_path, monkeypatch):
    package(tmp_path, 1)

    def forbidden(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(meter._RaplCounter, "read", forbidden)
    notes: list[str] = []
    assert rapl_sources(notes, tmp_path) == []
    assert "readable for root only (chmod a+r enables it)" in notes[0]


# Stages


def test_each_stage_has_its_seconds_memory_and_joules():
    stages = StageMeter(torch.device("cpu"), EnergyMeter([FakeSource(0.0, 5.0, 5.0, 12.0, 12.0, 13.0)]))
    with stages.stage("sample"):
        held = torch.ones(40_000_000)  # 160 MB
    del held
    with stages.stage("decode"):
        pass
    with stages.stage("sample"):
        time.sleep(0.01)
    assert {name: cost.joules for name, cost in stages.costs.items()} == {"sample": 6.0, "decode": 7.0}
    assert stages.seconds["sample"] > 0.01
    assert stages.costs["sample"].peak_rss_bytes > 160e6
    assert stages.costs["sample"].peak_vram_bytes is None


def test_a_stage_shorter_than_two_ticks_of_a_counter_is_rough():
    """A counter that did not move while the stage ran: its 0 J are no measurement."""
    stages = StageMeter(torch.device("cpu"), EnergyMeter([FakeSource(5.0)]))
    with stages.stage("text"):
        pass
    text = stages.costs["text"]
    assert (text.joules, text.rough) == (0, True)
    long = StageCost(1.0, joules=50.0)
    assert text.plus(text).rough
    assert not text.plus(long).rough
    assert tell_joules([text, text], 2.0)["rough"]
    assert not tell_joules([text, long], 2.0)["rough"]
    unmeasured = StageMeter(torch.device("cpu"), EnergyMeter([FakeSource(OSError("gone"))]))
    with unmeasured.stage("text"):
        pass
    assert (unmeasured.costs["text"].joules, unmeasured.costs["text"].rough) == (None, False)


def test_joules_of_a_clip_are_those_of_all_its_stages_or_none():
    both = [
        StageCost(1.0, joules=1800.0, net_joules=1500.0),
        StageCost(1.0, joules=1800.0, net_joules=1500.0),
    ]
    told = tell_joules(both, 2.0)
    assert (told["joules"], told["net_joules"], told["wh"], told["joules_per_clip_second"]) == (
        3600,
        3000,
        1,
        1800,
    )
    assert tell_joules([both[0], StageCost(1.0, joules=1.0)], 2.0)["net_joules"] is None
    for missing in ([], [both[0], StageCost(1.0)]):
        assert tell_joules(missing, 2.0) == {"joules": None, "reason": "not measured"}


def test_without_a_meter_stages_have_no_joules():
    stages = StageMeter(torch.device("cpu"))
    with stages.stage("text"):
        pass
    assert stages.costs["text"].joules is None
    assert stages.costs["text"].seconds >= 0
