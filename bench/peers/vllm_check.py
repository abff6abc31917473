"""Is what vLLM's own loading code makes of our checkpoint the contract's weight, bit for bit?

    python bench/peers/vllm_check.py CHECKPOINT [--ranks 1 2] [--plugin]

Runs vllm_loader.py in its environment (setup.sh vllm) and appends a row for each number of ranks to
bench/records/vllm_load.jsonl: layers, how many have the same FP8 weights and channel scales, or vLLM's refusal; and the scales
of an FP8 cache, how many there are and how many are what `duotone.load` has. --plugin: of what Duotone's plugin makes of it on
a device for which vLLM has no kernel.
"""

import argparse
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from duotone.bench import append_records, provenance
from duotone.checking import check
from duotone.checkpoint.kv_cache import PARTS, kv_strategy_of, read_scales
from duotone.checkpoint.reader import WeightReader
from duotone.checkpoint.source import open_source
from duotone.qweight import QuantizedWeight, fp8_values

HERE = Path(__file__).resolve().parent
RECORDS = HERE.parent / "records" / "vllm_load.jsonl"
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def main() -> None:
    """One row for each number of ranks."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--plugin", action="store_true")
    arguments = parser.parse_args()
    for ranks in arguments.ranks:
        row = provenance(0) | judged(arguments.checkpoint, ranks, arguments.plugin)
        append_records(RECORDS, [row])
        print(
            {
                name: row[name]
                for name in ("vllm", "ranks", "layers", "equal", "refused", "check", "cache_scales", "cache_scales_equal")
                if name in row
            }
        )


def judged(checkpoint: Path, ranks: int, plugin: bool) -> dict[str, Any]:
    """What vLLM made of it, and what `duotone check` says."""
    (verdict,) = check(checkpoint, ["vllm-plugin"], ["l40s"], ranks) if plugin else check(checkpoint, ["vllm"], ["h100"], ranks)
    found = {"model": checkpoint.name, "ranks": ranks, "plugin": plugin, "check": verdict.outcome, "vllm": verdict.version}
    with tempfile.TemporaryDirectory() as scratch:
        out, python = Path(scratch) / "out.safetensors", HERE / ".venvs" / "vllm" / "bin" / "python"
        command = [python, "-O", HERE / "vllm_loader.py", checkpoint.resolve(), out, "--ranks", str(ranks)]
        command += ["--plugin"] if plugin else []
        environment = os.environ | {"PYTHONPATH": str(HERE.parents[1] / "src")}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=scratch)
        if not out.exists():
            lines = [line for line in done.stderr.splitlines() if "CutlassW4A8LinearKernel cannot" in line]
            return found | {"layers": 0, "equal": 0, "refused": lines[0].strip() if lines else done.stderr[-300:]}
        with safe_open(out, "pt") as made:
            found["vllm"] = made.metadata()["vllm"]
            names = [name.removesuffix(".values") for name in made.keys() if name.endswith(".values")]  # noqa: SIM118
            equal = sum(_is_ours(checkpoint, name, made) for name in names)
            scales = [name for name in made.keys() if name.endswith(("k_scale", "v_scale"))]  # noqa: SIM118
            arrived = sum(_is_our_scale(checkpoint, name, made.get_tensor(name)) for name in scales)
    cache = {"kv_cache": kv_strategy_of(open_source(checkpoint).config["quantization_config"])}
    cache |= {"cache_scales": len(scales), "cache_scales_equal": arrived}
    return found | {"layers": len(names), "equal": equal, "refused": None} | cache


def _is_our_scale(checkpoint: Path, name: str, theirs: Tensor) -> bool:
    """name: RANKS.RANK.ATTENTION.PART. A rank's heads, or the one scale of all."""
    ranks, rank, full = name.split(".", 2)
    source, (attention, _, part) = open_source(checkpoint), full.rpartition(".")
    heads = source.config["num_key_value_heads"]
    ours = read_scales(source, attention, heads)[PARTS.index(part)]
    if kv_strategy_of(source.config["quantization_config"]) == "tensor":
        return theirs.numel() == 1 and bool((ours == theirs).all())
    each = max(1, heads // int(ranks))
    first = int(rank) * heads // int(ranks)
    return torch.equal(theirs, ours[first : first + each])


def _is_ours(checkpoint: Path, name: str, made: Any) -> bool:
    """name: RANKS.RANK.LAYER. FP8 weights equal; channel scales too, but for the last bit of a reciprocal."""
    ranks, rank, layer = name.split(".", 2)
    parent, _, leaf = layer.rpartition(".")
    reader = WeightReader(open_source(checkpoint))
    shares = [_share(reader.read(f"{parent}.{shard}"), leaf, int(rank), int(ranks)) for shard in FUSED.get(leaf, (leaf,))]
    values, channel = (torch.cat(parts) for parts in zip(*shares, strict=True))
    theirs = made.get_tensor(f"{name}.channel").flatten()
    return torch.equal(made.get_tensor(f"{name}.values"), values) and bool(
        ((theirs - channel).abs() <= torch.finfo(torch.float32).eps * channel).all()
    )


def _share(weight: QuantizedWeight, leaf: str, rank: int, ranks: int) -> tuple[Tensor, Tensor]:
    """A rank's rows, or of what writes to the stream its columns; vLLM splits the scales of its own columns."""
    values_NK, outer_N = fp8_values(weight), weight.outer_scale.expand(weight.shape[0])
    if leaf in {"o_proj", "down_proj"}:
        return values_NK.chunk(ranks, 1)[rank], outer_N
    return values_NK.chunk(ranks)[rank], outer_N.chunk(ranks)[rank]


if __name__ == "__main__":
    main()
