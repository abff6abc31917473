"""What the bench commands have measured, as tables."""

from statistics import median
from typing import Any

from rich.console import RenderableType
from rich.table import Table

from duotone.report import megabytes


def accuracy_table(rows: list[dict[str, Any]]) -> RenderableType:
    """Accuracy records side by side."""
    table = Table(header_style="bold", box=None, pad_edge=False)
    columns = ("model", "target", "method", "bits", "perplexity", "KL", "above floor", "top-1", "seconds", "peak")
    for column in columns:
        table.add_column(column, justify="left" if column in {"model", "target", "method"} else "right")
    for row in rows:
        table.add_row(
            row["model"],
            row["target"],
            row["method"],
            f"{row['bits_per_weight']:.3f}",
            f"{row['perplexity']:.3f}",
            f"{row['kl']:.5f} ± {row['kl_stderr']:.5f}",
            f"{row['kl'] - row['kl_activation_floor']:.5f}",
            f"{100 * row['top1_agreement']:.2f} %",
            f"{row['quantize_seconds']:.1f}",
            megabytes(row["peak_bytes"]),
        )
    return table


def speed_table(rows: list[dict[str, Any]]) -> RenderableType:
    """Milliseconds of each candidate, its share of what memory gives and of the arithmetic peak, and ours as a multiple."""
    table = Table("shape", "tokens", "kernel", "ms", "GB/s", "of memory's", "GFLOP/s", "of the peak", "ours is", box=None)
    for row in rows:
        ours = next((other for other in rows if other["kernel"].startswith("duotone") and _same_call(other, row)), row)
        table.add_row(
            "x".join(map(str, row["shape"])),
            str(row["tokens"]),
            row["kernel"],
            f"{row['ms']:.{4 if row['ms'] < 1 else 2}f}",
            f"{row['gbytes_per_second']:.1f}",
            f"{100 * row['roofline_share']:.0f} %",
            f"{row['gflops']:.0f}",
            f"{100 * row['gflops'] / row['peak_gflops']:.0f} %",
            "" if row["kernel"] == ours["kernel"] else f"{ours['times_as_fast_as'][row['kernel']]:.1f} times as fast",
        )
    return table


def phases_table(rows: list[dict[str, Any]]) -> RenderableType:
    """Median seconds of each phase beside the least that its arithmetic takes here."""
    table = Table("phase", "seconds", "at least", "times that", box=None)

    def add(name: str, spent: list[float], least: list[float]) -> None:
        middle, floor = median(spent), median(least)
        table.add_row(name, f"{middle:.2f}", f"{floor:.2f}" if floor else "", f"{middle / floor:.1f}" if floor else "")

    for phase in rows[0]["phases"]:
        add(phase, [row["phases"][phase] for row in rows], [row["floors"].get(phase, 0.0) for row in rows])
    add("in all", [row["seconds"] for row in rows], [sum(row["floors"].values()) for row in rows])
    return table


def generate_table(rows: list[dict[str, Any]]) -> RenderableType:
    """Tokens a second of each runtime, and ours as a multiple."""
    table = Table("runtime", "prompt, tokens/s", "writing, tokens/s", "weights", "ours reads", "ours writes", box=None)
    for row in rows:
        ratio = row["ours_times_as_fast"]
        own = row["runtime"] == "duotone"
        table.add_row(
            row["runtime"],
            f"{row['prefill_tokens_per_second']:.1f}",
            f"{row['decode_tokens_per_second']:.1f}",
            f"{row['weight_bytes'] / 1e9:.2f} GB" if row["weight_bytes"] else "",
            "" if own else f"{ratio['prefill']:.2f} times as fast",
            "" if own else f"{ratio['decode']:.2f} times as fast",
        )
    return table


def _same_call(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(one.get(fact) == other.get(fact) for fact in ("part", "shape", "tokens"))
