"""How fast a whole model writes: what `duotone bench generate` times, and llama.cpp's Q4_0 in turn with it.

    python bench/peers/generate.py --llama-cpp PYTHON [--prompt-tokens 128] [--new-tokens 32] [--rounds 7] [--threads 2]

PYTHON is that of an environment with llama-cpp-python and gguf (`pip install llama-cpp-python gguf` builds it). The models
are random ones of one shape, of 1.1 billion parameters. Appends rows to bench/records/generate.jsonl.
"""

import argparse
import json
import subprocess
import tempfile
from contextlib import ExitStack
from pathlib import Path

import torch
from compare import HERE

from duotone.bench import append_records
from duotone.report import show
from duotone.report_bench import generate_table
from duotone.speed_model import LLAMA_1B, GenerateBench, Turn, generate_rows

RECORDS = HERE.parent / "records" / "generate.jsonl"
#: llama.cpp's own choice of an output head for Q4_0, and the one that a W4A8 checkpoint has.
HEADS = {"llama.cpp Q4_0": "Q6_K", "llama.cpp Q4_0, BF16 head": "BF16"}


class Peer:
    """A process that takes a turn whenever it is asked, and waits otherwise; it ends with the stack."""

    def __init__(self, stack: ExitStack, command: list[object]) -> None:
        arguments = [str(part) for part in command]
        process = stack.enter_context(subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        assert process.stdin is not None and process.stdout is not None
        self._ask, self._answer = process.stdin, process.stdout
        stack.callback(self._ask.close)
        self.facts = json.loads(self._answer.readline())

    def turn(self) -> Turn:
        """Seconds until the prompt is read, and those of each new token."""
        self._ask.write("\n")
        self._ask.flush()
        prefill, decode = json.loads(self._answer.readline())
        return prefill, decode


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
    with ExitStack() as stack:
        config = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "config.json"
        config.write_text(json.dumps(LLAMA_1B), encoding="utf-8")
        sizes = [config, given.prompt_tokens, given.new_tokens, given.threads]
        peers = {name: Peer(stack, [given.llama_cpp, HERE / "llamacpp_turns.py", *sizes, head]) for name, head in HEADS.items()}
        bench = GenerateBench(None, given.prompt_tokens, given.new_tokens, given.rounds)
        rows = list(generate_rows(bench, {name: peer.turn for name, peer in peers.items()}))
    for row in rows:
        if row["runtime"] in peers:
            facts = peers[row["runtime"]].facts
            row["weight_bytes"] = facts["weight_bytes"]
            row["versions"] = row["versions"] | {"llama-cpp-python": facts["version"]}
    append_records(given.records, rows)
    show(generate_table(rows))


if __name__ == "__main__":
    main()
