# matplotlib is typed in part only.
# pyright: reportMissingImports=false, reportUnknownMemberType=false
"""The report's charts as one picture. Needs matplotlib: the extra `plot`."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from duotone.errors import DuotoneError
from duotone.page import view
from duotone.page.facts import Facts
from duotone.page.html import tiles

_INK, _SOFT, _INT4, _FP8, _PALE, _LINE = "#191a2b", "#5c5d74", "#4545d6", "#e4572e", "#fbd5c6", "#e4e2ea"
_COLORS = {"linears": _SOFT, "rest": "#bebec8", "codes": _INT4, "scales": _FP8, "kept": _PALE, "other": _LINE}
_HEAT = ("#e9e8fb", "#f27a52", "#7a0c3e")


def check_png() -> None:
    """Raise DuotoneError where matplotlib is not installed."""
    if find_spec("matplotlib") is None:
        raise DuotoneError("--format png: found no matplotlib, expected it: pip install 'duotone[plot]', or take html")


def write_png(facts: Facts, path: Path, dpi: int = 160) -> None:
    """Draw the charts into a PNG file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 9.5), facecolor="#f7f6f3", layout="constrained")
    layout: Any = figure.get_layout_engine()
    layout.set(h_pad=0.12, w_pad=0.12)
    grid = figure.add_gridspec(4, 2, height_ratios=(0.75, 0.9, 1.5, 1.2))
    _title(figure.add_subplot(grid[0, :]), facts)
    _sizes(figure.add_subplot(grid[1, 0]), facts)
    _phases(figure.add_subplot(grid[1, 1]), facts)
    _heat(figure, figure.add_subplot(grid[2, :]), facts)
    _columns(figure.add_subplot(grid[3, 0]), view.code_bars(facts), "codes", _INT4)
    bars, marks = view.scale_bars(facts)
    _columns(figure.add_subplot(grid[3, 1]), bars, "group scales", _FP8, marks)
    figure.savefig(path, dpi=dpi, format="png", metadata={"Software": facts.written_by})


def _plain(axes: Any, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=11, color=_INK, fontweight="bold")
    axes.set_facecolor("none")
    axes.tick_params(colors=_SOFT, labelsize=8, length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _title(axes: Any, facts: Facts) -> None:
    axes.axis("off")
    axes.text(0, 1, _words(facts.name), fontsize=22, fontweight="bold", color=_INK, va="top")
    words = f"weights INT4, arithmetic FP8, outputs BF16; {_words(facts.scheme)}"
    axes.text(0, 0.56, words, fontsize=10, color=_SOFT, va="top")
    shown = tiles(facts)
    for i, (title, amount, unit, _) in enumerate(shown):
        axes.text(i / len(shown), 0.3, title, fontsize=9, color=_SOFT, va="top")
        axes.text(i / len(shown), 0.12, f"{amount} {unit}", fontsize=15, color=_INK, fontweight="bold", va="top")
    axes.set_xlim(0, 1)
    axes.set_ylim(-0.15, 1)


def _sizes(axes: Any, facts: Facts) -> None:
    _plain(axes, "size")
    for row, (name, total, bars) in enumerate(view.size_bars(facts)):
        for bar in bars:
            axes.barh(row, bar.size, left=bar.start, height=0.6, color=_COLORS.get(bar.kind, _SOFT), edgecolor="#f7f6f3")
        axes.text(102, row, view.size(total), va="center", fontsize=9, color=_INK, fontweight="bold")
        axes.text(-2, row, name, va="center", ha="right", fontsize=9, color=_SOFT)
    axes.set(xlim=(-14, 122), ylim=(1.6, -0.6), xticks=[], yticks=[])


def _phases(axes: Any, facts: Facts) -> None:
    _plain(axes, "time")
    rows = view.phase_rows(facts)[:6]
    for row, (phase, spent, _) in enumerate(rows):
        axes.barh(row, spent.size, height=0.6, color=_INT4)
        axes.text(spent.size + 2, row, spent.label, va="center", fontsize=8, color=_INK)
        axes.text(-2, row, phase, va="center", ha="right", fontsize=8, color=_SOFT)
    axes.set(xlim=(-18, 118), ylim=(max(len(rows), 1) - 0.4, -0.6), xticks=[], yticks=[])


def _heat(figure: Any, axes: Any, facts: Facts) -> None:
    from matplotlib.colors import LinearSegmentedColormap, LogNorm

    heat = view.heat_map(facts, view.cells_of(facts))
    field = next(iter(heat.ends), None)
    _plain(axes, (field or "error").replace("_", " ") + " by block")
    if field is None:
        axes.set(xticks=[], yticks=[])
        return
    known = [[cell.mean(field) if cell else None for cell in row] for row in zip(*heat.cells, strict=True)]
    values = [[float("nan") if value is None else max(value, heat.ends[field][0]) for value in row] for row in known]
    low, _, high = heat.ends[field]
    norm = LogNorm(low, high if high > low else 1.01 * low)
    image = axes.imshow(values, aspect="auto", cmap=LinearSegmentedColormap.from_list("duotone", _HEAT), norm=norm)
    axes.set_yticks(range(len(heat.paths)), [_words(path) for path in heat.paths])
    step = -(-len(heat.blocks) // 21)
    axes.set_xticks(range(0, len(heat.blocks), step), [str(block) for block in heat.blocks[::step]])
    figure.colorbar(image, ax=axes, pad=0.01, aspect=12).ax.tick_params(labelsize=8, colors=_SOFT)


def _columns(axes: Any, bars: list[view.Bar], title: str, color: str, marks: list[tuple[float, str]] | None = None) -> None:
    _plain(axes, title)
    width = 100 / max(len(bars), 1)
    axes.bar([bar.start + width / 2 for bar in bars], [bar.size for bar in bars], width=0.94 * width, color=color)
    ticks = marks if marks is not None else [(bar.start + width / 2, bar.label) for bar in bars]
    axes.set_xticks([at for at, _ in ticks], [label for _, label in ticks])
    axes.set(xlim=(0, 100), yticks=[])


def _words(text: str) -> str:
    """No mathematics in a stranger's names."""
    return text.replace("$", r"\$")
