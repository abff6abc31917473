# Shapes: T tokens, K in_features.
"""What is seen of all batches on their way through one block: moments of what linears read, and how far it has drifted."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from duotone.calibrate.walk import Arrival, BlockWalk, walking_batch
from duotone.models.convolutions import CHANNELS_FIRST
from duotone.models.experts import FEW_TOKENS, Experts
from duotone.phases import Phases
from duotone.ranks import ALONE, Ranks
from duotone.solver.statistics import Statistics, StatisticsAccumulator

#: Tokens for each of an expert's inputs, below which its drift is left alone: its estimate would be noise. docs/LOG.md.
ENOUGH_TOKENS = 4
_END: Any = object()


@dataclass
class Observer:
    """All batches inside one block; hands out the statistics of one group of linears after the other.

    ranks: the processes whose batches these statistics are of. absmax: the largest input magnitude of each channel [K], by the
    group's first linear. index: the block's.
    """

    quantized: BlockWalk
    original: BlockWalk | None
    phases: Phases
    ranks: Ranks = ALONE
    absmax: dict[str, Tensor] = field(default_factory=dict)
    index: int = 0

    @torch.no_grad()
    def observe(self, name: str, statistics: bool = True, expert: bool = False) -> Statistics | None:
        """Walk on to the linear `name`; second moments of what it reads there, and its drift when the original walks along.

        Without `statistics` only the largest input magnitudes are taken. expert: batches may send it no token; the original
        runs it on the same tokens first. Of few tokens the drift is not told.
        """
        sums: StatisticsAccumulator | None = None
        arrivals = self.quantized.past(name) if expert else self.quantized.until(name)
        original = _nothing() if self.original is None else self.original.past(name) if expert else self.original.until(name)
        while True:
            with self.phases("forward"):
                at, meant = next(arrivals, _END), next(original, _END)
            if at is _END:
                break
            if at is None:
                continue
            largest_K = at.x.abs().flatten(0, -2).amax(0).float()
            self.absmax[name] = torch.maximum(self.absmax[name], largest_K) if name in self.absmax else largest_K
            if statistics:
                with self.phases("hessian"):
                    sums = sums or StatisticsAccumulator(at.x.shape[-1], at.x.device)
                    sums.add(at.x, *self._meant(name, at, meant, expert))
        if self.ranks.size > 1:
            sums = self._pool(name, sums, statistics)
        found = None if sums is None else sums.finish(name)
        if expert and found is not None and found.tokens < ENOUGH_TOKENS * len(found.hessian):
            return replace(found, input_drift=None, input_drift_mean=None)
        return found

    def show_starved(self, bank: str, experts: Experts, original: Experts | None, least: int = FEW_TOKENS) -> int:
        """Walk on to a bank of experts and see which of them get too few tokens to calibrate on: these will be shown all.

        original: the bank with its original weights, whose experts will see the tokens that these do. Returns how many experts
        got fewer tokens than `least`.
        """
        counts = torch.zeros(experts.count, dtype=torch.int64)
        sent: list[Tensor] = []
        with self.phases("forward"):
            for arrival in self.quantized.until(bank):
                counts += experts.tokens_of(arrival.x).cpu()
                sent.append(arrival.x)
        if self.ranks.size > 1:
            self.ranks.sum_(counts)
        experts.shown_all = frozenset((counts < least).nonzero()[:, 0].tolist())
        if original is not None:
            original.shown_all, original.sent = experts.shown_all, lambda: sent[walking_batch()]
        return len(experts.shown_all)

    def _pool(self, name: str, sums: StatisticsAccumulator | None, statistics: bool) -> StatisticsAccumulator | None:
        """What all processes have seen, in the place of what this one has: of an expert that may be nothing."""
        linear: Any = self.quantized.stops[name]
        with self.phases("exchange"):
            if name not in self.absmax:
                self.absmax[name] = torch.zeros(linear.in_features, device=linear.weight.device)
            self.ranks.max_(self.absmax[name])
            if statistics:
                if sums is None:
                    sums = StatisticsAccumulator(linear.in_features, linear.weight.device)
                    nothing = linear.weight.new_zeros(0, linear.in_features, dtype=torch.float32)
                    sums.add(nothing, None if self.original is None else nothing)
                sums.pool(self.ranks)
        return sums

    def _meant(self, name: str, at: Arrival, meant: Arrival | None, expert: bool) -> tuple[Tensor | None, Tensor | None]:
        """The original's input; or, at a linear that writes to the stream, what it should write, less its bias."""
        if meant is None or self.original is None:
            return None, None
        if expert:  # tokens that only the original sends it come behind
            return meant.x[: len(at.x)], None
        if at.stream is None or meant.stream is None or meant.output is None:
            return meant.x, None
        linear, drift = self.original.stops[name], meant.stream - at.stream
        if getattr(linear, CHANNELS_FIRST, False):
            drift = drift.movedim(1, -1)
        target = drift.reshape(meant.output.shape).add_(meant.output)
        bias = getattr(linear, "bias", None)
        return None, target if bias is None else target.sub_(bias)


def _nothing() -> Iterator[None]:
    while True:
        yield None
