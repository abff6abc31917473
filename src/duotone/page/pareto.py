"""Bits against KL as one SVG picture: each checkpoint a dot with its error bar, and the front that none of them beats."""

import math
from collections.abc import Sequence
from html import escape

from duotone.comparing import Contender
from duotone.page.view import number

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 760, 440, 84, 36, 48, 56
_STYLE = """svg{background:#fff;font-family:system-ui,sans-serif;font-size:13px}text{fill:#191a2b}.soft{fill:#5c5d74}
.grid{stroke:#e4e2ea}.front{stroke:#4545d6;fill:none;stroke-width:2;stroke-dasharray:5 5}.bar{stroke:#8a8ba3;stroke-width:1.5}
.dot{fill:#e4572e}.best{fill:#4545d6}
@media(prefers-color-scheme:dark){svg{background:#191b29}text{fill:#eceaf6}.soft{fill:#a5a7c2}.grid{stroke:#2c3047}
.front{stroke:#8c8dff}.dot{fill:#ff8f66}.best{fill:#8c8dff}}"""


def curve_svg(points: Sequence[tuple[float, float]], stderr: float) -> str:
    """Bits and KL of the best choices as the same picture; only the ends are named."""
    names = ["all in 4 bits", *[""] * (len(points) - 2), "all in FP8"][: len(points)]
    return pareto_svg(
        [
            Contender(name, "", "", False, 0, bits, {"kl": kl, "kl_stderr": stderr}, [], on_front=True)
            for name, (bits, kl) in zip(names, points, strict=True)
        ]
    )


def pareto_svg(found: Sequence[Contender]) -> str:
    """The picture's text. KL is logarithmic; one of 0 (the original itself) stands on the lower edge."""
    known = [one.figures["kl"] for one in found if one.figures["kl"] > 0] or [1e-3]
    low, high = math.log10(min(known)) - 0.25, math.log10(max(known)) + 0.25
    bits = [one.bits for one in found]
    margin = 0.12 * (max(bits) - min(bits)) or 0.5
    first, last = min(bits) - margin, max(bits) + margin

    def x(value: float) -> float:
        return _LEFT + (value - first) / (last - first) * (_WIDTH - _LEFT - _RIGHT)

    def y(kl: float) -> float:
        level = min(max(math.log10(kl) if kl > 0 else low, low), high)
        return _HEIGHT - _BOTTOM - (level - low) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)

    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img"><style>{_STYLE}</style>']
    parts += [f'<text x="{_LEFT}" y="26" font-weight="650">KL to the original, nats a token, against bits a weight</text>']
    for step in range(5):
        kl, value = 10 ** (low + (high - low) * step / 4), first + (last - first) * step / 4
        parts += [f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(kl):.1f}" y2="{y(kl):.1f}"/>']
        parts += [f'<text class="soft" x="{_LEFT - 10}" y="{y(kl) + 4:.1f}" text-anchor="end">{number(kl, 2)}</text>']
        parts += [f'<text class="soft" x="{x(value):.1f}" y="{_HEIGHT - 28}" text-anchor="middle">{value:.2f}</text>']
    front = sorted((one for one in found if one.on_front), key=lambda one: one.bits)
    points = " ".join(f"{x(one.bits):.1f},{y(one.figures['kl']):.1f}" for one in front)
    parts += [f'<polyline class="front" points="{points}"/>']
    for i, one in enumerate(found):
        kl, error = one.figures["kl"], 1.96 * (one.figures["kl_stderr"] or 0.0)
        at, top, bottom = x(one.bits), y(kl + error), y(max(kl - error, 0.0))
        words = f"{one.name}: {one.bits:.3f} bits, KL {number(kl)}"
        side = ("end", -10) if at > 0.7 * _WIDTH else ("start", 10)
        parts += [f"<g><title>{escape(words)}</title>"]
        parts += [f'<line class="bar" x1="{at:.1f}" x2="{at:.1f}" y1="{top:.1f}" y2="{bottom:.1f}"/>']
        parts += [f'<circle class="{"best" if one.on_front else "dot"}" cx="{at:.1f}" cy="{y(kl):.1f}" r="6"/>']
        place = f'x="{at + side[1]:.1f}" y="{y(kl) + (19 if i % 2 else -9):.1f}" text-anchor="{side[0]}"'
        parts += [f"<text {place}>{escape(one.name)}</text></g>"]
    return "\n".join([*parts, "</svg>", ""])
