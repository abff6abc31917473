"""What a page shows, worked out of the facts: cells, bars and marks as shares of their axis, each with the words to hover."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from duotone.page.facts import Facts, KeptFacts, LinearFacts
from duotone.report import duration, megabytes

#: Two standard errors: about 95 of 100 such intervals hold the true mean.
INTERVAL = 1.96
#: What the phases of a run are.
PHASES = {
    "read": "weights from the disk",
    "forward": "calibration windows through the blocks",
    "hessian": "second moments of the inputs",
    "factorize": "Cholesky factors",
    "solve": "scales and codes",
    "write": "packing and writing",
    "curvature": "gradients of the loss",
    "couple": "codes under the curvature",
    "exchange": "waiting for other processes",
}


def number(value: float | None, digits: int = 3) -> str:
    """A figure for people: so many digits, whole numbers with thin spaces, no needless exponent."""
    if value is None:
        return ""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else str(value)
    if abs(value) >= 1e6 or abs(value) < 1e-5:
        mantissa, _, exponent = f"{value:.{digits - 1}e}".partition("e")
        return f"{mantissa}e{int(exponent)}"
    places = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{places}f}".replace(",", "\u202f")


def size(nbytes: float) -> str:
    """Bytes for people, small ones too."""
    return megabytes(nbytes) if nbytes >= 1e6 else f"{nbytes / 1e3:.1f} kB"


@dataclass(frozen=True)
class Bar:
    """A part of an axis: start and size in percent of it, a label, and the words to hover."""

    start: float
    size: float
    label: str
    tip: str
    kind: str = ""


@dataclass(frozen=True)
class Cell:
    """Linears of one block under one name, more than one where they are experts: mean errors, and where they stand in 0..100.

    kept: why it is not quantized. Levels are None where no error is known.
    """

    block: int | None
    path: str
    layers: tuple[LinearFacts, ...]
    weight_level: float | None = None
    output_level: float | None = None
    kept: str | None = None

    def mean(self, name: str) -> float | None:
        """Of a field over the cell's linears."""
        known = [value for layer in self.layers if (value := getattr(layer, name)) is not None]
        return fmean(known) if known else None

    def worst(self, name: str) -> float | None:
        """The largest of a field over the cell's linears."""
        return max((value for layer in self.layers if (value := getattr(layer, name)) is not None), default=None)

    @property
    def name(self) -> str:
        """The linear's, or what its experts' have in common."""
        return self.layers[0].layer if len(self.layers) == 1 else f"block {self.block}: {self.path} ({len(self.layers)})"

    @property
    def tip(self) -> str:
        """The numbers, a line each."""
        if self.kept is not None:
            return f"block {self.block}: {self.path}\nleft in BF16: {self.kept}"
        first = self.layers[0]
        lines = [self.name, f"{first.rows:,} × {first.columns:,}".replace(",", "\u202f")]
        for field, words in (("output_error", "output error"), ("weight_error", "weight error")):
            if (mean := self.mean(field)) is not None:
                worst = f", worst {number(self.worst(field))}" if len(self.layers) > 1 else ""
                lines.append(f"{words} {number(mean)}{worst}")
        if (condition := self.worst("condition_number")) is not None:
            lines.append(f"condition of the Hessian {number(condition)}")
        if dead := sum(layer.dead_columns or 0 for layer in self.layers):
            lines.append(f"{dead} inputs that were always zero")
        return "\n".join(lines)


@dataclass(frozen=True)
class HeatMap:
    """cells[i]: those of blocks[i] in the order of `paths`, None where the block has no such linear. ends: of both scales."""

    blocks: tuple[int, ...]
    paths: tuple[str, ...]
    cells: tuple[tuple[Cell | None, ...], ...]
    ends: dict[str, tuple[float, float, float]]


def cells_of(facts: Facts) -> list[Cell]:
    """All quantized linears by block and name, those of experts together, in the checkpoint's order; levels on a log scale."""
    together: dict[tuple[int | None, str], list[LinearFacts]] = {}
    for layer in facts.linears:
        together.setdefault((layer.block, re.sub(r"\.\d+\.", ".*.", layer.path)), []).append(layer)
    cells = [Cell(block, path, tuple(layers)) for (block, path), layers in together.items()]
    levels = {name: _levels([cell.mean(name) for cell in cells]) for name in ("weight_error", "output_error")}
    return [
        Cell(cell.block, cell.path, cell.layers, weight, output)
        for cell, weight, output in zip(cells, levels["weight_error"], levels["output_error"], strict=True)
    ]


def heat_map(facts: Facts, cells: Sequence[Cell]) -> HeatMap:
    """Blocks and linears as a grid; linears of a block that were left in BF16 have their place in it too."""
    inside = {(cell.block, cell.path): cell for cell in cells if cell.block is not None}
    for kept in facts.kept:
        found = re.fullmatch(r".*?\.(?P<block>\d+)\.(?P<path>.+)", kept.layer)
        if found:
            block, path = int(found["block"]), re.sub(r"\.\d+\.", ".*.", found["path"])
            inside.setdefault((block, path), Cell(block, path, (), kept=kept.reason))
    blocks = tuple(sorted({cell.block for cell in inside.values() if cell.block is not None}))
    paths = tuple(dict.fromkeys(cell.path for cell in inside.values()))
    grid = tuple(tuple(inside.get((block, path)) for path in paths) for block in blocks)
    ends = {}
    for name in ("output_error", "weight_error"):
        known = [value for cell in cells if cell.block is not None and (value := cell.mean(name))]
        if known:
            ends[name] = (min(known), math.sqrt(min(known) * max(known)), max(known))
    return HeatMap(blocks, paths, grid, ends)


def _levels(values: Sequence[float | None]) -> list[float | None]:
    known = [math.log(value) for value in values if value]
    if not known:
        return [None] * len(values)
    low, span = min(known), (max(known) - min(known)) or 1.0
    return [None if value is None else 100 * (math.log(value) - low) / span if value else 0.0 for value in values]


def size_bars(facts: Facts) -> list[tuple[str, int, list[Bar]]]:
    """Before and after, each with its parts, in percent of the larger."""
    sizes, rows = facts.sizes, []
    rest, longest = sizes.kept + sizes.other, max(sizes.original, sizes.total, 1)
    weights = sum(layer.rows * layer.columns for layer in facts.linears)
    share = 2 * weights / max(2 * weights + rest, 1)
    before = [("linears", share * sizes.original, "that are quantized now"), ("the rest", (1 - share) * sizes.original, "")]
    after = [
        ("codes", sizes.codes, "4 bits a weight"),
        ("scales", sizes.scales, f"one for {facts.settings['group_size']} weights" if facts.settings else "of groups"),
        ("kept", sizes.kept, "matrices that are not quantized"),
        ("other", sizes.other, "norms, biases"),
    ]
    for name, total, parts in (("before", sizes.original, before), ("after", sizes.total, after)):
        start, bars = 0.0, []
        for label, nbytes, words in parts:
            if nbytes:
                tip = f"{label}: {size(nbytes)}" + (f"\n{words}" if words else "")
                bars.append(Bar(start, 100 * nbytes / longest, label, tip, label.split()[-1]))
                start += 100 * nbytes / longest
        rows.append((name, total, bars))
    return rows


def code_bars(facts: Facts) -> list[Bar]:
    """How often each code is used, in percent of the commonest."""
    total, most = max(1, sum(facts.census.codes)), max(1, *facts.census.codes)
    return [
        Bar(100 * i / 16, 100 * count / most, f"{level:g}", f"code {level:g}\n{100 * count / total:.2f} % of all weights")
        for i, (level, count) in enumerate(zip(facts.census.levels, facts.census.codes, strict=True))
    ]


def scale_bars(facts: Facts) -> tuple[list[Bar], list[tuple[float, str]]]:
    """Group scales on a logarithmic axis, eight bins an octave, or one where they span more than 20; and the axis' marks."""
    if not facts.census.scales:
        return [], []
    low, high = (math.floor(math.log2(facts.census.scales[i][0])) for i in (0, -1))
    bins = 8 if high - low < 20 else 1
    counts = [0] * (bins * (high + 1 - low))
    for edge, count in facts.census.scales:
        octave = math.floor(math.log2(edge))
        counts[bins * (octave - low) + int(bins * (edge / 2.0**octave - 1))] += count
    total, most, bars = sum(counts), max(counts), []
    for i, count in enumerate(counts):
        edge = 2.0 ** (low + i // bins) * (1 + i % bins / bins)
        tip = f"group scale {edge:g}\n{count:,} groups, {100 * count / total:.2f} %".replace(",", "\u202f")
        bars.append(Bar(100 * i / len(counts), 100 * count / most, "", tip))
    every = max(1, len(counts) // 8) if len(counts) <= 8 * bins else bins * -(-len(counts) // (8 * bins))
    edges = ((i, 2.0 ** (low + i // bins) * (1 + i % bins / bins)) for i in range(0, len(counts), every))
    return bars, [(100 * i / len(counts), f"{edge:g}") for i, edge in edges]


def calibration_rows(facts: Facts) -> list[tuple[str, str]]:
    """What was calibrated on: names and what to show."""
    calibration, settings = facts.calibration or {}, facts.settings or {}
    texts = [str(title) for title in calibration["text"]]
    of, renderings = (_one_each(calibration.get(name), texts) for name in ("windows_of", "rendering"))
    lines = []
    for text, count, rendering in zip(texts, of, renderings, strict=True):
        told = [f"{count} windows"] if count is not None and len(texts) > 1 else []
        told += [str(rendering)] if rendering is not None else []
        lines.append(f"{text} ({', '.join(told)})" if told else text)
    windows = calibration["windows"]
    tokens = f"{number(calibration['tokens'], 15)} in {number(windows, 15)} windows"
    rows = [("text", "; ".join(lines)), ("tokens", f"{tokens} of {number(calibration['tokens'] // max(windows, 1), 15)}")]
    rows += [("seed", str(settings["seed"]))] if "seed" in settings else []
    return [*rows, ("forward in", calibration["dtype"]), ("sha256", calibration["sha256"])]


def _one_each(values: Any, texts: Sequence[str]) -> list[Any]:
    """A record's list of one value for each text, where it is that."""
    return values if isinstance(values, list) and len(values) == len(texts) else [None] * len(texts)


def phase_rows(facts: Facts) -> list[tuple[str, Bar, Bar | None]]:
    """Each phase of the run: its time in percent of the longest, its memory in percent of the peak."""
    seconds: dict[str, float] = (facts.run or {}).get("seconds", {})
    memory: dict[str, int] = (facts.run or {}).get("phase_bytes", {})
    longest, total = max(seconds.values(), default=1.0) or 1.0, sum(seconds.values()) or 1.0
    peak = max([int((facts.run or {}).get("peak_bytes", 0)), *memory.values(), 1])
    rows: list[tuple[str, Bar, Bar | None]] = []
    for phase, spent in sorted(seconds.items(), key=lambda item: -item[1]):
        tip = f"{phase}: {PHASES.get(phase, '')}\n{duration(spent)}, {100 * spent / total:.1f} % of the run"
        held = memory.get(phase)
        bar = None if held is None else Bar(0, 100 * held / peak, size(held), f"{phase}: {size(held)} resident")
        rows.append((phase, Bar(0, 100 * spent / longest, duration(spent), tip), bar))
    return rows


@dataclass(frozen=True)
class Strip:
    """A mean on an axis from `low` to `high`, the interval around it, and windows as dots: x and y in percent."""

    low: str
    high: str
    middle: str
    mean: float
    interval: tuple[float, float] | None
    dots: tuple[tuple[float, float], ...] = ()
    other: float | None = None


def kl_strip(figures: dict[str, Any], windows: Sequence[float]) -> Strip:
    """KL from 0 to the largest window, or to twice the mean where windows are not known."""
    kl, error = float(figures["kl"]), figures.get("kl_stderr")
    top = _round_up(max([*windows, 2 * kl, 1e-9]))
    interval = None if error is None else (100 * max(0.0, kl - INTERVAL * error) / top, 100 * (kl + INTERVAL * error) / top)
    dots = tuple((100 * max(0.0, value) / top, 12 + 76 * ((i * 0.618034) % 1)) for i, value in enumerate(windows))
    return Strip("0", f"{top:g}", f"{top / 2:g}", 100 * kl / top, interval, dots)


def perplexity_strip(figures: dict[str, Any]) -> Strip | None:
    """Both perplexities, the quantized one with the interval of the paired difference around it. None without a reference."""
    reference, difference = figures.get("reference_perplexity"), figures.get("nll_difference")
    if reference is None or difference is None:
        return None
    error = figures.get("nll_difference_stderr") or 0.0
    points = [reference, *(reference * math.exp(difference + sign * INTERVAL * error) for sign in (-1, 0, 1))]
    margin = 0.35 * (max(points) - min(points)) or 0.01 * reference
    low, high = min(points) - margin, max(points) + margin
    at = [100 * (point - low) / (high - low) for point in points]
    return Strip(number(low, 4), number(high, 4), number((low + high) / 2, 4), at[2], (at[1], at[3]), other=at[0])


def kept_by_reason(facts: Facts) -> list[tuple[str, list[KeptFacts], int]]:
    """Matrices that are not quantized: those with one reason together, and their bytes."""
    by_reason: dict[str, list[KeptFacts]] = {}
    for kept in facts.kept:
        by_reason.setdefault(kept.reason, []).append(kept)
    return [(reason, layers, sum(layer.nbytes for layer in layers)) for reason, layers in by_reason.items()]


def _round_up(value: float) -> float:
    """The next of 1, 2, 3, 4, 5, 6, 8 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 2, 3, 4, 5, 6, 8, 10) if step * power >= value * (1 - 1e-12))
