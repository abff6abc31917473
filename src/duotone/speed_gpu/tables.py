"""What `duotone bench gpu` has measured, as tables; tools/render.py writes the same cells into the docs."""

from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

from duotone.report_bench import speed_table
from duotone.speed_gpu.budget import Row
from duotone.speed_gpu.goals import Verdict, judge
from duotone.speed_gpu.tiles import WRITTEN

Cells = tuple[str, ...]
GOALS_HEAD: Cells = ("goal", "wanted", "the worst that was measured", "")
STEPS_HEAD: Cells = ("model", "step", "linears", "ms", "tokens/s", "GB/s", "of memory's", "peak memory")
THROUGHPUT_HEAD: Cells = ("model", "linears", "batch", "prompt", "new", "tokens/s", "as BF16's", "cache", "largest batch")
TILES_HEAD: Cells = (
    "N x K",
    "tokens",
    "codes as ours, ms",
    "of memory",
    "fastest other way",
    "times as fast",
    "FP8 weights written",
)
QUANTIZER_HEAD: Cells = ("model", "method", "tokens", "seconds", "of the whole model", "peak memory")


def goal_cells(verdicts: list[Verdict]) -> list[Cells]:
    """A line for each goal."""
    return [
        (
            verdict.goal.title,
            f"at {'most' if verdict.goal.most else 'least'} {verdict.goal.shown(verdict.goal.wanted)}",
            f"{verdict.goal.shown(verdict.worst[1])} ({verdict.worst[0]})" if verdict.worst else "unmeasured",
            verdict.words,
        )
        for verdict in verdicts
    ]


def step_cells(rows: list[Row]) -> list[Cells]:
    """A line for each step of a model that was measured."""
    return [
        (
            row["model"],
            f"prompt of {row['tokens']}" if row["kind"] == "prefill" else f"a token of {row['batch']}, {row['tokens']} so far",
            row["kernel"],
            f"{row['ms']:.2f}",
            f"{row['tokens_per_second']:.0f}",
            f"{row['gbytes_per_second']:.0f}",
            f"{100 * row['gbytes_per_second'] / row['read_gbytes_per_second']:.0f} %",
            f"{row['peak_bytes'] / 1e9:.1f} GB" if row["peak_bytes"] is not None else "-",
        )
        for row in rows
        if row["kind"] in {"decode", "prefill"} and row["unmeasured"] is None
    ]


def throughput_cells(rows: list[Row]) -> list[Cells]:
    """A line for each model, form, batch, prompt and output whose throughput could be computed; what does not fit, too."""
    found = [row for row in rows if row["kind"] == "throughput"]
    place = lambda row: tuple(row[name] for name in ("model", "batch", "prompt_tokens", "new_tokens"))  # noqa: E731
    wide = {place(row): row["tokens_per_second"] for row in found if row["kernel"] == "cuBLAS BF16" and not row["unmeasured"]}
    lines: list[Cells] = []
    for row in found:
        speed = row.get("tokens_per_second")
        beside = f"{speed / wide[place(row)]:.2f} times" if speed and place(row) in wide else "-"
        lines.append(
            (
                row["model"], row["kernel"], str(row["batch"]), str(row["prompt_tokens"] + row["image_tokens"]),
                str(row["new_tokens"]), f"{speed:.0f}" if speed else "unmeasured", beside, f"{row['kv_bytes'] / 1e9:.1f} GB",
                f"{row['largest_batch']}, {row['largest_batch_fp8_cache']} with an FP8 cache",
            )
        )  # fmt: skip
    return lines


def tile_cells(rows: list[Row]) -> list[Cells]:
    """A line for each shape and number of tokens for which other ways to multiply were tried."""
    cases: dict[tuple[int, int, int], list[Row]] = {}
    for row in rows:
        if row["kind"] == "tile" and row["unmeasured"] is None:
            cases.setdefault((*row["shape"], row["tokens"]), []).append(row)
    lines: list[Cells] = []
    for (height, width, tokens), found in cases.items():
        times = {row["way"]: row["times_as_fast_as_own"] for row in found if not row["is_own"]}
        written = times.pop(WRITTEN, None)
        own = next((row for row in found if row["is_own"]), None)
        best = max(times, key=lambda way: times[way], default=None)
        lines.append(
            (
                f"{height} x {width}",
                str(tokens),
                f"{own['ms']:.4f}" if own else "unmeasured",
                f"{100 * own['roofline_share']:.0f} %" if own else "-",
                best or "-",
                f"{times[best]:.2f}" if best else "-",
                f"{written:.2f} times as fast" if written is not None else "-",
            )
        )
    return lines


def quantizer_cells(rows: list[Row]) -> list[Cells]:
    """A line for each time that the quantizer ran."""
    return [
        (
            row["model"],
            row["method"],
            str(row["tokens"]),
            f"{row['seconds']:.1f}",
            "this is it" if row["extrapolated_seconds"] is None else f"{row['extrapolated_seconds']:.0f} s, {row['how']}",
            f"{row['peak_bytes'] / 1e9:.1f} GB" if row["peak_bytes"] is not None else "-",
        )
        for row in rows
        if row["kind"] == "quantizer" and row["unmeasured"] is None
    ]


def unmeasured_reasons(rows: list[Row]) -> list[Cells]:
    """Reasons for which something was not measured, each with the parts and how many rows have it."""
    counts: dict[tuple[str, str], int] = {}
    for row in rows:
        if row["unmeasured"] is not None:
            counts[row["part"], row["unmeasured"]] = counts.get((row["part"], row["unmeasured"]), 0) + 1
    return [(part, reason, str(count)) for (part, reason), count in counts.items()]


def gpu_tables(rows: list[dict[str, Any]]) -> RenderableType:
    """Everything a run has measured, the goals last, so that they are what remains on the screen."""
    linears = [row for row in rows if row["kind"] == "linear" and row["unmeasured"] is None]
    tables: list[RenderableType] = [speed_table(linears)] if linears else []
    for head, lines in (
        (STEPS_HEAD, step_cells(rows)),
        (THROUGHPUT_HEAD, throughput_cells(rows)),
        (TILES_HEAD, tile_cells(rows)),
        (QUANTIZER_HEAD, quantizer_cells(rows)),
        (("part", "not measured, since", "rows"), unmeasured_reasons(rows)),
        (GOALS_HEAD, goal_cells(judge(rows))),
    ):
        if lines:
            tables.append(_table(head, lines))
    return Group(*tables)


def _table(head: Cells, lines: list[Cells]) -> Table:
    table = Table(*head, box=None)
    for line in lines:
        table.add_row(*line)
    return table
