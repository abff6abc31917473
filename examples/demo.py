"""The demo: the bundled model, quantized with three methods, measured against the original, and heard.

Writes build/demo/summary.json and leaves the checkpoints in build/demo. Run by `make demo`.
"""

import json
import os
import shutil
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

import duotone
from duotone.runtime.generate import generate

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "assets" / "duotone-10m"
BUILD = ROOT / "build" / "demo"
METHODS = ("rtn", "gptq", "dpq")
PROMPT = "To install the package, "


def main(build: Path = BUILD, samples: int = 96) -> None:
    """Quantize, evaluate, print one table, a sample of each model and the path of the checkpoint.

    samples: windows of 256 tokens to calibrate on, and as many to judge on.
    """
    console = Console()
    shutil.rmtree(build, ignore_errors=True)
    build.mkdir(parents=True)
    text = (str(MODEL / "evaluation.txt"),)
    measured = {}
    original_bytes, original_perplexity = 0, 0.0
    for method in METHODS:
        out = build / f"duotone-10m-{method}"
        with console.status(f"{method}: quantizing"):
            start = time.perf_counter()
            report = duotone.quantize(MODEL, out, method=method, samples=samples, seq_len=256)
            seconds = time.perf_counter() - start
        with console.status(f"{method}: measuring on held-out text"):
            result = duotone.evaluate(out, text, reference=MODEL, seq_len=256, samples=samples)
        original_bytes, original_perplexity = report.original_bytes, result.reference_perplexity
        measured[method] = {
            "perplexity": result.perplexity,
            "kl": result.kl,
            "kl_stderr": result.kl_stderr,
            "top1_agreement": result.top1_agreement,
            "bits_per_weight": report.bits_per_weight,
            "bytes": report.weight_bytes,
            "seconds": seconds,
        }
    checkpoint = build / f"duotone-10m-{METHODS[-1]}"
    summary = {
        "original": {"perplexity": original_perplexity, "bytes": original_bytes},
        "methods": measured,
        "checkpoint": os.path.relpath(checkpoint, ROOT),
    }
    (build / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    console.print(_table(summary))
    for name, folder in (("original", MODEL), (METHODS[-1], checkpoint)):
        console.print(f"\n[bold]{name}[/bold]: {PROMPT}", end="")
        console.print(generate(folder, PROMPT, max_new_tokens=48).text, markup=False, highlight=False)
    console.print(
        f"\ncheckpoint: {summary['checkpoint']}\nsummary:    {os.path.relpath(build / 'summary.json', ROOT)}", soft_wrap=True
    )


def _table(summary: dict) -> Table:
    """The summary as a person reads it."""
    table = Table(title="duotone-10m as W4A8, on held-out text", title_justify="left")
    for column in ("model", "weights", "bits", "perplexity", "KL to original", "top-1", "time"):
        table.add_column(column, justify="left" if column == "model" else "right", no_wrap=True)
    original = summary["original"]
    table.add_row("original", f"{original['bytes'] / 1e6:.1f} MB", "16", f"{original['perplexity']:.3f}", "0", "100 %", "")
    for method, row in summary["methods"].items():
        table.add_row(
            method,
            f"{row['bytes'] / 1e6:.1f} MB",
            f"{row['bits_per_weight']:.3f}",
            f"{row['perplexity']:.3f}",
            f"{row['kl']:.5f}±{row['kl_stderr']:.5f}",
            f"{100 * row['top1_agreement']:.2f} %",
            f"{row['seconds']:.3g} s",
        )
    return table


if __name__ == "__main__":
    main()
