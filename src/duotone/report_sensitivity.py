"""Sensitivities and goals as a person reads them."""

from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

from duotone.report import megabytes


def sensitivity_summary(found: dict[str, Any]) -> RenderableType:
    """What `duotone sensitivity` measured: the dearest units first, then the curve."""
    units = Table(title=f"KL {found['kl']:.5f} with all in 4 bits", title_justify="left", box=None, padding=(0, 2, 0, 0))
    for name, side in (
        ("linears", "left"), ("alone in 4 bits", "right"), ("gain of FP8", "right"), ("for", "right"),
        ("gain of BF16", "right"), ("for", "right"),
    ):  # fmt: skip
        units.add_column(name, justify=side)  # pyright: ignore[reportArgumentType]
    for unit in sorted(found["units"], key=lambda unit: unit["kept"]["bf16"]):
        first, *others = unit["layers"]
        more = f" and {len(others)} more" if others else ""
        cells = [first + more, f"{unit['alone']:.5f}"]
        for precision in ("w8a8", "bf16"):
            cells += [f"{found['kl'] - unit['kept'][precision]:+.5f}"]
            cells += [f"+{megabytes(unit['nbytes'][precision] - unit['nbytes']['w4a8'])}"]
        units.add_row(*cells)
    points = Table(title="the best choices", title_justify="left", box=None, padding=(0, 2, 0, 0))
    for name in ("bits per weight", "all tensors", "KL to expect"):
        points.add_column(name, justify="right")
    for point in found["curve"]:
        points.add_row(f"{point['bits']:.3f}", megabytes(point["nbytes"]), f"{point['kl']:.5f}")
    return Group(units, "", points)


def reached_summary(reached: dict[str, Any]) -> RenderableType:
    """What came of --max-bytes or --target-kl."""
    from duotone.report import quantize_summary

    choice = reached["choice"]
    counts = {name: choice["precisions"].count(name) for name in ("w4a8", "w8a8", "bf16")}
    chosen = ", ".join(f"{count} in {name}" for name, count in counts.items() if count)
    measured = reached["measured"]
    return Group(
        quantize_summary(reached["report"]),
        f"chosen: of {len(choice['precisions'])} groups of linears {chosen}; {megabytes(choice['nbytes'])} of tensors",
        f"KL to the original: {measured['kl']:.5f} ± {measured['kl_stderr'] or 0:.5f} measured, {choice['kl']:.5f} expected",
    )
