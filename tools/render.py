"""Write the tables of README.md and docs from the committed records: no number there is typed by hand.

Usage: python tools/render.py [--check]. Between `<!-- table: NAME -->` and `<!-- end -->` stands what a function here makes.
"""

import json
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scale import scale_lines
from scale_gpu import gpu_lines

from duotone.examining import mcnemar
from duotone.loadability import GPUS, RUNTIMES, Linear, Subject, judge
from duotone.speed_gpu import forms, goals, tables

ROOT = Path(__file__).resolve().parents[1]
RECORDS = ROOT / "bench" / "records"
PAGES = (
    "README.md", "docs/accuracy.md", "docs/architectures.md", "docs/calibration.md", "docs/comparison.md", "docs/gpu.md",
    "docs/scale.md", "docs/serving.md", "docs/speed.md",
)  # fmt: skip
_BLOCK = re.compile(r"(<!-- table: (?P<name>[\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


Row = dict[str, Any]
#: The linear's instruction sets, the widest last.
PATHS = ("portable", "avx2", "avx512", "avx512vnni", "avx512vbmi")


def records(name: str) -> list[dict[str, Any]]:
    """Rows of one records file."""
    return [json.loads(line) for line in (RECORDS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


#: What tells one accuracy experiment from another; of rows that agree in all of it, the newest counts.
EXPERIMENT = (
    "model",
    "text",
    "tokens",
    "tool",
    "method",
    "effort",
    "target",
    "scheme",
    "group_size",
    "calibration",
    "arithmetic",
    "seed",
)


def latest_accuracy() -> list[dict[str, Any]]:
    """The newest accuracy row of each experiment."""
    return list({json.dumps([row[key] for key in EXPERIMENT]): row for row in records("accuracy")}.values())


def calibration_text(row: dict[str, Any]) -> str:
    """What a row was calibrated on."""
    return ", ".join(row["calibration"]["text"]) if row["calibration"] else "none"


def markdown(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A table of the columns in `head`."""
    lines = [head, ("---",) * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def distance(row: dict[str, Any]) -> str:
    """KL with its standard error."""
    return f"{row['kl']:.5f} ± {row['kl_stderr']:.5f}"


def demo_table() -> str:
    """The bundled model, `hopper`, group 128, by method: the newest row of each."""
    wanted = {"model": "duotone-10m", "target": "hopper", "group_size": 128, "scheme": "w4a8", "text": ["evaluation.txt"]}
    chosen = [row for row in latest_accuracy() if all(row[key] == value for key, value in wanted.items())]
    rows = list({row["method"]: row for row in chosen}.values())
    head = ("weights", "bits per weight", "perplexity", "KL to the original (nats a token)", "top-1 agreement")
    original = ("BF16, the original", "16", f"{rows[0]['reference_perplexity']:.3f}", "0", "100 %")
    return markdown(
        head,
        [original]
        + [
            (
                row["method"],
                f"{row['bits_per_weight']:.3f}",
                f"{row['perplexity']:.3f}",
                distance(row),
                f"{100 * row['top1_agreement']:.2f} %",
            )
            for row in rows
        ],
    )


def accuracy_table() -> str:
    """Every accuracy record's newest row."""
    head = (
        "model",
        "judged on",
        "calibrated on",
        "target",
        "group",
        "method",
        "KL",
        "above floor",
        "perplexity",
        "top-1",
        "seconds",
        "peak",
    )
    rows = sorted(latest_accuracy(), key=lambda row: (row["model"], row["text"], row["target"] != "hopper"))
    return markdown(
        head,
        [
            (
                row["model"],
                ", ".join(row["text"]),
                calibration_text(row),
                row["target"],
                str(row["group_size"]),
                row["method"],
                distance(row),
                f"{row['kl'] - row['kl_activation_floor']:.5f}",
                f"{row['perplexity']:.3f} ({row['reference_perplexity']:.3f})",
                f"{100 * row['top1_agreement']:.2f} %",
                f"{row['quantize_seconds']:.1f}",
                f"{row['peak_bytes'] / 1e6:.0f} MB",
            )
            for row in rows
        ],
    )


def layer_error_table() -> str:
    """Output error of each recipe, newest row of each, order `gar` and `act` side by side."""
    newest = {
        (row["recipe"], row["order"], row["target"]): row["geometric_mean_output_error"] for row in records("layer_error")
    }
    recipes = dict.fromkeys(recipe for recipe, _, _ in newest if "coordinate descent" not in recipe)  # what dpq was before
    columns = [(target, order) for target in ("hopper", "gaudi") for order in ("gar", "act")]
    head = ("recipe", *(f"{target}, {order}" for target, order in columns))
    return markdown(
        head,
        [(recipe, *(f"{newest[recipe, order, target]:.5f}" for target, order in columns)) for recipe in recipes],
    )


def windows_of(row: dict[str, Any]) -> int:
    """How many windows a row was calibrated on; 0 without calibration."""
    return row["calibration"]["windows"] if row["calibration"] else 0


#: wikitext-2: another tokenization of English than any model here was trained on.
OUT_OF_DOMAIN = ["test.txt"]


def comparison(
    windows: dict[str, int] | None = None, among: Callable[[Row], bool] = lambda row: row["text"] != OUT_OF_DOMAIN
) -> dict[str, list[dict[str, Any]]]:
    """By model: the newest row of every tool, method, arithmetic and seed, of those calibrated on so many windows.

    windows: by model; where none is given, as many as the model's newest row of ours. among: which rows count at all.
    """
    rows = records("comparison")
    chosen = {row["model"]: windows_of(row) for row in rows if row["tool"] == "duotone" and row["calibration"]} | (
        windows or {}
    )
    newest = {
        (r["model"], r["tool"], r["method"], r["effort"], r["arithmetic"], r["seed"]): r
        for r in rows
        if among(r) and windows_of(r) in {0, chosen[r["model"]]}
    }
    models: dict[str, list[dict[str, Any]]] = {}
    for row in newest.values():
        models.setdefault(row["model"], []).append(row)
    return models


def figure(row: dict[str, Any]) -> float | None:
    """What a model is judged by: KL, or an encoder's embedding error."""
    return row["kl"] if row["kl"] is not None else row["tasks"].get("embedding_error", [None])[0]


def over_seeds(rows: list[dict[str, Any]], arithmetic: str) -> list[float]:
    """A candidate's figure for each seed."""
    return [value for row in rows if row["arithmetic"] == arithmetic and (value := figure(row)) is not None]


def mean(values: list[float]) -> float:
    """Arithmetic mean."""
    return sum(values) / len(values)


def candidates(rows: list[dict[str, Any]]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """A model's rows by tool and method, ours last; the original itself left out."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: row["tool"] == "duotone"):
        if row["tool"] != "original":
            name = row["method"] if row["effort"] == "default" else f"{row['method']} --effort {row['effort']}"
            found.setdefault((row["tool"], name), []).append(row)
    return found


def spread(values: list[float]) -> str:
    """Mean, and the range over seeds when there are several."""
    if not values:
        return "-"
    if len(values) == 1:
        return f"{values[0]:.4f}"
    return f"{mean(values):.4f} ({min(values):.4f} to {max(values):.4f})"


def best_peer(rows: list[dict[str, Any]], gradient: bool) -> tuple[str, float] | None:
    """The peer with the smallest mean figure in the contract's arithmetic; gradient: those that tune may take part.

    A tool that left a tenth or more of what others quantize in BF16 is no bar: it answers another question.
    """
    shares = [row["quantized_macs_share"] for row in rows if row["quantized_macs_share"]]
    means = {
        f"{tool} {method}": mean(over_seeds(found, "contract"))
        for (tool, method), found in candidates(rows).items()
        if tool != "duotone"
        and over_seeds(found, "contract")
        and (gradient or not found[0].get("gradient"))
        and found[0]["quantized_macs_share"] > 0.9 * max(shares)
    }
    return min(means.items(), key=lambda item: item[1]) if means else None


def comparison_table() -> str:
    """Every tool on every model."""
    lines = []
    for model, rows in comparison().items():
        bar = best_peer(rows, gradient=False)
        for (tool, method), found in candidates(rows).items():
            contract = over_seeds(found, "contract")
            refusals = [row["refused"] for row in found if row["refused"]]
            ratio = f"{mean(contract) / bar[1]:.2f}" if contract and bar else "-"
            seconds = [row["quantize_seconds"] for row in found if row["quantize_seconds"] is not None]
            lines.append(
                (
                    model,
                    tool,
                    method,
                    str(len({row["seed"] for row in found})),
                    f"refuses: {refusals[0]}" if refusals and not contract else spread(contract),
                    ratio,
                    "the same" if tool == "duotone" else spread(over_seeds(found, "nominal")),
                    f"{100 * found[0]['quantized_macs_share']:.0f} %" if found[0]["quantized_macs_share"] else "-",
                    f"{min(seconds):.1f}" if seconds else "-",
                )
            )
    head = (
        "model", "tool", "method", "seeds", "distance as it runs", "of the best gradient-free peer's", "its own arithmetic",
        "quantized", "seconds",
    )  # fmt: skip
    return markdown(head, lines)


def out_of_domain_table() -> str:
    """Every tool judged on wikitext-2."""
    lines = []
    for model, rows in comparison(among=lambda row: row["text"] == OUT_OF_DOMAIN).items():
        bar = best_peer(rows, gradient=False)
        for (tool, method), found in candidates(rows).items():
            contract = over_seeds(found, "contract")
            ratio = f"{mean(contract) / bar[1]:.2f}" if contract and bar else "-"
            lines.append((model, tool, method, spread(contract), ratio, f"{found[0]['perplexity']:.1f}"))
    head = ("model", "tool", "method", "distance as it runs", "of the best gradient-free peer's", "perplexity")
    return markdown(head, lines)


#: Our two answers, each with whether its bar may be a peer that tunes by gradients.
OURS = (("dpq", False), ("dpq --effort high", True))


def goal_table() -> str:
    """Ours against the best peer, model by model, and their mean."""
    lines: list[tuple[str, ...]] = []
    ratios: dict[str, list[float]] = {method: [] for method, _ in OURS}
    for model, rows in comparison().items():
        cells = [model]
        for method, gradient in OURS:
            ours = over_seeds(candidates(rows).get(("duotone", method), []), "contract")
            bar = best_peer(rows, gradient)
            if bar and ours:
                ratios[method].append(mean(ours) / bar[1])
            cells += [f"{mean(ours):.4f}" if ours else "-", f"{bar[0]} {bar[1]:.4f}" if bar else "-"]
            cells.append(f"{mean(ours) / bar[1]:.2f}" if bar and ours else "-")
        lines.append(tuple(cells))
    means = [f"**{mean(found):.2f}**" if found else "-" for found in ratios.values()]
    lines.append(("**mean**", "", "", means[0], "", "", means[1]))
    return markdown(
        ("model", "dpq", "best peer without gradients", "ratio", "dpq --effort high", "best peer of all", "ratio"), lines
    )


def second_rounding_table() -> str:
    """Every tool in the arithmetic it optimizes and in the one that runs; of ours those that optimize the latter."""
    lines: list[tuple[str, ...]] = []
    for model, rows in comparison().items():
        most = max(row["quantized_macs_share"] or 0 for row in rows)
        for (tool, method), found in candidates(rows).items():
            runs = over_seeds(found, "contract") if (found[0]["quantized_macs_share"] or 0) > 0.9 * most else []
            own = runs if method.startswith("dpq") and tool == "duotone" else over_seeds(found, "nominal")
            if own and runs and method != "rtn":
                ratio = mean(runs) / mean(own)
                lines.append((model, f"{tool} {method}", f"{mean(own):.4f}", f"{mean(runs):.4f}", f"{ratio:.2f}"))
    return markdown(("model", "tool", "as it optimizes", "as it runs", "times"), lines)


def by_window(rows: list[dict[str, Any]], column: str) -> list[float]:
    """A candidate's figure for each evaluation window, mean over its seeds."""
    return [mean(list(values)) for values in zip(*(row[column] for row in rows), strict=True)]


def paired_table() -> str:
    """Ours less the best peer, window by window: mean and standard error over the same windows of text."""
    lines: list[tuple[str, ...]] = []
    for model, rows in comparison().items():
        found = {name: [r for r in group if r["arithmetic"] == "contract"] for name, group in candidates(rows).items()}
        named = {" ".join(name): group for name, group in found.items()}
        for method, gradient in OURS:
            bar, ours = best_peer(rows, gradient), found.get(("duotone", method), [])
            if not bar or not ours or "kl_windows" not in ours[0]:
                continue
            cells = [model, method, bar[0]]
            for column in ("kl_windows", "nll_windows"):
                pairs = zip(by_window(ours, column), by_window(named[bar[0]], column), strict=True)
                difference = [mine - theirs for mine, theirs in pairs]
                error = statistics.stdev(difference) / len(difference) ** 0.5
                cells.append(f"{mean(difference):+.5f} ± {error:.5f}")
            lines.append(tuple(cells))
    return markdown(("model", "method", "peer", "difference of KL", "difference of NLL"), lines)


def windows_table() -> str:
    """Models that were calibrated on windows of more than one length: each tool's distance on either."""
    shapes: dict[str, dict[int, int]] = {}
    for row in records("comparison"):
        if row["calibration"]:
            shapes.setdefault(row["model"], {})[windows_of(row)] = row["calibration"]["tokens"]
    lines: list[tuple[str, ...]] = []
    for model, tokens in shapes.items():
        if len(tokens) < 2:
            continue
        found = [candidates(comparison({model: windows})[model]) for windows in tokens]
        lengths = [f"{count // windows} tokens" for windows, count in tokens.items()]
        for name in found[0]:
            cells = [spread(over_seeds(each.get(name, []), "contract")) for each in found]
            if "-" not in cells and cells[0] != cells[1]:
                lines.append(
                    (model, " ".join(name), *(f"{cell} ({length})" for cell, length in zip(cells, lengths, strict=True)))
                )
    return markdown(("model", "tool", "long windows", "short windows"), lines)


def ranks_table() -> str:
    """Encoders: how far the similarities of sentences keep their order, in the arithmetic that runs, mean over seeds."""
    lines: list[tuple[str, ...]] = []
    for model, rows in comparison().items():
        for (tool, method), found in candidates(rows).items():
            tasks = [
                row["tasks"] for row in found if row["arithmetic"] == "contract" and "rank_correlation" in (row["tasks"] or {})
            ]
            if not tasks:
                continue
            cells = []
            for name, scale in (("rank_correlation", 1), ("neighbor_agreement", 100)):
                value, error = (mean([task[name][i] for task in tasks]) * scale for i in (0, 1))
                cells.append(f"{value:.4f} ± {error:.4f}" if scale == 1 else f"{value:.1f} ± {error:.1f}")
            lines.append((model, tool, method, str(len(tasks)), *cells))
    lines.sort(key=lambda cells: (cells[0], -float(cells[4].split()[0])))
    return markdown(("model", "tool", "method", "seeds", "rank correlation", "nearest sentence kept, %"), lines)


def bound_table() -> str:
    """What `--effort high` loses by rounding, the least that any rounding could, and what that would make of the KL."""
    newest = {row["model"]: row for row in records("bound")}
    lines: list[tuple[str, ...]] = []
    for model, rows in comparison().items():
        ours = [row for row in rows if row["tool"] == "duotone" and row["effort"] == "high"]
        bar = best_peer(rows, gradient=True)
        if model not in newest or not ours or not bar:
            continue
        loss, bound, loop = (newest[model][name] for name in ("loss", "bound", "column_loop"))
        cells = [model, f"{loop / bound:.2f}", f"{loss / bound:.2f}"]
        floor, kl = ours[0]["kl_activation_floor"], mean(over_seeds(ours, "contract"))
        if floor is None:
            lines.append((*cells, *("-" for _ in range(5))))
            continue
        reached = (floor + (kl - floor) * loop / loss, kl, floor + (kl - floor) * bound / loss, floor)
        lines.append((*cells, *(f"{value:.4f} ({value / bar[1]:.2f})" for value in reached), f"{bar[1]:.4f}"))
    head = (
        "model", "column loop", "--effort high", "KL with a column loop's loss", "KL", "with the least loss",
        "activations alone", "best peer",
    )  # fmt: skip
    return markdown(head, lines)


def task_bound_table() -> str:
    """Story endings lost by FP8 activations alone, with the least errors that rounding could leave, and with those it left."""
    lines: list[tuple[str, ...]] = []
    for row in {row["model"]: row for row in records("task_bound")}.values():
        cells = (f"{100 * one['difference']:+.2f} ± {100 * one['stderr']:.2f}" for one in row["shares"])
        lines.append((row["model"], f"{row['stories']} x {row['draws']}", f"{100 * row['accuracy']:.1f}", *cells))
    head = ("model", "stories x endings", "original, %", "FP8 activations alone", "and the least errors", "`--effort high`")
    return markdown(head, lines)


def task_table() -> str:
    """Task accuracy of what was asked, in per cent, and against the original item by item, over the calibration seeds."""
    lines: list[tuple[str, ...]] = []
    for model, asked in comparison(among=_has_tasks).items():
        named = {
            ("original", "") if row["tool"] == "original" else (row["tool"], f"{row['method']} {effort(row)}".strip())
            for row in asked
        }
        for tool, method in sorted(named, key=lambda name: (name[0] != "original", name)):
            found = [row for row in asked if row["tool"] == tool and method in ("", f"{row['method']} {effort(row)}".strip())]
            for task in found[0]["tasks"]:
                cells = [row["tasks"][task] for row in found]
                accuracy = f"{100 * mean([cell['accuracy'] for cell in cells]):.1f} ± {100 * cells[0]['stderr']:.1f}"
                lines.append((model, task, str(cells[0]["items"]), f"{tool} {method}".strip(), str(len(cells)), accuracy))
                lines[-1] += ("-", "-") if tool == "original" else paired_outcomes(cells)
    head = ("model", "task", "items", "weights", "seeds", "accuracy, %", "less the original's, points", "McNemar's p")
    return markdown(head, sorted(lines, key=lambda line: (line[0], line[1], not line[3].startswith("original"))))


def _has_tasks(row: Row) -> bool:
    return any("lost" in task for task in row["tasks"].values() if isinstance(task, dict))


def effort(row: dict[str, Any]) -> str:
    """What a method's name is followed by."""
    return "--effort high" if row["effort"] == "high" else ""


def paired_outcomes(cells: list[dict[str, Any]]) -> tuple[str, str]:
    """Difference of accuracy to the original with its paired standard error, mean over seeds, and the least p of a seed.

    The error is one seed's: the same items stand behind every seed. p: McNemar's exact test, two-sided.
    """
    differences, errors, values = [], [], []
    for cell in cells:
        lost, gained, items = cell["lost"], cell["gained"], cell["items"]
        differences.append((gained - lost) / items)
        errors.append(((gained + lost) / items - differences[-1] ** 2) ** 0.5 / items**0.5)
        values.append(mcnemar(gained, lost))
    return f"{100 * mean(differences):+.2f} ± {100 * mean(errors):.2f}", f"{min(values):.2f}"


def phases_of_time_table() -> str:
    """Seconds by phase, median over rounds, ours beside the least that their arithmetic takes on that machine."""
    lines: list[tuple[str, ...]] = []
    rest = {key: row for key, row in timed_rounds().items() if row["phases"]}
    newest = {key: row for key, row in rest.items() if row.get("floors") is not None}
    for model in dict.fromkeys(model for model, _, _ in newest):
        for tool in dict.fromkeys(tool for other, tool, _ in rest if other == model):
            rows = [row for (*name, _), row in (newest if tool == "duotone" else rest).items() if name == [model, tool]]
            phases = {phase: statistics.median(row["phases"].get(phase, 0.0) for row in rows) for phase in rows[0]["phases"]}
            least = rows[0]["floors"] or {}
            cells = []
            for phase in ("forward", "hessian", "factorize", "solve", "write"):
                spent = phases.get(phase)
                floor = f" ({statistics.median(row['floors'][phase] for row in rows):.1f})" if phase in least else ""
                cells.append("-" if spent is None else f"{spent:.1f}{floor}")
            outside = sum(phases.values()) - phases["forward"]
            lines.append((model, tool, *cells, f"{outside:.1f}", f"{sum(phases.values()):.1f}"))
    head = ("model", "tool", "forward", "moments", "factorize", "solve", "write", "all but forward", "in all")
    return markdown(head, lines)


def excess_of_phases() -> dict[str, float]:
    """How many times its arithmetic each phase of the newest timed run of ours took, largest model first."""
    timed = [row for row in records("quantize_time") if row.get("floors")]
    if not timed:
        return {}
    row = max(timed, key=lambda row: (sum(row["floors"].values()), row["date"]))
    return {phase: row["phases"][phase] / floor for phase, floor in row["floors"].items() if phase != "write"}


def scale_table() -> str:
    """On paper: models and accelerators."""
    head = (
        "model", "accelerators", "minutes at least", "minutes at our CPU's distance from that", "longest phase",
        "network of each", "memory of each",
    )  # fmt: skip
    return markdown(head, scale_lines(excess_of_phases()))


def gpu_table() -> str:
    """Seconds of each phase on one GPU, at data-sheet speed."""
    return markdown(("phase", "arithmetic, s", "memory, s", "launches, s", "one after the other, s"), gpu_lines())


def excess_table() -> str:
    """By phase: how far above its arithmetic the newest timed run was."""
    return markdown(("phase", "times its arithmetic"), [(phase, f"{times:.1f}") for phase, times in excess_of_phases().items()])


def timed_rounds() -> dict[tuple[str, str, int], Row]:
    """By model, tool and round, what took how long: of the newest session, which begins with a round 0."""
    newest: dict[tuple[str, str, int], Row] = {}
    for row in records("quantize_time"):
        model, tool, number = row["model"], row["tool"], row["round"]
        for old in [key for key in newest if key[:2] == (model, tool) and not number]:
            del newest[old]
        newest[model, tool, number] = row
    return newest


def quantize_time_table() -> str:
    """Seconds to quantize, median over rounds in which the tools took turns, and their ratio to ours round by round."""
    lines: list[tuple[str, ...]] = []
    newest = timed_rounds()
    for model, tool in dict.fromkeys((model, tool) for model, tool, _ in newest):
        found = {number: row for (*name, number), row in newest.items() if name == [model, tool]}
        method = f"{tool} {found[0]['method']}"
        if found[0]["refused"]:
            lines.append((model, method, f"refuses: {found[0]['refused'][:80]}", "-", "-"))
            continue
        ratio = statistics.median(row["seconds"] / newest[model, "duotone", i]["seconds"] for i, row in found.items())
        seconds = statistics.median(row["seconds"] for row in found.values())
        memory = max(row["peak_bytes"] for row in found.values())
        lines.append((model, method, f"{seconds:.1f}", f"{ratio:.1f}", f"{memory / 1e9:.1f} GB"))
    return markdown(("model", "tool", "seconds", "times ours", "peak memory"), lines)


def ranks_share_table() -> str:
    """What several processes of one thread take beside one, medians over rounds: in all, and by phase of the first."""
    lines: list[tuple[str, ...]] = []
    newest = {(row["model"], row["ranks"], row["round"]): row for row in records("ranks")}
    for model, ranks in dict.fromkeys((model, ranks) for model, ranks, _ in newest):
        rows = [row for key, row in newest.items() if key[:2] == (model, ranks)]
        alone, together = (statistics.median(row[f"seconds_{how}"] for row in rows) for how in ("alone", "together"))
        share = statistics.median(row["seconds_alone"] / row["seconds_together"] / ranks for row in rows)
        cells = []
        for phase in ("forward", "hessian", "factorize", "solve", "exchange"):
            both = (statistics.median(row[f"phases_{how}"].get(phase, 0.0) for row in rows) for how in ("alone", "together"))
            cells.append(" / ".join(f"{seconds:.1f}" for seconds in both))
        same = "yes" if all(row["same_bytes"] for row in rows) else "no"
        lines.append((model, str(ranks), f"{alone:.1f} / {together:.1f}", f"{100 * share:.0f} %", *cells, same))
    phases = ("forward", "moments", "factorize", "solve", "exchange")
    return markdown(("model", "processes", "seconds, one / all", "efficiency", *phases, "same bytes"), lines)


def linear_table() -> str:
    """A shape and number of tokens a line, the widest instruction set first: ours, and how many times as fast as torch's."""
    newest: dict[tuple[object, ...], Row] = {}
    for row in records("linear"):
        newest[path_of(row), row["threads"], *row["shape"], row["tokens"], row["kernel"]] = row
    lines: list[tuple[str, ...]] = []
    order = sorted(newest.items(), key=lambda item: (-PATHS.index(str(item[0][0])), -int(str(item[0][1]))))
    for (path, threads, rows, columns, tokens, kernel), row in order:
        if not str(kernel).startswith("duotone"):
            continue
        times = row["times_as_fast_as"]
        lines.append(
            (
                str(path), str(threads), f"{rows} x {columns}", str(tokens), f"{row['ms']:.2f}",
                f"{100 * row['roofline_share']:.0f} %", f"{100 * row['gflops'] / row['peak_gflops']:.0f} %",
                f"{times['torch BF16']:.1f}" if times["torch BF16"] >= 2 else f"{times['torch BF16']:.2f}",
                f"{times['torch int4pack (W4A16)']:.1f}",
            )
        )  # fmt: skip
    head = (
        "path", "threads", "N x K", "tokens", "ms", "of memory", "of the peak", "times as fast as BF16", "as torch's int4pack",
    )  # fmt: skip
    return markdown(head, lines)


def path_of(row: Row) -> str:
    """The instruction set that a row was measured with."""
    return str(row["backend"]).rpartition(" ")[2]


def generate_table() -> str:
    """Tokens a second of each runtime, of the newest measurement of each instruction set and length."""
    newest: dict[tuple[object, ...], Row] = {}
    path = ""
    for row in records("generate"):
        path = path_of(row) if row["backend"] else path  # the others took turns with the row of ours before them
        newest[path, row["model"], row["prompt_tokens"], row["threads"], row["runtime"]] = row
    lines = [
        (
            str(path),
            f"{row['runtime']}",
            f"{prompt} + {row['new_tokens']}",
            str(threads),
            f"{row['prefill_tokens_per_second']:.1f}",
            f"{row['decode_tokens_per_second']:.1f}",
            f"{row['ours_times_as_fast']['prefill']:.2f}",
            f"{row['ours_times_as_fast']['decode']:.2f}",
            f"{row['weight_bytes'] / 1e9:.2f} GB",
        )
        for (path, _, prompt, threads, _), row in sorted(newest.items(), key=lambda item: -PATHS.index(str(item[0][0])))
    ]
    head = (
        "path", "runtime", "tokens", "threads", "prompt, tokens/s", "writing, tokens/s", "ours reads, times as fast",
        "ours writes", "weights",
    )  # fmt: skip
    return markdown(head, lines)


#: Variants of what `dpq` was until 2026-11-27: five sizes of scales and coordinate descent, in place of the local search.
NO_MORE = {"dpq without slid scales", "dpq with 1 descent", "dpq with 12 descents"}


def ablation_table() -> str:
    """KL of every variant, one column a model and target."""
    newest = {
        (row["variant"], row["model"], row["target"]): row["kl"] if row["kl"] is not None else row["embedding_error"]
        for row in records("ablation")
    }
    columns = list(dict.fromkeys((model, target) for _, model, target in newest))
    head = ("variant", *(f"{model}, {target}" for model, target in columns))
    variants = dict.fromkeys(variant for variant, _, _ in newest if variant not in NO_MORE)
    cells = ((v, *(f"{newest[v, m, t]:.5f}" if (v, m, t) in newest else "-" for m, t in columns)) for v in variants)
    return markdown(head, list(cells))


def random_models_table() -> str:
    """The distance to the original of the models of random weights that were timed."""
    found: dict[str, dict[str, float]] = {}
    for row in records("random_models"):
        if row["arithmetic"] == "contract" and row["kl"] is not None and row["tool"] != "original":
            found.setdefault(row["model"], {})[f"{row['tool']} {row['method']}"] = row["kl"]
    tools = list(dict.fromkeys(tool for kls in found.values() for tool in kls))
    return markdown(("model", *tools), [(model, *(f"{kls[tool]:.4f}" for tool in tools)) for model, kls in found.items()])


def advice_text_table() -> str:
    """What texts are worth, at the number of windows that most were measured with; the nearest to the original first."""
    rows = records("advice")
    counts = [row["calibration"]["windows"] for row in rows]
    usual = [row for row in rows if row["calibration"]["windows"] == max(counts, key=counts.count)]
    lines = []
    for row in sorted(usual, key=lambda row: row["kl"]):
        heart = sum(one["by_heart"] * one["windows"] for one in row["sources"]) / row["calibration"]["windows"]
        figures = (f"{row['divergence']:.2f}", f"{row['perplexity_ratio']:.2f}", f"{100 * heart:.1f} %")
        lines.append((", ".join(row["calibration"]["text"]), *figures, distance(row)))
    return markdown(("calibration text", "divergence", "perplexity ratio", "by heart", "KL to the original"), lines)


def advice_tokens_table() -> str:
    """KL by calibration tokens for each input of the widest linear, of the text that was measured with the most numbers."""
    rows = records("advice")
    texts = [json.dumps(row["calibration"]["text"]) for row in rows]
    curve = [row for row, text in zip(rows, texts, strict=True) if text == max(texts, key=texts.count)]
    lines = [
        (str(row["calibration"]["tokens"]), f"{row['tokens_an_input']:.1f}", distance(row))
        for row in sorted(curve, key=lambda row: row["tokens_an_input"])
    ]
    return markdown(("calibration tokens", "for each input of the widest linear", "KL to the original"), lines)


def sensitivity_table() -> str:
    """Lists by hand beside the choice of at most as many bytes, the newest of each."""
    newest = {(row["model"], row["by_hand"]): row for row in records("sensitivity")}
    rows = []
    for row in newest.values():
        chosen = {key.removeprefix("chosen_"): value for key, value in row.items() if key.startswith("chosen_")}
        counts = ", ".join(f"{count} {name}" for name, count in row.get("precisions", {}).items() if count)
        ratio = f"{chosen['kl'] / row['kl']:.2f}" if chosen else "-"
        figures = (f"{row['nbytes'] / 1e6:.1f}", distance(row), distance(chosen) if chosen else "-", ratio, counts or "-")
        rows.append((row["model"], row["by_hand"], *figures))
    return markdown(("model", "by hand", "MB", "KL", "KL of the choice", "ratio", "groups of linears chosen"), rows)


def kv_cache_table() -> str:
    """KL with the cache in BF16 and in FP8, and its bytes, the newest row of each."""
    newest = {(row["model"], row["strategy"]): row for row in records("kv_cache")}
    words = {None: "BF16", "tensor": "FP8, a scale for a layer's keys or values", "attn_head": "FP8, a scale for each head's"}
    rows = [
        (
            row["model"],
            words[row["strategy"]],
            f"{row['cache_bytes'] / row['cache_tokens']:.0f}",
            distance(row),
            f"{row['kl_more']:+.5f} ± {row['kl_more_stderr']:.5f}" if row["strategy"] else "",
            f"{row['perplexity']:.3f}",
            f"{100 * row['top1_agreement']:.2f} %",
        )
        for row in newest.values()
    ]
    head = ("model", "cache", "bytes a token", "KL to the original", "more than with BF16", "perplexity", "top-1 agreement")
    return markdown(head, rows)


def vllm_cache_table() -> str:
    """Scales of FP8 caches that vLLM's own loading code has put into attention, the newest row of each."""
    newest = {(row["model"], row["ranks"]): row for row in records("vllm_load") if row.get("kv_cache")}
    head = ("checkpoint", "vLLM", "ranks", "strategy", "scales, all ranks", "ours", "fused linears", "the contract's bits")
    columns = ("model", "vllm", "ranks", "kv_cache", "cache_scales", "cache_scales_equal", "layers", "equal")
    rows = [tuple(str(row[name]) for name in columns) for row in newest.values()]
    return markdown(head, rows)


def vllm_load_table() -> str:
    """What vLLM's own loading code makes of our checkpoints, the newest row of each."""
    rows = [row for row in records("vllm_load") if not row.get("kv_cache")]
    newest = {(row["model"], row.get("plugin", False), row["ranks"]): row for row in rows}
    head = ("checkpoint", "vLLM", "loaded by", "ranks", "fused linears, all ranks", "the contract's bits", "`duotone check`")
    return markdown(
        head,
        [
            (
                row["model"],
                row["vllm"],
                "Duotone's plugin, on an L40S" if row.get("plugin") else "vLLM, on an H100",
                str(row["ranks"]),
                "refused: " + row["refused"] if row["refused"] else str(row["layers"]),
                "-" if row["refused"] else str(row["equal"]),
                row["check"],
            )
            for row in newest.values()
        ],
    )


def readers_table() -> str:
    """What other tools make of our exports, the newest row of each checkpoint and reader."""
    newest = {(row["model"], row["reader"]): row for row in records("readers")}
    head = ("checkpoint", "format", "exactness", "weights move by", "read by", "linears", "as `export` says", "logits apart")
    return markdown(
        head,
        [
            (
                row["model"],
                row["layout"],
                row["exactness"],
                f"{100 * row['weight_error']:.2f} %",
                f"refused by {row['reader']}: {row['refused']}" if row["refused"] else f"{row['reader']} {row['version']}",
                str(row["layers"]),
                "-" if row["equal"] is None else str(row["equal"]),
                "-" if row["equal"] is not None else f"{100 * row['distance']:.2f} %",
            )
            for row in sorted(newest.values(), key=lambda row: (row["layout"], row["model"]))
        ],
    )


def architectures_table() -> str:
    """What became of each class of transformers, of random weights; the newest row of each."""
    latest = {row["model_class"]: row for row in records("architectures") if row["source"] == "random weights"}
    lines: list[tuple[str, ...]] = []
    for name, row in latest.items():
        if row.get("refused"):
            lines.append((name, "-", "-", "-", "-", f"refuses: {row['refused']}"))
            continue
        counts = str(row["linears_quantized"]), str(row["linears_left"]), f"{100 * row['quantized_macs_share']:.0f} %"
        lines.append((name, *counts, f"{row['quantized']:.3f}", f"{row['max_error_vs_reference']:.1e}"))
    head = ("class", "linears quantized", "left", "of all weights", "from the original", "from the contract in float64")
    return markdown(head, lines)


def vision_table() -> str:
    """Accuracy of real vision models before and after; the newest row of each model and method."""
    latest = {(row["model_class"], row["method"]): row for row in records("architectures") if row["source"] == "real weights"}
    lines = [
        (
            name,
            method,
            row["metric"],
            f"{row['original']:.2f}",
            f"{row['quantized']:.2f}",
            f"{row['quantized'] - row['original']:+.2f} ± {row['difference_stderr']:.2f}",
            f"{row['kl']:.4f} ± {row['kl_stderr']:.4f}",
            f"{100 * row['quantized_macs_share']:.0f} %",
        )
        for (name, method), row in latest.items()
    ]
    head = ("model", "method", "metric", "original", "quantized", "difference", "KL", "of all weights")
    return markdown(head, lines)


def diffusion_table() -> str:
    """What became of models of diffusers, of random weights; the newest row of each."""
    lines: list[tuple[str, ...]] = []
    for name, row in {row["model_class"]: row for row in records("diffusion")}.items():
        if row.get("refused"):
            lines.append((name, *("-",) * 5, f"refuses: {row['refused']}"))
            continue
        counts = str(row["linears_quantized"]), str(row["padded"]), str(row["linears_left"])
        share, apart = f"{100 * row['computed_share']:.1f} %", f"{row['max_linear_error']:.1e}"
        lines.append((name, *counts, share, f"{row['quantized']:.3f}", apart))
    head = (
        "class", "quantized", "of these with K padded", "left", "of all multiply-accumulates", "from the original",
        "furthest linear from the contract in float64",
    )  # fmt: skip
    return markdown(head, lines)


def small_models_table() -> str:
    """Small trained models before and after; the newest row of each model, metric and method."""
    latest = {(row["model_class"], row["metric"], row["method"]): row for row in records("small_models")}
    lines: list[tuple[str, ...]] = []
    for (name, metric, method), row in latest.items():
        digits = 2 if "%" in metric else 3 if "dB" in metric else 5
        apart = f"{row['quantized'] - row['original']:+.{digits}f} ± {row['difference_stderr']:.{digits}f}"
        values = f"{row['original']:.{digits}f}", f"{row['quantized']:.{digits}f}", apart
        lines.append((name, metric, method, *values, f"{100 * row['quantized_macs_share']:.0f} %"))
    lines.sort(key=lambda line: (line[0], line[1]))  # stable: methods stay in their order
    return markdown(("model", "metric", "method", "original", "quantized", "difference", "of all weights"), lines)


def vllm_generate_table() -> str:
    """What vLLM's CPU build writes from each layout, the newest row of each."""
    newest = {(row["model"], row["layout"]): row for row in records("vllm_generate")}
    head = ("checkpoint", "layout", "vLLM", "`duotone check`", "tokens", "the reference's likeliest", "log-probability apart")
    found = []
    for row in newest.values():
        told = f"{row['mean_difference']:.4f} mean, {row['largest_difference']:.3f} most" if not row["refused"] else "-"
        written = (str(row["tokens"]), str(row["likeliest"])) if not row["refused"] else ("refused", "-")
        found.append((row["model"], row["layout"], row["vllm"], row["check"], *written, told))
    return markdown(head, found)


def vllm_plugin_table() -> str:
    """What vLLM's CPU build holds and writes with our plugin, the newest row of each."""
    rows = [row | {"dtype": row.get("dtype", "bfloat16")} for row in records("vllm_plugin")]
    newest = {(row["model"], row["dtype"], row["ranks"]): row for row in rows}
    head = (
        "checkpoint", "target", "dtype", "ranks", "fused linears, all ranks", "the contract's bits", "bits a weight in memory",
        "tokens", "as `duotone.load` writes them", "its likeliest in float32", "log-probability apart",
        "the last two of `duotone.load` itself",
    )  # fmt: skip
    found = []
    for row in sorted(newest.values(), key=lambda row: (row["model"], row["dtype"] == "bfloat16", row["ranks"])):
        counts = (row["layers"], row["equal"], f"{row['bits_in_memory']:.2f}", row["tokens"], row["same"], row["likeliest"])
        own = f"{row['ours']['likeliest']}, {row['ours']['mean_difference']:.4f}"
        facts = (row["model"], row["target"], row["dtype"], row["ranks"], *counts, f"{row['mean_difference']:.4f}", own)
        found.append(tuple(map(str, facts)))
    return markdown(head, found)


def vllm_speed_table() -> str:
    """vLLM's CPU build in turns with itself: our plugin and what it has of its own."""
    newest = {(row["model"], row["threads"], row["runs"]): row for row in records("vllm_speed")}
    head = ("model", "threads", "vLLM runs", "first token", "each further token", "the plugin is as fast: first", "each")
    found = []
    for row in newest.values():
        times = row["plugin_times_as_fast"]
        spread = f"{times['each']:.2f} times ({times['each_spread'][0]:.2f} to {times['each_spread'][1]:.2f})"
        seconds = (f"{1000 * row['first_token_s']:.0f} ms", f"{1000 * row['each_token_s']:.1f} ms")
        found.append((row["model"], str(row["threads"]), row["runs"], *seconds, f"{times['first']:.2f} times", spread))
    return markdown(head, found)


#: How a page calls what it shows of a runtime, and the device groups it puts side by side.
RUNTIME_TITLES = {
    "vllm": "vLLM",
    "vllm-plugin": "Duotone's plugin in vLLM",
    "sglang": "SGLang",
    "tensorrt-llm": "TensorRT-LLM",
    "transformers": "transformers",
    "gaudi-inc": "Gaudi:",
    "llama.cpp": "llama.cpp:",
    "duotone": "Duotone",
}
_EXPORT = re.compile(r"duotone export --format (\S+) loads there: (.+)")
_FIRST_WORDS = re.compile("[,:]")


def loads_table() -> str:
    """What becomes of a Llama-3-8B-shaped checkpoint everywhere, out of the rules that `duotone check` applies.

    Devices on which every runtime does the same share a column.
    """
    cells = {gpu: tuple(_loads(runtime, gpu) for runtime in RUNTIMES) for gpu in GPUS}
    columns: dict[tuple[str, ...], list[str]] = {}
    for gpu, column in cells.items():
        columns.setdefault(column, []).append(gpu)
    head = ("", *(", ".join(gpu.upper() for gpu in gpus) for gpus in columns.values()))
    versions = [kind.version.removeprefix("of ").partition(" with ")[0] for kind in RUNTIMES.values()]
    titles = [f"{RUNTIME_TITLES[name]} {version}" for name, version in zip(RUNTIMES, versions, strict=True)]
    titles = [title.removesuffix(f" {RUNTIMES['duotone'].version}") for title in titles]
    return markdown(head, [(title, *(column[i] for column in columns)) for i, title in enumerate(titles)])


def _loads(runtime: str, gpu: str) -> str:
    """As it is, or after which export."""
    found = judge(_llama(), runtime, gpu)
    if found.runs is not None:
        return f"{found.outcome.upper()}: {_FIRST_WORDS.split(found.runs)[0]}"
    for advice in found.advice:
        if match := _EXPORT.match(advice):
            return f"{_FIRST_WORDS.split(match.group(2))[0]}, after `export --format {match.group(1)}`"
    return "-"


def _llama() -> Subject:
    """One block in the layout that `quantize` writes, of widths that every kernel takes."""
    shapes = {"q": (4096, 4096), "k": (1024, 4096), "v": (1024, 4096)}
    qkv = tuple(Linear(f"{name}_proj", *shape, "rows", shape[0] // 128) for name, shape in shapes.items())
    mlp = tuple(Linear(f"{name}_proj", 14336, 4096, "rows") for name in ("gate", "up"))
    out, down = Linear("o_proj", 4096, 4096, "columns"), Linear("down_proj", 4096, 14336, "columns")
    return Subject("compressed-tensors", 128, True, "bfloat16", (qkv, (out,), mlp, (down,)), heads=(32, 8))


def gpu_records() -> dict[str, list[Row]]:
    """By device, what `duotone bench gpu` measured there last; nothing where nobody has."""
    return goals.newest(records("gpu")) if (RECORDS / "gpu.jsonl").exists() else {}


def gpu_goals_table() -> str:
    """What is wanted of the kernels, and on each device what was measured."""
    found = gpu_records() or {"": []}
    return "\n".join(_titled(device, tables.GOALS_HEAD, tables.goal_cells(goals.judge(rows))) for device, rows in found.items())


def gpu_linears_table() -> str:
    """On each device: ours beside each other kernel."""
    return _by_device(("N x K", "tokens", "ours, ms", "of memory", "of the peak", "times as fast as"), _gpu_linears)


def _gpu_linears(rows: list[Row]) -> list[tuple[str, ...]]:
    found = [row for row in rows if row["kind"] == "linear" and row["unmeasured"] is None and row["kernel"] == forms.OURS.name]
    return [
        (
            " x ".join(map(str, row["shape"])), str(row["tokens"]), f"{row['ms']:.4f}", f"{100 * row['roofline_share']:.0f} %",
            f"{100 * row['gflops'] / row['peak_gflops']:.0f} %",
            ", ".join(f"{name} {times:.2f}" for name, times in row["times_as_fast_as"].items()),
        )
        for row in sorted(found, key=lambda row: (row["part"] == "peers", row["shape"], row["tokens"]))
    ]  # fmt: skip


def gpu_steps_table() -> str:
    """On each device: a model's steps."""
    return _by_device(tables.STEPS_HEAD, tables.step_cells)


def gpu_throughput_table() -> str:
    """On each device: tokens a second."""
    return _by_device(tables.THROUGHPUT_HEAD, tables.throughput_cells)


def gpu_tiles_table() -> str:
    """On each device: other ways to multiply beside ours."""
    return _by_device(tables.TILES_HEAD, tables.tile_cells)


def gpu_quantizer_table() -> str:
    """On each device: the quantizer's time."""
    return _by_device(tables.QUANTIZER_HEAD, tables.quantizer_cells)


def _by_device(head: tuple[str, ...], cells: Callable[[list[Row]], list[tuple[str, ...]]]) -> str:
    """A table for each device that has a line for it."""
    found = {device: cells(rows) for device, rows in gpu_records().items()}
    return "\n".join(_titled(device, head, lines) for device, lines in found.items() if lines) or "Unmeasured.\n"


def _titled(device: str, head: tuple[str, ...], lines: list[tuple[str, ...]]) -> str:
    return (f"{device}:\n\n" if device else "") + markdown(head, lines)


TABLES: dict[str, Callable[[], str]] = {
    "architectures": architectures_table,
    "vision": vision_table,
    "diffusion": diffusion_table,
    "small-models": small_models_table,
    "demo": demo_table,
    "accuracy": accuracy_table,
    "advice-text": advice_text_table,
    "sensitivity": sensitivity_table,
    "advice-tokens": advice_tokens_table,
    "layer-error": layer_error_table,
    "comparison": comparison_table,
    "goal": goal_table,
    "second-rounding": second_rounding_table,
    "paired": paired_table,
    "windows": windows_table,
    "ranks": ranks_table,
    "bound": bound_table,
    "task-bound": task_bound_table,
    "tasks": task_table,
    "quantize-time": quantize_time_table,
    "quantize-phases": phases_of_time_table,
    "scale": scale_table,
    "ranks-share": ranks_share_table,
    "scale-excess": excess_table,
    "scale-gpu": gpu_table,
    "out-of-domain": out_of_domain_table,
    "vllm-load": vllm_load_table,
    "vllm-cache": vllm_cache_table,
    "kv-cache": kv_cache_table,
    "readers": readers_table,
    "vllm-generate": vllm_generate_table,
    "vllm-plugin": vllm_plugin_table,
    "vllm-speed": vllm_speed_table,
    "loads": loads_table,
    "random-models": random_models_table,
    "ablation": ablation_table,
    "linear": linear_table,
    "gpu-goals": gpu_goals_table,
    "gpu-linears": gpu_linears_table,
    "gpu-steps": gpu_steps_table,
    "gpu-throughput": gpu_throughput_table,
    "gpu-quantizer": gpu_quantizer_table,
    "gpu-tiles": gpu_tiles_table,
    "generate": generate_table,
}


def render(text: str) -> str:
    """A page with its tables made anew. Raises KeyError for a table nobody makes."""
    return _BLOCK.sub(lambda match: match.group(1) + TABLES[match.group("name")]() + match.group(3), text)


def main() -> None:
    """Rewrite the pages; with --check only say, by exit code 1, which are out of date."""
    stale = []
    for page in PAGES:
        path = ROOT / page
        new = render(path.read_text(encoding="utf-8"))
        if new != path.read_text(encoding="utf-8"):
            stale.append(page)
            if "--check" not in sys.argv:
                path.write_text(new, encoding="utf-8")
    if stale and "--check" in sys.argv:
        sys.exit(f"out of date, run python tools/render.py: {', '.join(stale)}")


if __name__ == "__main__":
    main()
