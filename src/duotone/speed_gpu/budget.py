"""Time for a run of several parts: each has its share of what is left, and what one does not use is left to the rest."""

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from duotone.errors import DuotoneError, gist

Row = dict[str, Any]


@dataclass(frozen=True)
class Deadline:
    """Until when a part may begin with something, and how many seconds it had."""

    end: float
    seconds: float
    now: Callable[[], float]

    def is_over(self) -> bool:
        """Whether it is time for the next part."""
        return self.now() >= self.end

    @property
    def reason(self) -> str:
        """Why a thing was not measured."""
        return f"the {self.seconds:.0f} s of this part were over; --minutes gives more, --only all to one part"

    def attempt(self, facts: Row, measure: Callable[[], Iterator[Row]]) -> Iterator[Row]:
        """The rows of one measurement, each with these facts; a row with the reason where time is over or it fails.

        Raises DuotoneError as it comes: that is no failure to measure but an answer that nobody should have.
        """
        if self.is_over():
            yield facts | {"unmeasured": self.reason}
            return
        try:
            for row in measure():
                yield facts | row
        except DuotoneError:
            raise
        except Exception as error:  # whatever a compiler, a driver or another's package may raise: the other rows matter
            yield facts | {"unmeasured": gist(error)}
            if torch.cuda.is_available():
                with suppress(RuntimeError):  # after some failures nothing on the device works any more
                    torch.cuda.empty_cache()


class Budget:
    """Seconds for parts with their shares, in the order in which they come."""

    def __init__(self, seconds: float, shares: dict[str, float], now: Callable[[], float] = time.monotonic) -> None:
        self._end, self._shares, self._now = now() + seconds, shares, now

    def part(self, name: str) -> Deadline:
        """When this part has to end, which begins now: its share among those that are to come."""
        names = list(self._shares)
        to_come = names[names.index(name) :]
        now = self._now()
        seconds = max(0.0, self._end - now) * self._shares[name] / sum(self._shares[each] for each in to_come)
        return Deadline(now + seconds, seconds, self._now)
