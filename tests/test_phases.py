"""The clock of phases."""

import pytest

from duotone import phases as phases_module
from duotone.phases import Phases


def test_nested_phases_are_not_counted_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time inside an inner phase is the inner one's alone, also when it ends by an exception."""
    now = [0.0]
    monkeypatch.setattr(phases_module.time, "perf_counter", lambda: now[0])
    phases = Phases()
    now[0] += 100  # before any phase: nobody's
    with phases("outer"):
        now[0] += 1
        with pytest.raises(KeyError), phases("inner"):
            now[0] += 10
            raise KeyError
        now[0] += 2
    now[0] += 100
    with phases("inner"):
        now[0] += 5
    assert phases.seconds == {"outer": 3.0, "inner": 15.0}


def test_memory_is_seen_where_it_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """The high mark belongs to the phase in which it rose, not to those after it nor to the phase around it."""
    marks = iter(
        [{"VmHWM": 10, "VmRSS": 8}, {"VmHWM": 90, "VmRSS": 20}, {"VmHWM": 90, "VmRSS": 30}, {"VmHWM": 90, "VmRSS": 5}, {}]
    )
    monkeypatch.setattr(phases_module, "_resident_marks", lambda: next(marks))
    phases = Phases()
    with phases("read"):
        pass
    with phases("outer"), phases("inner"):
        pass
    for _ in range(2):
        with phases("read"):
            pass
    assert phases.peaks == {"read": 10, "inner": 90, "outer": 30}


@pytest.mark.skipif(not phases_module._resident_marks(), reason="memory by phase needs Linux's /proc")
def test_marks_are_this_process_s() -> None:
    """Some tens of megabytes at least; what is held is at most what was held at most."""
    marks = phases_module._resident_marks()
    assert 10e6 < marks["VmRSS"] <= marks["VmHWM"] < 1e12


class Queue:
    """A GPU's clock, which counts how often it was read."""

    def __init__(self) -> None:
        self.now, self.looks = 0.0, 0

    def mark(self) -> float:
        return self.now

    def seconds(self, since: float, until: float) -> float:
        self.looks += 1
        return until - since


def test_another_clock_is_read_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """What went before is counted by the old clock; by the new one nothing is waited for until seconds are asked for."""
    now = [0.0]
    monkeypatch.setattr(phases_module.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(phases_module, "_resident_marks", dict)
    phases, queue = Phases(), Queue()
    with phases("read"):
        now[0] += 3
        phases.time_by(queue)
        now[0] += 100  # the host's time no longer counts
        queue.now += 2
        with phases("forward"):
            queue.now += 5
    assert queue.looks == 0
    assert phases.seconds == {"read": 5.0, "forward": 5.0}
    phases.add({"forward": 7.0}.items())
    waiting = phases_module._WAITING_MARKS
    for _ in range(waiting + 2):
        with phases("solve"):
            queue.now += 1
    assert queue.looks > waiting  # they do not pile up
    assert phases.seconds == {"read": 5.0, "forward": 12.0, "solve": waiting + 2.0}
