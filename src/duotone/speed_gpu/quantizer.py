"""How long `duotone quantize` takes here: of some blocks of a random model, or of all."""

import json
import random
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from duotone.errors import DuotoneError
from duotone.settings import QuantizeConfig
from duotone.speed_gpu.budget import Deadline, Row
from duotone.speed_gpu.linears import Bench
from duotone.speed_gpu.sizes import Sizes

_BYTES = 256


class _OverTimeError(Exception):
    """Raised where the quantizer tells its progress, when its time is over."""


def quantizer_rows(bench: Bench, blocks: int, deadline: Deadline) -> Iterator[Row]:
    """One row: `dpq` on so many blocks, and what that makes of the whole model, extrapolated."""
    sizes = bench.plan.whole
    what = f"{sizes.name}'s {sizes.layers} blocks" if blocks == sizes.layers else f"{blocks} blocks of {sizes.name}"
    facts = {"kind": "quantizer", "model": f"{what}, random weights, bytes for tokens", "blocks": blocks}
    yield from deadline.attempt(facts, lambda: _timed(bench, blocks, deadline))


def _timed(bench: Bench, blocks: int, deadline: Deadline) -> Iterator[Row]:
    from duotone.pipeline import quantize  # where a package is missing that only this part needs, the others have their rows

    plan, device, marks = bench.plan, bench.device, list[float]()

    def tell(done: int, total: int, what: str) -> None:
        marks.append(time.perf_counter())  # before each block, and behind the last, whose weights the host has by then
        if done < total and deadline.is_over():
            raise _OverTimeError(f"at {done} of {total} ({what}), {deadline.reason}")

    with tempfile.TemporaryDirectory() as scratch:
        folder, text = Path(scratch) / "random", Path(scratch) / "text.txt"
        random_checkpoint(folder, plan.whole, blocks, device)
        text.write_text(_words(2 * plan.windows * plan.window_tokens, bench.seed), encoding="utf-8")
        config = QuantizeConfig(
            calibration=(str(text),), samples=plan.windows, seq_len=plan.window_tokens, group_size=plan.group_size,
            seed=bench.seed, device=str(device),
        )  # fmt: skip
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        try:
            report = quantize(folder, Path(scratch) / "out", config, tell)
        except DuotoneError as error:
            yield {"unmeasured": str(error)}
            return
    seconds, layers, block_seconds = sum(report.seconds.values()), plan.whole.layers, marks[-1] - marks[-2]
    how = f"extrapolated: {blocks} blocks, {layers - blocks} more like the last of them, for which all is compiled"
    yield {
        "method": config.method,
        "group_size": config.group_size,
        "tokens": plan.windows * plan.window_tokens,
        "seconds": seconds,
        "phases": report.seconds,
        "seconds_a_block": block_seconds,
        "extrapolated_seconds": None if blocks == layers else seconds + (layers - blocks) * block_seconds,
        "how": "measured" if blocks == layers else how,
        "host_peak_bytes": report.peak_bytes,
        "peak_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
    }


def random_checkpoint(folder: Path, sizes: Sizes, blocks: int, device: torch.device) -> None:
    """A BF16 Llama of random weights with a tokenizer of bytes, written block by block.

    Its table has a row for each byte only, and is its head too. Raises OSError where the disk has no
    room for it and what comes of it.
    """
    shapes = _shapes(sizes)
    nbytes = 2 * blocks * sum(rows * columns for rows, columns in shapes.values())
    folder.mkdir(parents=True)
    if (free := shutil.disk_usage(folder).free) < 1.5 * nbytes + 2**28:
        raise OSError(f"{folder.parent}: found {free / 1e9:.0f} GB of room, expected {1.5 * nbytes / 1e9 + 0.3:.0f} GB")
    generator = torch.Generator(device).manual_seed(0)
    weight_map: dict[str, str] = {}

    def save(name: str, tensors: dict[str, Tensor]) -> None:
        save_file(tensors, folder / name, {"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, name))

    def drawn(rows: int, columns: int) -> Tensor:
        weight = torch.randn(rows, columns, generator=generator, device=device, dtype=torch.bfloat16)
        return (weight * columns**-0.5).cpu()

    one = torch.ones(sizes.hidden, dtype=torch.bfloat16)
    save("model-rest.safetensors", {"model.embed_tokens.weight": drawn(_BYTES + 2, sizes.hidden), "model.norm.weight": one})
    for block in range(blocks):
        prefix = f"model.layers.{block}"
        norms = {f"{prefix}.{name}.weight": one.clone() for name in ("input_layernorm", "post_attention_layernorm")}
        linears = {f"{prefix}.{name}.weight": drawn(*shape) for name, shape in shapes.items()}
        save(f"model-{block:05d}.safetensors", norms | linears)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(_config(sizes, blocks)), encoding="utf-8")
    _save_tokenizer(folder)


def _shapes(sizes: Sizes) -> dict[str, tuple[int, int]]:
    """(N, K) of a block's linears as a checkpoint has them, apart."""
    hidden, wide = sizes.hidden, sizes.intermediate
    queries, keys = sizes.heads * sizes.head_size, sizes.kv_heads * sizes.head_size
    return {
        "self_attn.q_proj": (queries, hidden), "self_attn.k_proj": (keys, hidden), "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries), "mlp.gate_proj": (wide, hidden), "mlp.up_proj": (wide, hidden),
        "mlp.down_proj": (hidden, wide),
    }  # fmt: skip


def _config(sizes: Sizes, blocks: int) -> Row:
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": sizes.hidden,
        "intermediate_size": sizes.intermediate, "num_hidden_layers": blocks, "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads, "head_dim": sizes.head_size, "vocab_size": _BYTES + 2, "rms_norm_eps": 1e-5,
        "hidden_act": "silu", "max_position_embeddings": 8192, "tie_word_embeddings": True, "bos_token_id": _BYTES,
        "eos_token_id": _BYTES + 1, "dtype": "bfloat16",
    }  # fmt: skip


def _save_tokenizer(folder: Path) -> None:
    """256 bytes, a beginning and an end; no merges."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate(letters)} | {"<s>": _BYTES, "</s>": _BYTES + 1}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)


def _words(letters: int, seed: int) -> str:
    """Random words, so many letters of them."""
    generator = random.Random(seed)
    text = "".join(generator.choices("etaoin shrdlu cmf", k=letters))
    return "\n".join(text[i : i + 80] for i in range(0, letters, 80))
