"""Draw docs/accuracy.svg from the comparison records: the distance of every tool to the original, model by model.

Usage: python tools/plot.py. Needs matplotlib (pip install matplotlib); tools/render.py makes the tables without it.
"""

import matplotlib as mpl

mpl.use("svg")
import matplotlib.pyplot as plt
from render import ROOT, best_peer, candidates, comparison, mean, over_seeds

OURS, PEER, TUNED = "#0b7285", "#adb5bd", "#d9a441"


def draw() -> None:
    """One panel a model, one bar a tool, a whisker over the calibration seeds, and the best gradient-free peer as a line."""
    mpl.rcParams.update({"svg.hashsalt": "duotone", "font.size": 9, "svg.fonttype": "none"})
    models = comparison()
    figure, panels = plt.subplots(1, len(models), figsize=(3.1 * len(models), 3.4), layout="constrained")
    for panel, (model, rows) in zip(panels, models.items(), strict=True):
        bars = [(tool, method, over_seeds(found, "contract"), found) for (tool, method), found in candidates(rows).items()]
        bars = [bar for bar in bars if bar[2] and bar[:2] not in {("duotone", "rtn"), ("duotone", "gptq")}]
        bars.sort(key=lambda bar: -mean(bar[2]))
        for y, (tool, _, values, found) in enumerate(bars):
            color = OURS if tool == "duotone" else TUNED if found[0].get("gradient") else PEER
            low, high = mean(values) - min(values), max(values) - mean(values)
            panel.barh(y, mean(values), color=color, xerr=[[low], [high]], error_kw={"elinewidth": 1, "ecolor": "#495057"})
        bar = best_peer(rows, gradient=False)
        if bar:
            panel.axvline(0.6 * bar[1], color=OURS, linewidth=1, linestyle=":")
        whole = max(found[0]["quantized_macs_share"] for *_, found in bars)
        labels = [
            f"{tool}\n{method}"
            + ("" if (share := found[0]["quantized_macs_share"]) > 0.9 * whole else f"\n(only {share:.0%} in INT4)")
            for tool, method, _, found in bars
        ]
        panel.set_yticks(range(len(bars)), labels, fontsize=7)
        panel.set_title(model)
        panel.set_xlabel("embedding error" if not over_kl(rows) else "KL, nats a token")
        panel.spines[["top", "right"]].set_visible(False)
    figure.suptitle("Distance to the original in W4A8 arithmetic, less is better (dotted: 0.6 of the best gradient-free peer)")
    figure.savefig(ROOT / "docs" / "accuracy.svg", metadata={"Date": None})


def over_kl(rows: list[dict]) -> bool:
    """Is this model judged by its KL?"""
    return any(row["kl"] is not None for row in rows)


if __name__ == "__main__":
    draw()
