"""The report as Markdown, for a pull request or a model card: tables, and folded what is long."""

import re
from collections.abc import Iterable, Sequence
from statistics import fmean

from duotone.card import TASK_HEADER, task_cells
from duotone.page import view
from duotone.page.facts import Facts, Place
from duotone.page.html import tiles
from duotone.page.measured import Continuation, Measured
from duotone.report import duration

#: Around the first token that is not the same.
_MARKS = "⟦", "⟧"


def write_markdown(facts: Facts) -> str:
    """The text of report.md."""
    parts = [f"# {_cell(facts.name)}, W4A8", ""]
    parts += [f"Weights INT4, arithmetic FP8, outputs BF16; {_cell(facts.base)} quantized for {_cell(facts.scheme)}.", ""]
    shown = [(title, f"**{figure}** {unit}".strip(), words) for title, figure, unit, words in tiles(facts)]
    parts += _table(("", "", ""), shown)
    parts += _measured(facts.measured) if facts.measured else []
    if facts.tasks:
        parts += ["", "## Tasks", "", *_table(TASK_HEADER, [task_cells(one) for one in facts.tasks])]
    parts += _errors(facts)
    if facts.kept:
        grouped = view.kept_by_reason(facts)
        rows = [(reason, _names([one.layer for one in layers]), view.size(nbytes)) for reason, layers, nbytes in grouped]
        parts += ["", "## Not quantized", "", *_table(("why", "matrices", "bytes"), rows)]
    if facts.calibration and facts.settings:
        parts += ["", "## Calibration", "", *_table(("", ""), view.calibration_rows(facts))]
    if facts.run:
        rows = [(phase, spent.label, held.label if held else "") for phase, spent, held in view.phase_rows(facts)]
        parts += ["", "## Time and memory", ""]
        parts += [f"{duration(sum(facts.run['seconds'].values()))} in all, at most {view.size(facts.run['peak_bytes'])}.", ""]
        parts += _table(("phase", "time", "most memory seen"), rows)
    parts += _loads(facts)
    if facts.measured and facts.measured.continuations:
        parts += ["", "## Side by side", "", f"The first token that is not the same stands in {_MARKS[0]}{_MARKS[1]}."]
        parts += [line for one in facts.measured.continuations for line in _side_by_side(one)]
    if facts.command:
        parts += ["", "## Reproduce", "", *_fenced(facts.command, "sh")]
    if facts.notes:
        parts += ["", "## Notes", "", *(f"- {_cell(note)}" for note in facts.notes)]
    return "\n".join([*parts, "", f"Written by {facts.written_by}.", ""])


def _measured(measured: Measured) -> list[str]:
    figures = measured.figures
    if figures is None:
        return []
    rows = [("perplexity", view.number(figures["perplexity"], 5))]
    if figures.get("reference_perplexity") is not None:
        rows += [("perplexity of the original", view.number(figures["reference_perplexity"], 5))]
    if figures.get("kl") is not None:
        error = figures.get("kl_stderr")
        spread = "" if error is None else f" ± {view.number(error, 2)}"
        rows += [("KL to the original, nats a token", f"{view.number(figures['kl'])}{spread}")]
        rows += [("same likeliest token", f"{100 * figures['top1_agreement']:.2f} %")]
    text = f"On {figures['tokens']} tokens of {_cell(', '.join(measured.text))}:"
    return ["", "## Distance from the original", "", text, "", *_table(("", ""), rows)]


def _errors(facts: Facts) -> list[str]:
    """Linears of one name in all blocks on a line; single ones folded."""
    cells = view.cells_of(facts)
    field = "output_error" if any(cell.mean("output_error") is not None for cell in cells) else "weight_error"
    known = [(cell, error) for cell in cells if (error := cell.mean(field)) is not None]
    if not known:
        return []
    rows: list[tuple[str, ...]] = []
    for path in dict.fromkeys(cell.path for cell, _ in known):
        alike = [(error, cell) for cell, error in known if cell.path == path]
        worst, where = max(alike, key=lambda pair: pair[0])
        block = "" if where.block is None else f" in block {where.block}"
        rows.append((f"`{path}`", str(len(alike)), view.number(fmean(error for error, _ in alike)), view.number(worst) + block))
    fields = ("output_error", "weight_error")
    single = [(f"`{cell.name}`", *(view.number(cell.mean(name)) for name in fields)) for cell in cells]
    folded = _table(("linear", "output error", "weight error"), single)
    title = field.replace("_", " ")
    return [
        "", "## Error of each linear", "", f"The {title}, squared and relative.", "",
        *_table(("linear", "blocks", "mean", "worst"), rows), "",
        "<details><summary>All linears</summary>", "", *folded, "", "</details>",
    ]  # fmt: skip


def _loads(facts: Facts) -> list[str]:
    if not facts.places:
        return ["", "## Where it loads", "", f"Not judged: {_cell(facts.refusal)}"] if facts.refusal else []
    gpus = tuple(dict.fromkeys(place.gpu for place in facts.places))
    rows: list[tuple[str, ...]] = []
    for runtime, version in dict.fromkeys((place.runtime, place.version) for place in facts.places):
        here = [_place(place) for place in facts.places if place.runtime == runtime]
        rows.append((f"{runtime} {version}", *here))
    words = "*as X*: after `duotone export --format X`."
    return ["", "## Where it loads", "", words, "", *_table(("", *gpus), rows)]


def _place(place: Place) -> str:
    return f"**{place.outcome}**" if place.runs else f"*as {place.instead}*" if place.instead else "–"


def _side_by_side(one: Continuation) -> list[str]:
    odds = "" if one.odds is None else f", {100 * one.odds[0]:.1f} % and {100 * one.odds[1]:.1f} % likely to the original"
    same = "all the same" if one.same_tokens == one.new_tokens else f"the first {one.same_tokens} the same{odds}"
    lines = ["", f"{one.new_tokens} tokens, {same}:", "", *_fenced(one.prompt)]
    for name, (token, rest) in (("original", one.original), ("quantized", one.quantized)):
        marked = f"{_MARKS[0]}{token}{_MARKS[1]}" if token else ""
        lines += ["", f"{name}:", "", *_fenced(one.same + marked + rest)]
    return lines


def _names(layers: Sequence[str], most: int = 6) -> str:
    more = f" and {len(layers) - most} more" if len(layers) > most else ""
    return ", ".join(f"`{layer}`" for layer in layers[:most]) + more


def _fenced(text: str, language: str = "") -> list[str]:
    """A block that no run of tildes in the text can end."""
    longest = max((len(run) for run in re.findall("~+", text)), default=0)
    fence = "~" * max(3, longest + 1)
    return [fence + language, *text.split("\n"), fence]


def _cell(text: str) -> str:
    """Words from a stranger's file, which may neither end a table's cell nor be HTML."""
    return " ".join(text.splitlines()).replace("|", "\\|").replace("<", "&lt;")


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(map(_cell, cells))} |" for cells in (header, ["---"] * len(header), *rows)]
