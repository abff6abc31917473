# Shapes: M tokens, N out_features, K in_features.
"""The linear by itself: what it computes on this device, and how fast beside all others.

All candidates take turns on the stream of one process, so that a ratio is the median of the ratios of each round.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from duotone.contract import quantize_activations
from duotone.errors import DuotoneError, gist
from duotone.kernels.gpu import backend
from duotone.qweight import QuantizedWeight, fp8_values
from duotone.scheme import HOPPER
from duotone.speed import figures, ratios
from duotone.speed_gpu.budget import Deadline, Row
from duotone.speed_gpu.clock import Ceilings, Clock
from duotone.speed_gpu.forms import ALONE, BF16, OURS, PEERS, Form, Linear, random_weight
from duotone.speed_gpu.sizes import Plan

#: Tokens of a call that are compared with the contract.
_COMPARED = 64
#: One tile of tokens, a wide one, a part of the next, a prompt.
_CHECKED = (1, 17, 64, 200)
_GROUP_SIZES = (32, 64, 128, 256)
Shapes = tuple[tuple[int, int], ...]


class Bench:
    """What the parts share: sizes, seed, the device's clock and ceilings."""

    def __init__(self, plan: Plan, seed: int, device: torch.device) -> None:
        self.plan, self.seed, self.device = plan, seed, device
        self.clock = Clock(device, plan.out_of_cache)
        self.ceilings = Ceilings(self.clock, plan)

    def weight(self, shape: tuple[int, int]) -> QuantizedWeight:
        """A random weight [N, K] on the device."""
        return random_weight(shape, self.plan.group_size, self.device, self.seed)

    def inputs(self, count: int, columns: int) -> Tensor:
        """Random BF16 [M, K] on the device."""
        generator = torch.Generator(self.device).manual_seed(self.seed)
        return torch.randn(count, columns, generator=generator, device=self.device).bfloat16()


def check_rows(bench: Bench, shapes: Shapes, deadline: Deadline) -> Iterator[Row]:
    """What agrees with the contract here. Raises DuotoneError for what does not: wrong kernels are not worth timing."""
    for size in _GROUP_SIZES:
        facts = {"kind": "check", "what": "FP8 weights, activations, products", "shape": None, "tokens": None}
        yield from deadline.attempt(facts | {"group_size": size}, lambda size=size: _trial(bench, size))
    for shape in shapes:
        facts = {"kind": "check", "what": "products", "shape": list(shape), "group_size": bench.plan.group_size}
        yield from deadline.attempt(facts, lambda shape=shape: _checked(bench, shape))


def _trial(bench: Bench, group_size: int) -> Iterator[Row]:
    from duotone.kernels.gpu import trial

    if reason := trial.fault(group_size, bench.device):
        raise DuotoneError(f"bench gpu: groups of {group_size}: {reason}")
    yield {"agrees": True}


def _checked(bench: Bench, shape: tuple[int, int]) -> Iterator[Row]:
    weight = bench.weight(shape)
    linear = OURS.prepare(weight)
    for count in _CHECKED:
        compare(linear, weight, bench.inputs(count, shape[1]))
        yield {"tokens": count, "agrees": True}


def compare(linear: Linear, weight: QuantizedWeight, x: Tensor) -> None:
    """Raise DuotoneError where our product is not the contract's."""
    from duotone.kernels.gpu.trial import is_near

    y, (x8, scale) = linear(x)[:_COMPARED], quantize_activations(x[:_COMPARED].cpu(), HOPPER)
    if not is_near(y, x8.to(y.device), fp8_values(weight), weight.outer_scale * scale.to(y.device)):
        rows, columns = weight.shape
        raise DuotoneError(f"bench gpu: {rows}x{columns} with {len(x)} tokens: found other products than the contract's")


def linear_rows(bench: Bench, shapes: Shapes, deadline: Deadline) -> Iterator[Row]:
    """Ours beside torch's, for each number of tokens and shape."""
    yield from _rows(bench, shapes, deadline, ALONE)


def peer_rows(bench: Bench, models: Sequence[Shapes], deadline: Deadline) -> Iterator[Row]:
    """Ours and BF16 beside those of other packages, model after model; a row with the reason for each that is not installed."""
    for form in (form for form in PEERS if form.refusal):
        yield {"kind": "linear", "kernel": form.name, "shape": None, "tokens": None, "unmeasured": form.refusal}
    there = tuple(form for form in PEERS if not form.refusal)
    for shapes in models if there else ():
        yield from _rows(bench, shapes, deadline, (OURS, BF16, *there))


def _rows(bench: Bench, shapes: Shapes, deadline: Deadline, forms: tuple[Form, ...]) -> Iterator[Row]:
    prepared: dict[tuple[int, int], _Prepared] = {}
    for count in bench.plan.tokens:
        for shape in shapes:
            facts = {"kind": "linear", "kernel": None, "shape": list(shape), "tokens": count}

            def measure(shape: tuple[int, int] = shape, count: int = count) -> Iterator[Row]:
                if shape not in prepared:
                    prepared[shape] = _Prepared(bench, shape, forms)
                    yield from prepared[shape].refusals()
                yield from prepared[shape].measure(bench.inputs(count, shape[1]))

            yield from deadline.attempt(facts, measure)


class _Prepared:
    """A weight of one shape in every candidate's form, ours the first; others that fail are left out, with the reason."""

    def __init__(self, bench: Bench, shape: tuple[int, int], forms: tuple[Form, ...]) -> None:
        self.bench, self.shape, self.weight = bench, shape, bench.weight(shape)
        self.linears: dict[Form, Linear] = {OURS: OURS.prepare(self.weight)}
        self.failed: dict[Form, str] = {}
        for form in forms[1:]:
            self._try(form, lambda form=form: self.linears.update({form: form.prepare(self.weight)}))

    def _try(self, form: Form, call: Callable[[], object]) -> None:
        try:
            call()
        except Exception as error:  # of another's kernel: the others can still be compared
            self.failed[form] = gist(error)

    def refusals(self) -> Iterator[Row]:
        """A row for each candidate that could not be prepared."""
        for form, reason in self.failed.items():
            yield {"kernel": form.name, "tokens": None, "unmeasured": reason}

    def measure(self, x: Tensor) -> Iterator[Row]:
        """A row for each candidate, all of the same rounds. Raises DuotoneError where our product is not the contract's."""
        calls: dict[Form, Callable[[], object]] = {}
        clock, self.failed = self.bench.clock, {}
        with torch.no_grad():
            compare(self.linears[OURS], self.weight, x)
            for form, linear in self.linears.items():
                call = lambda linear=linear: linear(x)  # noqa: E731
                self._try(form, lambda form=form, call=call: calls.update({form: clock.prepared(call)}))
            seconds: dict[str, list[float]] = {form.name: [] for form in calls}
            for _ in range(self.bench.plan.rounds):
                for form, call in calls.items():
                    seconds[form.name].append(clock.seconds(call))
        for form in calls:
            yield self._row(form, len(x), seconds)
        for form, reason in self.failed.items():
            yield {"kernel": form.name, "unmeasured": reason}

    def _row(self, form: Form, count: int, seconds: dict[str, list[float]]) -> dict[str, Any]:
        plan, ceilings, (rows, columns) = self.bench.plan, self.bench.ceilings, self.shape
        nbytes = form.nbytes(self.shape, plan.group_size)
        return {
            "kernel": form.name,
            "package": form.origin,
            "backend": backend.describe(self.weight.scheme),
            "refusals": [],
            "group_size": plan.group_size,
            **figures(seconds[form.name], nbytes, 2 * count * rows * columns, ceilings.bandwidth),
            "peak_gflops": ceilings.bf16 if form.weight_bits == 16 else ceilings.fp8,
            "times_as_fast_as": ratios(form.name, seconds),
        }
