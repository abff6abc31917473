"""Results as a person reads them: rich tables from the plain values that `--json` prints."""

import re
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from duotone.card import TASK_HEADER, task_cells


def megabytes(nbytes: float) -> str:
    """Bytes as MB or GB."""
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"


def duration(seconds: float) -> str:
    """Seconds as a person says them."""
    if seconds < 90:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def quantize_summary(report: dict[str, Any]) -> RenderableType:
    """What `duotone quantize` did."""
    config, seconds = report["config"], report["seconds"]
    errors = [layer["output_error"] for layer in report["layers"] if layer["output_error"] is not None]
    table = _facts()
    table.add_row("checkpoint", Text(report["out"], style="bold"))
    table.add_row("method", f"{config['method']}, target {config['target']}, group size {config['group_size']}")
    table.add_row("weights", f"{megabytes(report['original_bytes'])} -> {megabytes(report['weight_bytes'])}")
    table.add_row("bits per weight", f"{report['bits_per_weight']:.3f} in {len(report['layers'])} linears")
    table.add_row("quantized", f"{100 * report['quantized_macs_share']:.1f} % of the linears' multiply-accumulates")
    if errors:
        table.add_row("output error", f"{sum(errors) / len(errors):.5f} mean, {max(errors):.5f} worst (relative, squared)")
    conditions = [layer["condition_number"] for layer in report["layers"] if layer["condition_number"] is not None]
    if conditions:
        raised = sum(layer["damping_frac"] > config["damping_frac"] for layer in report["layers"])
        dead = sum(layer["dead_columns"] > 0 for layer in report["layers"])
        damping = f"{config['damping_frac']:g}" + (f", raised for {raised} linears" if raised else "")
        idle = f", {dead} linears with channels that were always zero" if dead else ""
        table.add_row("Hessians", f"condition up to {max(conditions):.1e} with damping {damping}{idle}")
    if report["calibration"]:
        calibration = report["calibration"]
        table.add_row("calibration", f"{calibration['tokens']} tokens of {', '.join(calibration['text'])}")
    phases = ", ".join(f"{phase} {duration(spent)}" for phase, spent in seconds.items())
    table.add_row("time", f"{duration(sum(seconds.values()))} ({phases})")
    table.add_row("peak memory", megabytes(report["peak_bytes"]))
    if report["device_bytes"]:
        table.add_row("peak GPU memory", f"{megabytes(report['device_bytes'])}; hidden states in {report['states_in']}")
    return Group(table, *_kept(report["kept"]), *_notes(report["notes"]))


def plan_summary(plan: dict[str, Any]) -> RenderableType:
    """What `duotone quantize --dry-run` foresees."""
    table = _facts()
    table.add_row(
        "linears to quantize", f"{plan['linears']} ({100 * plan['quantized_macs_share']:.1f} % of multiply-accumulates)"
    )
    table.add_row("bits per weight", f"{plan['bits_per_weight']:.3f}")
    table.add_row("time", f"about {duration(plan['seconds'])} on {plan['device']} ({_speeds(plan['measured'])})")
    table.add_row("peak memory", f"about {megabytes(plan['peak_bytes'])}")
    if plan["device_bytes"]:
        table.add_row("peak GPU memory", f"about {megabytes(plan['device_bytes'])}; hidden states in {plan['states_in']}")
    table.add_row("disk", megabytes(plan["disk_bytes"]))
    if plan["saved_bytes"]:
        table.add_row("and a save", f"{megabytes(plan['saved_bytes'])}, twice that for moments (--resume)")
    return Group(table, *_kept(plan["kept"]), *_notes(plan["notes"]))


def _speeds(measured: dict[str, float]) -> str:
    """What products were measured at."""
    names = {"bfloat16_flops": "BF16", "float32_flops": "float32"}
    return ", ".join(f"{measured[key] / 1e12:.3g} TFLOP/s in {name}" for key, name in names.items() if key in measured)


def evaluation_summary(result: dict[str, Any]) -> RenderableType:
    """What `duotone eval` measured."""
    table = _facts()
    table.add_row("tokens", str(result["tokens"]))
    reference = result["reference_perplexity"]
    table.add_row("perplexity", f"{result['perplexity']:.4f}" + (f" (reference {reference:.4f})" if reference else ""))
    table.add_row("bits per byte", f"{result['bits_per_byte']:.4f}")
    if result["kl"] is not None:
        spread = "" if result["kl_stderr"] is None else f" ± {result['kl_stderr']:.5f}"
        table.add_row("KL to reference", f"{result['kl']:.5f}{spread} nats a token")
        table.add_row("top-1 agreement", f"{100 * result['top1_agreement']:.2f} %")
    return table


def tasks_summary(found: list[dict[str, Any]]) -> RenderableType:
    """Figures by task, and against the original on the same items."""
    table = Table(*TASK_HEADER)
    for one in found:
        table.add_row(*task_cells(one))
    return table


def advice_summary(found: dict[str, Any]) -> RenderableType:
    """What `duotone advise` measured, and what to do about it."""
    table = Table("text", "windows", "tokens", "repeated", "perplexity", "of zlib's bits", "by heart", box=None, pad_edge=False)
    for role, texts in (("calibration", found["calibration"]), ("compared with", found["text"])):
        for one in texts:
            error = "" if one["log_stderr"] is None else f" ± {one['perplexity'] * one['log_stderr']:.2f}"
            percents = (f"{100 * one[name]:.1f} %" for name in ("repeated", "zlib_ratio", "by_heart"))
            repeated, ratio, by_heart = percents
            title, perplexity = f"{role}: {one['text']} ({one['rendering']})", f"{one['perplexity']:.2f}{error}"
            table.add_row(title, str(one["windows"]), str(one["tokens"]), repeated, perplexity, ratio, by_heart)
    facts = _facts()
    facts.add_row("tokens", f"{found['tokens_an_input']:.1f} for each of the {found['inputs']} inputs of {found['widest']}")
    if found["divergence"] is not None:
        facts.add_row("against the other text", f"perplexity {found['perplexity_ratio']:.2f} times as high")
        kinds = f"divergence of the tokens {found['divergence']:.3f} of 1, of texts of one kind {found['chance']:.3f}"
        facts.add_row("", f"{kinds}; {100 * found['overlap']:.1f} % of its runs stand in both")
    if found["experts"]:
        facts.add_row("experts", f"{found['starved']} of {found['experts']} with too few tokens")
    advice = [Text(f"{one['about']}: {one['sentence']}", style="yellow") for one in found["advice"]]
    return Group(table, "", facts, "", *(advice or [Text("nothing to advise: the text suits the model", style="green")]))


def inspection_summary(facts: dict[str, Any]) -> RenderableType:
    """What `duotone inspect` found."""
    table = Table(header_style="bold", box=None, pad_edge=False)
    for column, justify in (("layer", "left"), ("shape", "right"), ("scheme", "left"), ("bytes", "right"), ("error", "right")):
        table.add_column(column, justify=justify)  # pyright: ignore[reportArgumentType]
    table.add_column("why not quantized")
    for layer in facts["layers"]:
        error = "" if layer["output_error"] is None else f"{layer['output_error']:.5f}"
        shape = " x ".join(str(size) for size in layer["shape"])
        table.add_row(layer["layer"], shape, layer["scheme"], f"{layer['nbytes']:,}", error, layer["kept_because"] or "")
    totals = _facts()
    totals.add_row("all tensors", megabytes(facts["total_bytes"]))
    if facts["quantized_bytes"]:
        totals.add_row(
            "quantized linears", f"{megabytes(facts['quantized_bytes'])}, {facts['bits_per_weight']:.3f} bits per weight"
        )
    if facts["kv_cache"]:
        totals.add_row("KV cache", facts["kv_cache"])
    if facts["backend"]:
        totals.add_row("multiplied here by", "\n".join((facts["backend"], *facts["refusals"])))
    return Group(table, "", totals, *_notes(facts["notes"]))


def explanation_summary(facts: dict[str, Any]) -> RenderableType:
    """What `duotone explain` found: like layers of all blocks on a line, then what each kernel runs, and what refused."""
    table = Table(header_style="bold", box=None, pad_edge=False)
    for column, justify in (("layers", "left"), ("", "right"), ("shape", "right"), ("scheme", "left"), ("run by", "left")):
        table.add_column(column, justify=justify)  # pyright: ignore[reportArgumentType]
    table.add_column("of the work", justify="right")
    table.add_column("why not quantized")
    alike: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for layer in facts["layers"]:
        name = re.sub(r"\.\d+\.", ".*.", layer["layer"])
        shape = " x ".join(str(size) for size in layer["shape"])
        alike.setdefault((name, shape, layer["scheme"], layer["runs"], layer["kept_because"] or ""), []).append(layer)
    for (name, shape, scheme, runs, reason), layers in alike.items():
        share = sum(layer["macs_share"] for layer in layers)
        table.add_row(name, f"{len(layers)}", shape, scheme, runs, f"{100 * share:.1f} %", reason)
    totals = _facts()
    totals.add_row("device", facts["device"])
    if facts["kv_cache"]:
        totals.add_row("KV cache", facts["kv_cache"])
    for kernel in facts["kernels"]:
        share = f"{100 * kernel['macs_share']:.1f} % of multiply-accumulates, linears: {kernel['layers']}"
        totals.add_row(kernel["runs"], "\n".join((share, *(f"refused: {refusal}" for refusal in kernel["refusals"]))))
    return Group(table, "", totals)


def check_summary(found: list[dict[str, Any]]) -> RenderableType:
    """What `duotone check` found: of one place its linears and reasons; of several a table of runtimes and devices."""
    if len(found) > 1:
        return _places(found)
    (one,) = found
    facts = _facts()
    ranks = f", {one['tensor_parallel']} ranks" if one["tensor_parallel"] > 1 else ""
    facts.add_row("where", f"{one['runtime']} ({one['version']}) on {one['gpu']}{ranks}")
    facts.add_row("layout", one["layout"])
    verdict = f"{one['outcome']}: {one['runs']}" if one["runs"] else "refused"
    facts.add_row("loads as" if one["runs"] else "would be", Text(verdict, style="green" if one["runs"] else "bold red"))
    table = Table("layers", "", "becomes", "why", header_style="bold", box=None, pad_edge=False)
    alike: dict[tuple[str, str, str], int] = {}
    for layer in one["layers"]:
        key = (re.sub(r"\.\d+\.", ".*.", layer["layer"]), layer["outcome"], layer["reason"] or "")
        alike[key] = alike.get(key, 0) + 1
    for (name, outcome, reason), count in alike.items():
        table.add_row(name, str(count), outcome, reason)
    reasons = [Text(f"refused: {reason}", style="red") for reason in dict.fromkeys(one["reasons"])]
    word = "better" if one["runs"] else "instead"
    advice = [Text(f"{word}: {advice}", style="green") for advice in one["advice"]]
    return Group(facts, "", table, "", *reasons, *advice)


def _places(found: list[dict[str, Any]]) -> RenderableType:
    devices = list(dict.fromkeys(one["gpu"] for one in found))
    table = Table("", *devices, header_style="bold", box=None, pad_edge=False)
    for runtime in dict.fromkeys(one["runtime"] for one in found):
        row = {one["gpu"]: one for one in found if one["runtime"] == runtime}
        version = next(iter(row.values()))["version"]
        table.add_row(f"{runtime} {version}", *(_place(row[device]) for device in devices))
    what = "as X: after duotone export --format X. Why, and linear by linear: duotone check MODEL --runtime R --gpu G"
    return Group(table, "", Text(what, style="dim"))


def _place(one: dict[str, Any]) -> Text:
    export = next((advice.split()[3] for advice in one["advice"] if advice.startswith("duotone export")), None)
    if one["runs"]:
        return Text(one["outcome"], style="green")
    return Text(f"as {export}", style="yellow") if export else Text("-", style="dim")


def conversion_summary(report: dict[str, Any]) -> RenderableType:
    """What `duotone export` or `import` wrote, like layers of all blocks on a line."""
    facts = _facts()
    facts.add_row("checkpoint", Text(report["out"], style="bold"))
    facts.add_row("layout", report["layout"])
    facts.add_row("weights", f"{megabytes(report['original_bytes'])} -> {megabytes(report['weight_bytes'])}")
    table = Table("layers", "", "exactness", "weights move by", header_style="bold", box=None, pad_edge=False)
    alike: dict[tuple[str, str], list[float]] = {}
    for layer in report["layers"]:
        alike.setdefault((re.sub(r"\.\d+\.", ".*.", layer["layer"]), layer["exactness"]), []).append(layer["weight_error"])
    for (name, exactness), errors in alike.items():
        table.add_row(name, str(len(errors)), exactness, f"{100 * max(errors) ** 0.5:.2f} %" if max(errors) else "0")
    return Group(facts, "", table, *_notes(report["notes"]))


def push_summary(report: dict[str, Any]) -> RenderableType:
    """What `duotone push` uploaded, and what it left."""
    facts = _facts()
    facts.add_row("repository", Text(f"{report['repo']} ({'private' if report['private'] else 'public'})", style="bold"))
    facts.add_row("commit", f"{report['commit']} on {report['revision']}")
    facts.add_row("files", f"{len(report['files'])}, {megabytes(report['total_bytes'])}")
    if report["left"]:
        facts.add_row("not uploaded", ", ".join(report["left"]))
    return Group(facts, *_notes(report["notes"]))


def comparison_table(rows: list[dict[str, Any]]) -> RenderableType:
    """Checkpoints against one original, those that none beats in both bits and KL with a star."""
    tasks = [task_cells(one)[0] for one in rows[0]["tasks"]]
    table = Table(header_style="bold", box=None, pad_edge=False)
    for column in ("", "checkpoint", "layout", "size", "bits", "KL", "perplexity", "top-1", *tasks, "reads", "writes"):
        table.add_column(column, justify="left" if column in {"", "checkpoint", "layout"} else "right")
    for row in rows:
        figures = row["figures"]
        spread = "" if figures["kl_stderr"] is None else f" ± {figures['kl_stderr']:.5f}"
        table.add_row(
            "*" if row["on_front"] else "",
            row["name"],
            row["layout"] + (" (imported)" if row["imported"] else ""),
            megabytes(row["nbytes"]),
            f"{row['bits']:.3f}",
            f"{figures['kl']:.5f}{spread}",
            f"{figures['perplexity']:.4f}",
            f"{100 * figures['top1_agreement']:.2f} %",
            *(task_cells(one)[2] for one in row["tasks"]),
            *("" if row[name] is None else f"{row[name]:.0f} tokens/s" for name in ("reads", "writes")),
        )
    reference = rows[0]["figures"]["reference_perplexity"]
    return Group(table, "", Text(f"perplexity of the original {reference:.4f}; bits of all tensors a weight", style="dim"))


def show(renderable: RenderableType) -> None:
    """Print to standard output; a pipe gets lines wide enough for a table."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    console.print(renderable)


def _facts() -> Table:
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="cyan", no_wrap=True)
    table.add_column()
    return table


def _kept(kept: dict[str, str]) -> list[RenderableType]:
    """Layers left in BF16, those with the same reason on one line."""
    by_reason: dict[str, list[str]] = {}
    for layer, reason in kept.items():
        by_reason.setdefault(reason, []).append(layer)
    lines: list[RenderableType] = []
    for reason, layers in by_reason.items():
        names = layers[0] if len(layers) == 1 else f"{layers[0]} and {len(layers) - 1} more"
        lines.append(Text(f"left in BF16: {names}: {reason}", style="yellow"))
    return lines


def _notes(notes: list[str]) -> list[RenderableType]:
    return [Text(f"note: {note}", style="yellow") for note in notes]
