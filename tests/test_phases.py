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
