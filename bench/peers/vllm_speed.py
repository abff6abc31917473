"""How fast vLLM writes on a CPU: our checkpoint by Duotone's plugin, and by vLLM's own means its exports as W4A16 and in BF16.

    python bench/peers/vllm_speed.py [--blocks 22] [--prompt-tokens 128] [--new-tokens 32] [--rounds 5] [--threads 2]

A random model of TinyLlama's shape. The three processes take turns; appends a row for each to bench/records/vllm_speed.jsonl.
"""

import argparse
import os
import statistics
import tempfile
from contextlib import ExitStack
from pathlib import Path

from generate import Peer
from vllm_plugin import HERE, PYTHON

from duotone.bench import append_records, provenance
from duotone.converting import export_checkpoint
from duotone.speed_model import LLAMA_1B, Turn, random_checkpoint

RECORDS = HERE.parent / "records" / "vllm_speed.jsonl"
EXPORTS = {"W4A16": "w4a16", "BF16": "dense-bf16"}
OURS = "W4A8, the plugin"


def main() -> None:
    """Make the model, start the processes, take turns."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    for name, default in (("blocks", 22), ("prompt-tokens", 128), ("new-tokens", 32), ("rounds", 5), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    sizes = [given.prompt_tokens, given.new_tokens, given.threads]
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        (scratch / OURS).mkdir()
        config = LLAMA_1B | {"num_hidden_layers": given.blocks}
        folders = {OURS: random_checkpoint(scratch / OURS, config, 0)}
        for name, layout in EXPORTS.items():
            export_checkpoint(folders[OURS], scratch / name, layout, allow_lossy=True)
            folders[name] = scratch / name
        os.environ["VLLM_PLUGINS"] = "duotone"  # it takes nothing but W4A8
        peers = {name: Peer(stack, [PYTHON, HERE / "vllm_turns.py", folder, *sizes]) for name, folder in folders.items()}
        taken: dict[str, list[Turn]] = {name: [] for name in peers}
        for peer in peers.values():
            peer.turn()  # the first one allocates
        for _ in range(given.rounds):
            for name, peer in peers.items():
                taken[name].append(peer.turn())
    rows = []
    for name, turns in taken.items():
        ratios = [[theirs / ours for theirs, ours in zip(a, b, strict=True)] for a, b in zip(turns, taken[OURS], strict=True)]
        rows.append(
            provenance(0) | {
                "threads": given.threads, "model": f"random Llama, hidden size 2048, {given.blocks} blocks", "runs": name,
                "vllm": peers[name].facts["version"], "prompt_tokens": given.prompt_tokens, "new_tokens": given.new_tokens,
                "rounds": given.rounds, "first_token_s": statistics.median(turn[0] for turn in turns),
                "each_token_s": statistics.median(turn[1] for turn in turns),
                "plugin_times_as_fast": {
                    "first": statistics.median(ratio[0] for ratio in ratios),
                    "each": statistics.median(ratio[1] for ratio in ratios),
                    "each_spread": [min(ratio[1] for ratio in ratios), max(ratio[1] for ratio in ratios)],
                },
            }
        )  # fmt: skip
        print({key: rows[-1][key] for key in ("runs", "first_token_s", "each_token_s", "plugin_times_as_fast")})
    append_records(RECORDS, rows)


if __name__ == "__main__":
    main()
