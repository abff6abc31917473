"""Quantize a model from Python: the bundled one, by default into build/examples/quantize.

Run: python examples/quantize.py
"""

from pathlib import Path

import duotone
from duotone.runtime.generate import generate

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "assets" / "duotone-10m"


def main(out: Path = ROOT / "build" / "examples" / "quantize", method: str = "dpq", samples: int = 32) -> None:
    """samples: windows of 256 tokens of the model's own calibration text; a model of yours wants calibration=("text.txt",)."""
    try:
        report = duotone.quantize(MODEL, out, method=method, samples=samples, seq_len=256)
    except duotone.DuotoneError as error:  # such as: the folder holds something already
        raise SystemExit(str(error)) from None
    before, after, seconds = report.original_bytes / 1e6, report.weight_bytes / 1e6, sum(report.seconds.values())
    print(f"{before:.1f} MB became {after:.1f} MB in {seconds:.1f} s")
    print(f"{report.bits_per_weight:.3f} bits a weight in {len(report.layers)} linears")
    for layer, reason in report.kept.items():
        print(f"left in BF16: {layer}: {reason}")
    worst = max(report.layers, key=lambda layer: layer.output_error or layer.weight_error)
    print(f"hardest: {worst.layer}, weights off by {100 * worst.weight_error**0.5:.1f} %")
    print(generate(out, "To install the package, ", max_new_tokens=16).text)


if __name__ == "__main__":
    main()
