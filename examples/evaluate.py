"""Measure what quantizing does to a model: perplexity, and the distance to the original in the arithmetic that will run.

Run: python examples/evaluate.py
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import duotone

MODEL = Path(__file__).resolve().parents[1] / "assets" / "duotone-10m"


def main(methods: Sequence[str] = ("rtn", "gptq", "dpq"), samples: int = 32) -> None:
    """The same held-out windows for every method; KL in nats a token, with its standard error."""
    text = [str(MODEL / "evaluation.txt")]
    for method in methods:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / method
            duotone.quantize(MODEL, folder, method=method, samples=samples, seq_len=256)
            found = duotone.evaluate(folder, text, reference=MODEL, seq_len=256, samples=samples)
        print(f"{method:10s} perplexity {found.perplexity:.3f} (original {found.reference_perplexity:.3f})", end="  ")
        print(f"KL {found.kl:.5f} ± {found.kl_stderr:.5f}  same likeliest token {100 * (found.top1_agreement or 0):.1f} %")


if __name__ == "__main__":
    main()
