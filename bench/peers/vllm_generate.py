"""Does vLLM on a CPU write what our own weights make it write, from each layout that `duotone export` makes?

    python bench/peers/vllm_generate.py CHECKPOINT --text FILE [--prompts 4]

Runs vllm_cpu.py in its environment (setup.sh vllm_cpu) on the checkpoint as it is and on its exports, and appends a row for
each layout to bench/records/vllm_generate.jsonl. The reference is a transformers model in float32 whose linears hold what the
layout's runtimes multiply, as `export` understands it, given what vLLM wrote: how many of its tokens are the reference's
likeliest too, and how far apart the two hold the logarithms of their probabilities. vLLM computes in BF16; what that alone
makes is to be seen at dense-bf16, which has no quantized linear.
"""

import argparse
import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from duotone.bench import append_records, provenance
from duotone.checking import check
from duotone.checkpoint.layouts import LAYOUTS
from duotone.checkpoint.layouts.layout import ALONE
from duotone.checkpoint.reader import WeightReader, packed_layers
from duotone.checkpoint.source import open_source
from duotone.converting import export_checkpoint
from duotone.models.tokenizer import load_tokenizer
from duotone.runtime.load import load

HERE = Path(__file__).resolve().parent
RECORDS = HERE.parent / "records" / "vllm_generate.jsonl"
PROMPT_TOKENS = 16
#: What vLLM reads of what `duotone export` makes.
EXPORTS = ("w4a16", "gptq", "dense-bf16")


def main() -> None:
    """One row for each layout."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=4)
    arguments = parser.parse_args()
    prompts = prompts_from(arguments.checkpoint, arguments.text, arguments.prompts)
    with tempfile.TemporaryDirectory() as scratch:
        for layout in ("compressed-tensors", *EXPORTS):
            row = provenance(0) | judged(arguments.checkpoint, layout, prompts, Path(scratch))
            append_records(RECORDS, [row])
            print({name: value for name, value in row.items() if name not in {"machine", "versions", "commit", "date"}})


def prompts_from(checkpoint: Path, text: Path, count: int) -> list[list[int]]:
    """Token windows at even distances in a text."""
    tokens: list[int] = load_tokenizer(checkpoint)(text.read_text(encoding="utf-8"), add_special_tokens=False).input_ids
    starts = [len(tokens) * i // count for i in range(count)]
    return [tokens[start : start + PROMPT_TOKENS] for start in starts]


def judged(checkpoint: Path, layout: str, prompts: list[list[int]], scratch: Path) -> dict[str, Any]:
    """What vLLM does with one layout, beside what `duotone check` says of it and what the reference holds likely."""
    folder = checkpoint.resolve()
    if layout in EXPORTS:
        folder = scratch / layout
        export_checkpoint(checkpoint, folder, layout, allow_lossy=True)
    (verdict,) = check(folder, ["vllm"], ["cpu"]) if layout != "dense-bf16" else [None]
    (scratch / "prompts.json").write_text(json.dumps(prompts))
    out, python = scratch / f"{layout}.json", HERE / ".venvs" / "vllm_cpu" / "bin" / "python"
    command = [python, HERE / "vllm_cpu.py", folder, scratch / "prompts.json", out]
    alone = os.environ | {"VLLM_PLUGINS": ""}  # without ours: vllm_plugin.py has that
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=scratch, env=alone)
    if not out.exists():
        raise SystemExit(f"vllm_cpu.py ended with {done.returncode}: {done.stderr[-2000:]}")
    found = json.loads(out.read_text())
    row = {"model": checkpoint.name, "layout": layout, "vllm": found["vllm"], "refused": found["refused"]}
    row |= {"check": "bf16" if verdict is None else verdict.outcome, "tokens": sum(map(len, found["tokens"]))}
    row |= dict.fromkeys(("likeliest", "mean_difference", "largest_difference"))
    return row if found["refused"] else row | compared(reference(checkpoint, layout), prompts, found)


def reference(checkpoint: Path, layout: str) -> nn.Module:
    """A model in float32 that multiplies a layout's weights by activations as they are."""
    source, kind = open_source(checkpoint), LAYOUTS[layout]
    reader, model = WeightReader(source), load(checkpoint, torch.float32, "cpu", shortcuts=False)
    for layer in packed_layers(source):
        values_NK = kind.values(layer, kind.to_tensors(layer, reader.read(layer), ALONE), reader.scheme)
        linear = nn.Linear(values_NK.shape[1], values_NK.shape[0], bias=False)
        linear.weight, linear.bias = nn.Parameter(values_NK.float()), model.get_submodule(layer).bias
        parent, _, leaf = layer.rpartition(".")
        setattr(model.get_submodule(parent), leaf, linear)
    return model


def compared(model: nn.Module, prompts: list[list[int]], found: dict[str, Any]) -> dict[str, Any]:
    """The reference's view of what vLLM wrote."""
    likeliest, differences = 0, []
    for prompt, written, theirs in zip(prompts, found["tokens"], found["logprobs"], strict=True):
        tokens = torch.tensor([prompt + written])
        with torch.no_grad():
            logprobs = model(tokens).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        likeliest += int((logprobs.argmax(-1) == tokens[0, len(prompt) :]).sum())
        ours = logprobs.gather(1, tokens[0, len(prompt) :, None])[:, 0]
        differences.append((ours - torch.tensor(theirs)).abs())
    distance = torch.cat(differences)
    return {
        "likeliest": likeliest,
        "mean_difference": float(distance.mean()),
        "largest_difference": float(distance.max()),
    }


if __name__ == "__main__":
    main()
