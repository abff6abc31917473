# Shapes: N out_features, K in_features.
"""Does vLLM with Duotone's plugin hold our weights and write what our own runtime writes?

    python bench/peers/vllm_plugin.py CHECKPOINT... --text FILE [--ranks 1 2] [--dtype bfloat16] [--prompts 4]

Runs vllm_plugin_cpu.py in vLLM's environment (setup.sh vllm_cpu, with duotone installed in it) and appends a row for each
checkpoint and number of ranks to bench/records/vllm_plugin.jsonl: fused linears of all ranks and how many of them are the
contract's weights, bit for bit; how many greedy tokens are the likeliest of `duotone.load` in float32 around the W4A8 linears,
given what vLLM wrote, and how far apart the logarithms of their probabilities lie; `ours`: the same of what `duotone.load`
writes in vLLM's dtype, and `same`: how many tokens the two have in common. In float32 both compute the same but for the order
of sums; a rank of several scales activations by its own columns, as vLLM's kernels do.
"""

import argparse
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel
from vllm_generate import compared, prompts_from

from duotone.bench import append_records, provenance
from duotone.checkpoint.reader import WeightReader
from duotone.checkpoint.source import open_source
from duotone.qweight import dequantize
from duotone.runtime.load import load

HERE = Path(__file__).resolve().parent
RECORDS = HERE.parent / "records" / "vllm_plugin.jsonl"
PYTHON = HERE / ".venvs" / "vllm_cpu" / "bin" / "python"
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def main() -> None:
    """One row for each checkpoint and number of ranks."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("checkpoint", type=Path, nargs="+")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--prompts", type=int, default=4)
    arguments = parser.parse_args()
    for checkpoint in arguments.checkpoint:
        prompts = prompts_from(checkpoint, arguments.text, arguments.prompts)
        for ranks in arguments.ranks:
            row = provenance(0) | judged(checkpoint, prompts, ranks, arguments.dtype)
            append_records(RECORDS, [row])
            print({name: value for name, value in row.items() if name not in {"machine", "versions", "commit", "date"}})


def judged(checkpoint: Path, prompts: list[list[int]], ranks: int, dtype: str) -> dict[str, Any]:
    """What vLLM holds and writes, beside what it should."""
    source = open_source(checkpoint)
    reader = WeightReader(source)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "prompts.json").write_text(json.dumps(prompts))
        inputs = [checkpoint.resolve(), folder / "prompts.json", folder, str(ranks), dtype]
        command = [PYTHON, HERE / "vllm_plugin_cpu.py", *inputs]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=scratch)
        if not (folder / "written.json").exists():
            raise SystemExit(f"vllm_plugin_cpu.py ended with {done.returncode}: {done.stderr[-2000:]}")
        found = json.loads((folder / "written.json").read_text())
        layers, equal, size, count = 0, 0, 0, 0
        for rank in range(ranks):
            with safe_open(folder / f"{rank}.safetensors", "pt") as held:
                size += int(held.metadata()["bytes"])
                for name in held.keys():  # noqa: SIM118
                    weight_NK = held.get_tensor(name)
                    layers, count = layers + 1, count + weight_NK.numel()
                    equal += torch.equal(weight_NK, share_of(reader, name, rank, ranks))
    ours = greedy(load(checkpoint, getattr(torch, dtype), "cpu"), prompts, len(found["tokens"][0]))
    model = load(checkpoint, torch.float32, "cpu", shortcuts=False)
    theirs, same = torch.tensor(found["tokens"]), torch.tensor(ours["tokens"])
    return {
        "model": checkpoint.name, "target": reader.scheme.target.name, "vllm": found["vllm"], "ranks": ranks, "dtype": dtype,
        "runs": found["runs"], "layers": layers, "equal": equal, "bits_in_memory": 8 * size / count,
        "tokens": theirs.numel(), "same": int((theirs == same).sum()), **compared(model, prompts, found),
        "ours": compared(model, prompts, ours),
    }  # fmt: skip


def share_of(reader: WeightReader, layer: str, rank: int, ranks: int) -> Tensor:
    """A rank's rows of what vLLM fuses, or of what writes to the stream its columns."""
    parent, _, leaf = layer.rpartition(".")
    weights = [dequantize(reader.read(f"{parent}.{name}")) for name in FUSED.get(leaf, (leaf,))]
    if leaf in {"o_proj", "down_proj"}:
        return weights[0].chunk(ranks, 1)[rank]
    return torch.cat([weight_NK.chunk(ranks)[rank] for weight_NK in weights])


def greedy(model: PreTrainedModel, prompts: list[list[int]], count: int) -> dict[str, list[Any]]:
    """What a model of our own runtime adds to each prompt, and the logarithm of each token's probability."""
    assert model.generation_config is not None
    model.generation_config.eos_token_id = None
    written, logprobs = [], []
    for prompt in prompts:
        tokens = torch.tensor([prompt])
        with torch.no_grad():
            out = model.generate(  # pyright: ignore[reportCallIssue]
                input_ids=tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=count, do_sample=False, pad_token_id=0,
                output_logits=True, return_dict_in_generate=True,
            )  # fmt: skip
        new = out.sequences[0, len(prompt) :]
        likely = torch.cat(out.logits).float().log_softmax(-1).gather(1, new[:, None])[:, 0]
        written, logprobs = [*written, new.tolist()], [*logprobs, likely.tolist()]
    return {"tokens": written, "logprobs": logprobs}


if __name__ == "__main__":
    main()
