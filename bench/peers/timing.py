"""How long quantizing takes, ours and the peers' in turn, round after round, on a machine that should do nothing else.

    python bench/peers/timing.py MODEL --calibration TEXT... [--rounds 3] [--peers llmcompressor:gptq gptqmodel:gptq-gar]

Appends a row for each run to bench/records/quantize_time.jsonl: wall seconds as the tool tells them from the loaded model
to the written checkpoint (ours also reads the model in them), and the load of the machine before it began.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from compare import HERE, PEERS, run_peer

from duotone.bench import AccuracyBench, append_records, provenance, quantize_time_row
from duotone.calibrate.data import TokenWindows, draw_windows
from duotone.checkpoint.hub import locate_model
from duotone.errors import DuotoneError
from duotone.models.tokenizer import load_tokenizer

RECORDS = HERE.parent / "records" / "quantize_time.jsonl"


def main() -> None:
    """Every tool once a round."""
    arguments = _arguments()
    bench = AccuracyBench(
        arguments.model, (), tuple(arguments.calibration), group_size=arguments.group_size, samples=arguments.samples,
        seq_len=arguments.seq_len,
    )  # fmt: skip
    tokens = draw_windows(
        load_tokenizer(locate_model(bench.model)), bench.calibration, bench.seq_len, bench.samples, bench.seed
    )
    for number in range(arguments.rounds):
        for name in ("duotone:dpq", *arguments.peers):
            row = quantize_time_row(bench, number) if name == "duotone:dpq" else _theirs(bench, name, number, tokens)
            append_records(arguments.records, [row])
            print(f"{row['model']} round {number} {row['tool']}: {row['refused'] or row['seconds']}", flush=True)


def _theirs(bench: AccuracyBench, name: str, number: int, tokens: TokenWindows) -> dict[str, Any]:
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as scratch:
        facts = run_peer(bench, name, tokens, Path(scratch) / "out")
    seconds, phases = facts["seconds"], facts["phases"]
    if phases:  # what is left is its forward, and all that goes with it
        phases = {"forward": round(seconds - sum(phases.values()), 3)} | phases
    return provenance(bench.seed) | {
        "model": Path(bench.model).name, "tool": PEERS[name][0], "method": name.partition(":")[2],
        "group_size": bench.group_size, "round": number, "tokens": tokens.tokens.numel(), "load_before": load,
        "seconds": seconds, "phases": phases, "floors": None, "peak_bytes": facts["peak_bytes"], "refused": facts["refused"],
    }  # fmt: skip


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--calibration", nargs="+", required=True)
    parser.add_argument("--peers", nargs="*", default=["llmcompressor:gptq", "gptqmodel:gptq-gar"], choices=list(PEERS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--records", type=Path, default=RECORDS)
    return parser.parse_args()


if __name__ == "__main__":
    try:
        main()
    except DuotoneError as error:
        sys.exit(f"timing.py: {error}")
