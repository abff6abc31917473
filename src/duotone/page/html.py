"""The page: one HTML file that holds its style, its script and all it shows, and asks no network for anything."""

from importlib.resources import files
from typing import Any

import jinja2
from markupsafe import Markup

from duotone.card import TASK_HEADER, task_cells
from duotone.page import view
from duotone.page.census import entropy
from duotone.page.facts import Facts
from duotone.report import duration
from duotone.scheme import HOPPER, Scheme

#: So many block numbers fit beside one another.
_NUMBERS = 21


def write_html(facts: Facts) -> str:
    """The text of report.html. What comes from the checkpoint's files is escaped: they may be a stranger's."""
    folder = files("duotone.page")
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {
        "bytes": view.size, "seconds": duration, "figure": view.number, "whole": _whole, "visible": _visible,
    }  # fmt: skip
    template = environment.from_string((folder / "page.html").read_text(encoding="utf-8"))
    css, js = (Markup((folder / name).read_text(encoding="utf-8")) for name in ("page.css", "page.js"))
    return template.render(_shown(facts), css=css, js=js)


def tiles(facts: Facts) -> list[tuple[str, str, str, str]]:
    """The figures above all others: title, figure, unit, and words below."""
    sizes, figures = facts.sizes, (facts.measured.figures if facts.measured else None) or {}
    amount, _, unit = view.size(sizes.total).partition(" ")
    smaller = f"{sizes.original / max(sizes.total, 1):.1f} times smaller, was {view.size(sizes.original)}"
    found = [("Size", amount, unit, smaller)]
    found += [("Bits a weight", f"{sizes.bits_per_weight:.3f}", "", f"with scales, in {len(facts.linears)} linears")]
    if sizes.quantized_macs_share is not None:
        share = f"{100 * sizes.quantized_macs_share:.1f}"
        found += [("Quantized", share, "%", "of the linears' multiply-accumulates")]
    if figures.get("kl") is not None:
        error = figures.get("kl_stderr")
        spread = "" if error is None else f"± {view.number(error, 2)} "
        found += [("KL to the original", view.number(figures["kl"]), "", f"{spread}nats a token")]
    if figures.get("perplexity") is not None:
        reference = figures.get("reference_perplexity")
        words = "on held-out text" if reference is None else f"original {view.number(reference, 4)}"
        found += [("Perplexity", view.number(figures["perplexity"], 4), "", words)]
    if facts.run is not None:
        amount, _, unit = duration(sum(facts.run["seconds"].values())).partition(" ")
        found += [("Quantized in", amount, unit, f"at most {view.size(facts.run['peak_bytes'])} of memory")]
    return found


def _shown(facts: Facts) -> dict[str, Any]:
    """The names that page.html knows."""
    measured, settings = facts.measured, facts.settings or {}
    figures, cells = measured.figures if measured else None, view.cells_of(facts)
    heat = view.heat_map(facts, cells)
    has_kl = figures is not None and figures.get("kl") is not None
    scales, marks = view.scale_bars(facts)
    gpus = list(dict.fromkeys(place.gpu for place in facts.places))
    runtimes = [
        (runtime, version, [place for place in facts.places if place.runtime == runtime])
        for runtime, version in dict.fromkeys((place.runtime, place.version) for place in facts.places)
    ]
    return {
        "facts": facts,
        "tiles": tiles(facts),
        "sizes": view.size_bars(facts),
        "measured": measured,
        "figures": figures,
        "kl": view.kl_strip(figures, measured.kl_of_windows) if measured and figures and has_kl else None,
        "perplexity": view.perplexity_strip(figures) if figures else None,
        "cells": cells,
        "heat": heat,
        "hatched": any(cell is not None and cell.kept is not None for row in heat.cells for cell in row),
        "step": -(-len(heat.blocks) // _NUMBERS) if len(heat.blocks) > _NUMBERS else 1,
        "conditions": any(layer.condition_number is not None for layer in facts.linears),
        "damped": len({layer.damping_frac for layer in facts.linears}) > 1,
        "codes": view.code_bars(facts),
        "entropy": entropy(list(facts.census.codes)),
        "scales": scales,
        "marks": marks,
        "e4m3": facts.scheme.startswith(HOPPER.name),
        "peak": f"{Scheme(HOPPER, symmetric=bool(settings.get('symmetric', True))).peak_group_scale:g}",
        "kept": view.kept_by_reason(facts),
        "tasks": [task_cells(one) for one in facts.tasks],
        "task_header": TASK_HEADER,
        "calibration": view.calibration_rows(facts) if facts.calibration else [],
        "phases": view.phase_rows(facts),
        "seconds": sum((facts.run or {}).get("seconds", {}).values()),
        "gpus": gpus,
        "runtimes": runtimes,
        "refused": [place for place in facts.places if not place.runs],
    }


def _whole(value: float) -> str:
    return f"{value:,.0f}".replace(",", "\u202f")


def _visible(token: str) -> str:
    """A token that is blank, so that its mark can be seen."""
    return token if token.strip() else token.replace("\n", "↵\n").replace(" ", "␣")
