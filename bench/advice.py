"""What a calibration text is worth: facts of `duotone advise`, beside the KL on other text of what it quantizes to.

Usage: python bench/advice.py MODEL --text TEXT... --calibration MIXTURE... --samples N... Each mixture, with each number of
windows, is a row of bench/records/advice.jsonl; the original reads at most 32 windows of a text, the KL is of `--windows`.
"""

import argparse
import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import duotone
from duotone.advising import advise
from duotone.bench import append_records, provenance
from duotone.calibrate.sources import titles
from duotone.settings import QuantizeConfig

RECORDS = Path(__file__).resolve().parent / "records" / "advice.jsonl"


def main() -> None:
    """A row for every mixture and number of windows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", nargs="+", required=True)
    parser.add_argument("--calibration", nargs="+", required=True)
    parser.add_argument("--samples", type=int, nargs="+", default=[128])
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--windows", type=int, default=128)
    arguments = parser.parse_args()
    for mixture in arguments.calibration:
        for samples in arguments.samples:
            row = measured(arguments, mixture, samples)
            append_records(RECORDS, [row])
            print(json.dumps(row))


def measured(arguments: argparse.Namespace, mixture: str, samples: int) -> dict[str, Any]:
    """A row."""
    config = QuantizeConfig(calibration=(mixture,), samples=samples, seq_len=arguments.seq_len, device="cpu")
    facts = asdict(advise(arguments.model, config, arguments.text))
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "out"
        report = duotone.quantize(
            arguments.model, out, calibration=(mixture,), samples=samples, seq_len=arguments.seq_len, device="cpu"
        ).to_json()
        found = duotone.evaluate(
            out, arguments.text, reference=arguments.model, seq_len=arguments.seq_len, samples=arguments.windows, device="cpu"
        )
    names = ("widest", "inputs", "tokens_an_input", "perplexity_ratio", "divergence", "overlap")
    return provenance(0) | {
        "model": arguments.model.name,
        "calibration": report["calibration"],
        "text": titles(arguments.text),
        **{name: facts[name] for name in names},
        "sources": facts["calibration"],
        "tokens": found.tokens,
        "kl": found.kl,
        "kl_stderr": found.kl_stderr,
        "perplexity": found.perplexity,
        "reference_perplexity": found.reference_perplexity,
    }


if __name__ == "__main__":
    main()
