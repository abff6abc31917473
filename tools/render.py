"""Write the tables of README.md and docs from the committed records: no number there is typed by hand.

Usage: python tools/render.py [--check]. Between `<!-- table: NAME -->` and `<!-- end -->` stands what a function here makes.
"""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RECORDS = ROOT / "bench" / "records"
PAGES = ("README.md", "docs/accuracy.md")
_BLOCK = re.compile(r"(<!-- table: (?P<name>[\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def records(name: str) -> list[dict[str, Any]]:
    """Rows of one records file."""
    return [json.loads(line) for line in (RECORDS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def latest_accuracy() -> list[dict[str, Any]]:
    """The newest accuracy row of each model, text, target and method."""
    rows = {
        (row["model"], *row["text"], row["target"], row["method"], *row["calibration_text"]): row
        for row in ({**row, "calibration_text": (row["calibration"] or {}).get("text", [])} for row in records("accuracy"))
    }
    return list(rows.values())


def demo_table() -> str:
    """The bundled model, `hopper`, by method."""
    rows = [row for row in latest_accuracy() if row["model"] == "duotone-10m" and row["target"] == "hopper"]
    lines = ["| weights | bits per weight | perplexity | KL to the original (nats a token) | top-1 agreement |", "|---|---|---|---|---|"]
    lines.append(f"| BF16, the original | 16 | {rows[0]['reference_perplexity']:.3f} | 0 | 100 % |")
    for row in rows:
        lines.append(
            f"| {row['method']} | {row['bits_per_weight']:.3f} | {row['perplexity']:.3f} | {row['kl']:.5f} ± {row['kl_stderr']:.5f} "
            f"| {100 * row['top1_agreement']:.2f} % |"
        )
    return "\n".join(lines) + "\n"


def accuracy_table() -> str:
    """Every accuracy record's newest row."""
    lines = [
        "| model | judged on | calibrated on | target | method | KL | above the activations' floor | perplexity (original) | top-1 | seconds | peak memory |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(latest_accuracy(), key=lambda row: (row["model"], row["text"], row["target"] != "hopper")):
        lines.append(
            f"| {row['model']} | {', '.join(row['text'])} | {', '.join(row['calibration_text']) or 'none'} | {row['target']} "
            f"| {row['method']} | {row['kl']:.5f} ± {row['kl_stderr']:.5f} | {row['kl'] - row['kl_activation_floor']:.5f} "
            f"| {row['perplexity']:.3f} ({row['reference_perplexity']:.3f}) | {100 * row['top1_agreement']:.2f} % "
            f"| {row['quantize_seconds']:.1f} | {row['peak_bytes'] / 1e6:.0f} MB |"
        )
    return "\n".join(lines) + "\n"


TABLES: dict[str, Callable[[], str]] = {"demo": demo_table, "accuracy": accuracy_table}


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
