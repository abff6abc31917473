"""Where time and memory go: seconds by phase, nested phases not counted twice; the peak of resident memory."""

import ctypes
import resource
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

#: Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _NEVER = -1, -4, 2**31 - 1


#: Marks that wait for their seconds to be read.
_WAITING_MARKS = 1024


class Clock(Protocol):
    """What marks points in time and tells the seconds between two of them, perhaps later than they were made."""

    def mark(self) -> Any:
        """This point in time."""
        ...

    def seconds(self, since: Any, until: Any) -> float:
        """From one mark to a later one."""
        ...


class HostClock:
    """This process's time."""

    def mark(self) -> float:
        """Now."""
        return time.perf_counter()

    def seconds(self, since: float, until: float) -> float:
        """Their difference."""
        return until - since


class Phases:
    """Seconds by phase. A phase entered inside another stops the outer one's clock.

    A GPU's work goes on after it was asked for: its clock (`time_by`) marks the points in its own queue where a phase's work
    begins and ends, and nobody waits for it in between.

    peaks: by phase, the most memory that this process was seen to hold: its high mark where that rose in the phase, else what
    it held at the phase's end. Empty where the system does not tell (other than Linux).
    """

    def __init__(self) -> None:
        self.peaks: dict[str, int] = {}
        self._seconds: dict[str, float] = {}
        self._marks: list[tuple[str, Any, Any]] = []
        self._running: list[str] = []
        self._high = 0
        self._clock: Clock = HostClock()
        self._since = self._clock.mark()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Count the time of the with-block under `phase`."""
        self._charge()
        self._running.append(phase)
        try:
            yield
        finally:
            self._charge()
            self._running.pop()
            self._look(phase)

    @property
    def seconds(self) -> dict[str, float]:
        """By phase, of all phases that have ended; of a GPU's, once it has done their work."""
        marks, self._marks = self._marks, []
        self.add((phase, self._clock.seconds(since, until)) for phase, since, until in marks)
        return self._seconds

    def add(self, seconds: Iterable[tuple[str, float]]) -> None:
        """Count what an earlier run has spent."""
        for phase, more in seconds:
            self._seconds[phase] = self._seconds.get(phase, 0.0) + more

    def time_by(self, clock: Clock) -> None:
        """From here on take the time by another clock."""
        self._charge()
        _ = self.seconds  # by the clock that there was
        self._clock = clock
        self._since = clock.mark()

    def peak_bytes(self) -> int:
        """Most memory this process was seen to hold: Linux counts roughly, and its mark may step back a little."""
        return max(peak_resident_bytes(), *self.peaks.values(), 0)

    def _look(self, phase: str) -> None:
        marks = _resident_marks()
        if marks:
            seen = marks["VmHWM"] if marks["VmHWM"] > self._high else marks["VmRSS"]
            self._high = marks["VmHWM"]
            self.peaks[phase] = max(self.peaks.get(phase, 0), seen)

    def _charge(self) -> None:
        now = self._clock.mark()
        if self._running:
            self._marks.append((self._running[-1], self._since, now))
            if len(self._marks) > _WAITING_MARKS:
                _ = self.seconds
        self._since = now


def peak_resident_bytes() -> int:
    """Most memory this process has held. Linux's own mark, since getrusage's survives exec and would count a parent's."""
    marks = _resident_marks()
    if marks:
        return marks["VmHWM"]
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _resident_marks() -> dict[str, int]:
    """Bytes of memory that this process held at most (VmHWM) and holds (VmRSS); empty where the system does not tell."""
    status = Path("/proc/self/status")
    if not status.exists():
        return {}
    lines = (line.split() for line in status.read_text(encoding="ascii", errors="replace").splitlines())
    marks = {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines if words[0] in {"VmHWM:", "VmRSS:"}}
    return marks if len(marks) == 2 else {}


def reuse_memory() -> None:
    """From here on, this process takes large tensors from memory it has freed, and gives that back by `return_memory` only.

    glibc asks the system for every tensor beyond 32 MB and hands it back at once; each page is then cleared anew.
    """
    option = getattr(ctypes.CDLL(None), "mallopt", None)
    if option is not None:
        option(_M_MMAP_MAX, 0)
        option(_M_TRIM_THRESHOLD, _NEVER)


def return_memory() -> None:
    """Give freed memory back to the system: glibc keeps it, in pieces that the next block's tensors do not fit into."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
