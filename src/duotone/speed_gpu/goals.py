"""What the kernels are to reach on an H200, and what records say of that: met, not met, or unmeasured."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from duotone.speed_gpu.budget import Row
from duotone.speed_gpu.forms import BF16, FP8, OURS
from duotone.speed_gpu.sizes import is_large

#: (where, what was measured there or None)
Case = tuple[str, float | None]
_LINEARS = {"linears-8b": "8B", "linears-70b": "70B"}


@dataclass(frozen=True)
class Goal:
    """A number to reach in every case that records know of. most: it is a bound from above. unit: of the number."""

    title: str
    wanted: float
    cases: Callable[[Sequence[Row]], list[Case]]
    unit: str = "times"
    most: bool = False

    def shown(self, value: float) -> str:
        """In words."""
        return f"{100 * value:.0f} %" if self.unit == "%" else f"{value:.0f} s" if self.unit == "s" else f"{value:.2f} times"


@dataclass(frozen=True)
class Verdict:
    """Of a goal: its worst case (where, value) or None, how many of its cases were measured, and whether it is met.

    met: None where nothing was measured, or not all and what was is good enough.
    """

    goal: Goal
    worst: tuple[str, float] | None
    measured: int
    cases: int
    met: bool | None

    @property
    def words(self) -> str:
        """met, not met, unmeasured, or so far."""
        if self.worst is None:
            return "unmeasured"
        if self.met is None:
            return f"in the {self.measured} of {self.cases} cases that were measured"
        return "met" if self.met else "not met"


def judge(rows: Iterable[Row]) -> list[Verdict]:
    """Of each goal, by rows of one device."""
    known = list(rows)
    return [_verdict(goal, goal.cases(known)) for goal in GOALS]


def newest(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """By device: each part's rows of the last run that had it."""
    found: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        kept = found.setdefault(row["device"], {}).setdefault(row["part"], [])
        if kept and kept[0]["date"] != row["date"]:
            kept.clear()
        kept.append(row)
    return {device: [row for part in parts.values() for row in part] for device, parts in found.items()}


def _verdict(goal: Goal, cases: list[Case]) -> Verdict:
    known = [(where, value) for where, value in cases if value is not None]
    if not known:
        return Verdict(goal, None, 0, len(cases), None)
    worst = (max if goal.most else min)(known, key=lambda case: case[1])
    good = worst[1] <= goal.wanted if goal.most else worst[1] >= goal.wanted
    return Verdict(goal, worst, len(known), len(cases), None if good and len(known) < len(cases) else good)


def _linears(least: int, most: int, other: str | None, large: bool | None = None) -> Callable[[Sequence[Row]], list[Case]]:
    """Of each shape and number of tokens in a range: ours beside another kernel, or its share of memory's bandwidth."""

    def cases(rows: Sequence[Row]) -> list[Case]:
        found: dict[str, float | None] = {}
        for row in rows:
            if row["kind"] != "linear" or row["part"] not in _LINEARS or row["tokens"] is None:
                continue
            shape = row["shape"][0], row["shape"][1]
            if least <= row["tokens"] <= most and (large is None or is_large(shape) == large):
                where = f"{_LINEARS[row['part']]}, {shape[0]}x{shape[1]}, {row['tokens']} tokens"
                found.setdefault(where, None)
                if row["kernel"] == OURS.name and row["unmeasured"] is None:
                    found[where] = row["times_as_fast_as"].get(other) if other else row["roofline_share"]
        return list(found.items())

    return cases


def _faster(kind: str, batch: int, part: str) -> Callable[[Sequence[Row]], list[Case]]:
    """Of each model, length and batch: ours beside BF16 in tokens a second."""

    def cases(rows: Sequence[Row]) -> list[Case]:
        both: dict[str, dict[str, float | None]] = {}
        for row in rows:
            if (row["kind"], row["part"], row.get("batch")) == (kind, part, batch) and not row["image_tokens"]:
                lengths = row["tokens"] if kind == "decode" else f"{row['prompt_tokens']} + {row['new_tokens']}"
                both.setdefault(f"{row['model']}, {lengths} tokens", {})[row["kernel"]] = row.get("tokens_per_second")
        return [(where, _ratio(speeds.get(OURS.name), speeds.get(BF16.name))) for where, speeds in both.items()]

    return cases


def _ratio(ours: float | None, other: float | None) -> float | None:
    return ours / other if ours and other else None


def _whole(rows: Sequence[Row]) -> list[Case]:
    """Of a run of all parts."""
    return [("all parts", row["seconds"]) for row in rows if row["kind"] == "whole"]


_ANY = 10**9
GOALS = (
    Goal("up to 16 tokens, bytes of 4-bit weights a second beside what memory gives", 0.7, _linears(1, 16, None), "%"),
    Goal("up to 16 tokens, as fast as BF16, linears below 50 million weights", 2.75, _linears(1, 16, BF16.name, False)),
    Goal("up to 16 tokens, as fast as BF16, larger linears", 3.0, _linears(1, 16, BF16.name, True)),
    Goal("up to 16 tokens, as fast as FP8", 1.4, _linears(1, 16, FP8.name)),
    Goal("64 tokens, as fast as FP8", 1.2, _linears(64, 64, FP8.name)),
    Goal("from 1024 tokens, as fast as FP8", 0.9, _linears(1024, _ANY, FP8.name)),
    Goal("from 1024 tokens, as fast as BF16", 1.5, _linears(1024, _ANY, BF16.name)),
    Goal("a model writing one text, as fast as BF16", 2.5, _faster("decode", 1, "end-to-end")),
    Goal("tokens a second at batch 64, prompts included, as many as BF16", 1.35, _faster("throughput", 64, "throughput")),
    Goal("the same, the paper's", 1.62, _faster("throughput", 64, "throughput")),
    Goal("the whole command", 480, _whole, "s", most=True),
)
