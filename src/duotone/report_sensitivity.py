"""Sensitivities and goals as a person reads them."""

from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

from duotone.report import megabytes


def sensitivity_summary(found: dict[str, Any]) -> RenderableType:
    """What `duotone sensitivity` measured: the dearest units first, then the curve."""
    units = Table(title=f"KL {found['kl']:.5f} with all in 4 bits", title_justify="left", box=None, padding=(0, 2, 0, 0))
    for name in ("linears", "alone in 4 bits", "alone in FP8", "", "all others in 4 bits", ""):
        units.add_column(name, justify="left" if name == "linears" else "right")
    for unit in sorted(found["units"], key=lambda unit: -unit["alone"]["w4a8"]):
        first, *others = unit["layers"]
        more = f" and {len(others)} more" if others else ""
        dearer = {name: f"+{megabytes(unit['nbytes'][name] - unit['nbytes']['w4a8'])}" for name in ("w8a8", "bf16")}
        costs = [f"{unit['alone']['w4a8']:.5f}", f"{unit['alone']['w8a8']:.5f}", dearer["w8a8"]]
        units.add_row(first + more, *costs, f"{unit['kept']:.5f}", dearer["bf16"])
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
