"""How fast a whole model writes: what `duotone bench generate` times, and llama.cpp's Q4_0 in turn with it.

    python bench/peers/generate.py --llama-cpp PYTHON [--prompt-tokens 128] [--new-tokens 32] [--rounds 7] [--threads 2]

PYTHON is that of an environment with llama-cpp-python and gguf (`pip install llama-cpp-python gguf` builds it). The models
are random ones of one shape, of 1.1 billion parameters. Appends rows to bench/records/generate.jsonl.
"""

import argparse
import json
import subprocess
import tempfile
from pathlib import Path

import torch
from compare import HERE

from duotone.bench import append_records
from duotone.report import generate_table, show
from duotone.speed_model import LLAMA_1B, GenerateBench, Turn, generate_rows

RECORDS = HERE.parent / "records" / "generate.jsonl"


def main() -> None:
    """Measure all of them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--llama-cpp", type=Path, required=True, metavar="PYTHON")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--records", type=Path, default=RECORDS)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    with tempfile.TemporaryDirectory() as scratch:
        config = Path(scratch) / "config.json"
        config.write_text(json.dumps(LLAMA_1B), encoding="utf-8")
        script = HERE / "llamacpp_turns.py"
        command = [given.llama_cpp, script, config, str(given.prompt_tokens), str(given.new_tokens), str(given.threads)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as peer:
            assert peer.stdin is not None and peer.stdout is not None
            ask, answer = peer.stdin, peer.stdout
            facts = json.loads(answer.readline())

            def turn() -> Turn:
                ask.write("\n")
                ask.flush()
                prefill, decode = json.loads(answer.readline())
                return prefill, decode

            bench = GenerateBench(None, given.prompt_tokens, given.new_tokens, given.rounds)
            rows = list(generate_rows(bench, {"llama.cpp Q4_0": turn}))
            peer.stdin.close()
    for row in rows:
        if row["runtime"] == "llama.cpp Q4_0":
            row["weight_bytes"] = facts["weight_bytes"]
            row["versions"] = row["versions"] | {"llama-cpp-python": facts["version"]}
    append_records(given.records, rows)
    show(generate_table(rows))


if __name__ == "__main__":
    main()
