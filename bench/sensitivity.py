"""Precisions chosen from measured sensitivities, beside lists that one would pick by hand, at the same bytes.

    python bench/sensitivity.py MODEL --calibration TEXT... --text TEXT... [--records FILE]

A list by hand leaves some linears in BF16 and is quantized as it is; then `quantize --max-bytes` gets as many bytes. Sensitivities
are measured on the calibration text, all are judged on the other. Appends a row for each to bench/records/sensitivity.jsonl.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import duotone
from duotone.bench import append_records, provenance
from duotone.checkpoint.source import open_source
from duotone.evaluation import evaluate
from duotone.goals import Goal, choose
from duotone.sensitivity import measure_sensitivity
from duotone.settings import QuantizeConfig

#: What guides and default recipes of other tools leave alone, by `re:` patterns with the number of the last block.
BY_HAND = {
    "4 bits everywhere": (),
    "first and last down_proj in BF16": (r"re:.*layers\.(0|{last})\.mlp\.down_proj",),
    "every down_proj in BF16": (r"re:.*\.down_proj",),
    "first and last block in BF16": (r"re:.*layers\.(0|{last})\.",),
}


def main() -> None:
    """Measure once, then quantize and judge each list and the choice of its bytes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", nargs="+", required=True)
    parser.add_argument("--text", nargs="+", required=True)
    parser.add_argument("--records", type=Path, default=Path(__file__).parent / "records" / "sensitivity.jsonl")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--eval-samples", type=int, default=64)
    asked = parser.parse_args()
    settings: dict[str, Any] = {"calibration": tuple(asked.calibration), "samples": asked.samples, "seq_len": asked.seq_len}
    settings |= {"device": "cpu"}
    start = time.perf_counter()
    found = measure_sensitivity(asked.model, QuantizeConfig(**settings), seq_len=asked.seq_len, samples=32)
    spent = time.perf_counter() - start
    last = json.loads((asked.model / "config.json").read_text())["num_hidden_layers"] - 1

    def judge(**options: Any) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as scratch:
            out = Path(scratch) / "out"
            duotone.quantize(asked.model, out, **settings, **options)
            figures = evaluate(
                out, asked.text, reference=asked.model, seq_len=asked.seq_len, samples=asked.eval_samples, device="cpu"
            )
            nbytes = sum(spec.nbytes for spec in open_source(out).tensors.values())
        return {"nbytes": nbytes, "kl": figures.kl, "kl_stderr": figures.kl_stderr}

    for name, patterns in BY_HAND.items():
        by_hand = judge(ignore=tuple(pattern.replace("{last}", str(last)) for pattern in patterns))
        row = provenance(0) | {"model": asked.model.name, "by_hand": name, "seconds_to_measure": round(spent, 1)} | by_hand
        if patterns:
            choice = choose(found, Goal(max_bytes=by_hand["nbytes"]))
            chosen = judge(rules=choice.rules(found))
            counts = {precision: choice.precisions.count(precision) for precision in ("w4a8", "w8a8", "bf16")}
            row |= {f"chosen_{key}": value for key, value in chosen.items()} | {"precisions": counts, "expected_kl": choice.kl}
        append_records(asked.records, [row])
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
