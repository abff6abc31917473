"""Draw docs/two-precisions.svg: one row of a weight, stored as INT4 and multiplied in FP8, in the contract's own numbers.

Usage: python tools/picture.py [--check]. Colors follow the reader's system, light or dark.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from duotone.contract import quantize_activations
from duotone.qweight import QuantizedWeight, fp8_values
from duotone.scheme import HOPPER, Scheme
from duotone.solver.scales import fit_scales, round_to_nearest

PICTURE = Path(__file__).resolve().parents[1] / "docs" / "two-precisions.svg"
#: Of the drawing: columns, a group's share of them, pixels of a cell and of the margins.
COLUMNS, GROUP, CELL, LEFT, TOP = 16, 8, 44, 118, 52
STYLE = """
  .panel { fill: #ffffff; stroke: #d0d7de } text { fill: #1f2328; font: 13px system-ui, sans-serif }
  .small { font-size: 11.5px; fill: #59636e } .cell { font-size: 11.5px; text-anchor: middle } .head { font-weight: 600 }
  .bf16 { fill: #eaeef2 } .int4 { fill: #99e9f2 } .fp8 { fill: #ffd8a8 } .moved { stroke: #d9480f; stroke-width: 2 }
  .line { stroke: #8c959f; fill: none } rect { rx: 4px }
  @media (prefers-color-scheme: dark) {
    .panel { fill: #15191f; stroke: #3d444d } text { fill: #e6edf3 } .small { fill: #9198a1 }
    .bf16 { fill: #2a313c } .int4 { fill: #0b7285 } .fp8 { fill: #995c13 } .moved { stroke: #ffa94d } .line { stroke: #656c76 }
  }
"""


def draw() -> str:
    """The picture as SVG text."""
    generator = torch.Generator().manual_seed(4)
    # Rounded, since the last bits of randn are another CPU's to choose.
    w_NK, x_MK = ((torch.randn(1, COLUMNS, generator=generator) * size).round(decimals=3) for size in (0.06, 1.0))
    w_NK[:, GROUP:] *= 0.4  # so that the groups have scales to tell apart
    w_NK = w_NK.bfloat16().float()
    scheme = Scheme(HOPPER, GROUP)
    scales = fit_scales(w_NK, scheme)
    weight = QuantizedWeight(round_to_nearest(w_NK, scales, scheme), scales.group_scale, scales.outer_scale, scheme)
    levels = torch.tensor(scheme.levels)[weight.codes.long()][0]
    products, values = levels * weight.group_scale[0].repeat_interleave(GROUP), fp8_values(weight)[0]
    x8_MK, input_scale = quantize_activations(x_MK, HOPPER)
    total = float((x8_MK[0] * values).sum())
    y = float(torch.tensor(total * float(weight.outer_scale) * float(input_scale)).bfloat16())
    exact = float((x_MK * w_NK).sum())
    groups = [f"{float(scale):g}" for scale in weight.group_scale[0]]
    moved = [bool(a != b) for a, b in zip(products, values, strict=True)]
    rows = [
        _row(0, "weights, BF16", "16 bits", "bf16", [f"{value:.3f}" for value in w_NK[0]]),
        _row(1, "codes, INT4", "4 bits: stored", "int4", [f"{int(value)}" for value in levels]),
        _row(2, "FP8", "8 bits: multiplied", "fp8", [f"{value:g}" for value in values], moved),
        _row(3, "inputs, FP8", "8 bits: multiplied", "fp8", [f"{value:g}" for value in x8_MK[0]]),
    ]
    notes = [
        _between(0, f"rounded to 16 levels, one scale a group: {' and '.join(groups)} (E4M3), times one for the row: "
                    f"{float(weight.outer_scale):.3g} (FP32)"),
        _between(1, f"FP8(code x group scale): framed where the product is no FP8 number, such as {_moved(products, values)}"),
        _between(2, "times, and summed in float32"),
        _between(3, f"sum {total:.0f} x {float(weight.outer_scale):.3g} x {float(input_scale):.3g} (the token's own scale) "
                    f"= {y:.4g} in BF16; in full precision {exact:.4g}"),
    ]  # fmt: skip
    width, height = LEFT + COLUMNS * CELL + 24, TOP + 4 * 88 + 8
    middle = LEFT + GROUP * CELL - 1.5
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" aria-labelledby="what">',
            '<title id="what">A row of a weight: stored as 4-bit codes, multiplied as FP8 values</title>',
            f"<style>{STYLE}</style>",
            f'<rect class="panel" x="0.5" y="0.5" width="{width - 1}" height="{height - 1}"/>',
            '<text class="head" x="16" y="28">One row of a weight, two groups: two precisions</text>',
            *(f'<path class="line" stroke-dasharray="3 3" d="M{middle} {TOP + 88 * row - 5}v46"/>' for row in range(4)),
            *rows,
            *notes,
            "</svg>\n",
        ]
    )


def _row(number: int, name: str, bits: str, kind: str, cells: Sequence[str], framed: Sequence[bool] = ()) -> str:
    y = TOP + 88 * number
    parts = [f'<text x="16" y="{y + 16}">{name}</text><text class="small" x="16" y="{y + 32}">{bits}</text>']
    for column, text in enumerate(cells):
        x = LEFT + column * CELL
        classes = f"{kind} moved" if framed and framed[column] else kind
        parts.append(f'<rect class="{classes}" x="{x}" y="{y}" width="{CELL - 3}" height="36"/>')
        parts.append(f'<text class="cell" x="{x + CELL / 2 - 1.5}" y="{y + 22}">{text}</text>')
    return "".join(parts)


def _between(number: int, text: str) -> str:
    y = TOP + 88 * number + 66
    arrow = f'<path class="line" d="M{LEFT + 8} {y - 18}v20m-4 -5l4 5l4 -5"/>'
    return f'{arrow}<text class="small" x="{LEFT + 24}" y="{y}">{text}</text>'


def _moved(products: torch.Tensor, values: torch.Tensor) -> str:
    """The first product that FP8 rounds, and to what."""
    column = int((products != values).nonzero()[0])
    return f"{float(products[column]):g}, which becomes {float(values[column]):g}"


if __name__ == "__main__":
    if "--check" in sys.argv:
        sys.exit("docs/two-precisions.svg is not what tools/picture.py draws" if PICTURE.read_text() != draw() else 0)
    PICTURE.write_text(draw(), encoding="utf-8")
