"""What two processes save: one process of one thread and several of one thread each in turn, the same run to the same bytes.

    python bench/ranks.py MODEL --calibration TEXT... [--ranks 2] [--rounds 3] [--samples 32] [--seq-len 512]

Appends a row a round to bench/records/ranks.jsonl: wall seconds of the whole command, and by phase of the first process. A
machine has to have a core for each process, and little else to do.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from duotone.bench import append_records, provenance

RECORDS = Path(__file__).resolve().parent / "records" / "ranks.jsonl"


def quantized(given: argparse.Namespace, ranks: int, out: Path) -> tuple[float, dict[str, float]]:
    """Seconds of the command, and by phase; RuntimeError with what it said when it fails."""
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    command = [sys.executable, *start, "-m", "duotone", "quantize", given.model, str(out), "--json", "--device", "cpu"]
    command += ["--samples", str(given.samples), "--seq-len", str(given.seq_len)]
    for text in given.calibration:
        command += ["--calibration", text]
    begin = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise RuntimeError(done.stderr)
    return time.perf_counter() - begin, json.loads(done.stdout)["seconds"]


def measured(given: argparse.Namespace, number: int) -> dict[str, Any]:
    """A round: alone, then together."""
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as scratch:
        outs = [Path(scratch) / name for name in ("alone", "together")]
        (alone, phases), (together, shared) = (
            quantized(given, ranks, out) for ranks, out in zip((1, given.ranks), outs, strict=True)
        )
        same = all(file.read_bytes() == (outs[1] / file.name).read_bytes() for file in outs[0].glob("*.safetensors"))
    return provenance(0) | {
        "model": Path(given.model).name, "ranks": given.ranks, "round": number, "tokens": given.samples * given.seq_len,
        "load_before": load, "seconds_alone": alone, "seconds_together": together, "phases_alone": phases,
        "phases_together": shared, "same_bytes": same,
    }  # fmt: skip


def main() -> None:
    """Measure and append."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--calibration", nargs="+", required=True)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--records", type=Path, default=RECORDS)
    given = parser.parse_args()
    for number in range(given.rounds):
        row = measured(given, number)
        append_records(given.records, [row])
        print(f"{row['model']} round {number}: {row['seconds_alone']:.1f} s, {row['seconds_together']:.1f} s", flush=True)


if __name__ == "__main__":
    main()
