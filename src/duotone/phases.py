"""Where time and memory go: seconds by phase, nested phases not counted twice; the peak of resident memory."""

import ctypes
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

#: Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _NEVER = -1, -4, 2**31 - 1


class Phases:
    """Seconds by phase. A phase entered inside another stops the outer one's clock.

    peaks: by phase, the most memory that this process was seen to hold: its high mark where that rose in the phase, else what
    it held at the phase's end. Empty where the system does not tell (other than Linux).
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.peaks: dict[str, int] = {}
        self._running: list[str] = []
        self._high = 0
        self._since = time.perf_counter()

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

    def add(self, seconds: dict[str, float]) -> None:
        """Count what an earlier run has spent."""
        for phase, more in seconds.items():
            self.seconds[phase] = self.seconds.get(phase, 0.0) + more

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
        now = time.perf_counter()
        if self._running:
            phase = self._running[-1]
            self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._since
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
