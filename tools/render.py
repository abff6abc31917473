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
    recipes = dict.fromkeys(recipe for recipe, _, _ in newest)
    columns = [(target, order) for target in ("hopper", "gaudi") for order in ("gar", "act")]
    head = ("recipe", *(f"{target}, {order}" for target, order in columns))
    return markdown(
        head, [(recipe, *(f"{newest[recipe, order, target]:.5f}" for target, order in columns)) for recipe in recipes]
    )


TABLES: dict[str, Callable[[], str]] = {
    "demo": demo_table,
    "accuracy": accuracy_table,
    "layer-error": layer_error_table,
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
