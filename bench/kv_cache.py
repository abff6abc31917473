"""What an FP8 cache costs and saves: KL to the original of one quantized model with its cache in BF16 and in FP8, and bytes.

Usage: python bench/kv_cache.py MODEL --calibration TEXT --text TEXT. The weights are the same bits each time; only keys and
values differ. Appends a row for each kind of cache to bench/records/kv_cache.jsonl: `kl_more` is the mean difference from the
first row's KL, window by window, `kl_more_stderr` its standard error, `cache_bytes` what the cache holds after a window.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

import duotone
from duotone.bench import append_records, provenance
from duotone.calibrate.data import TokenWindows, draw_windows
from duotone.evaluation import score_windows, standard_error, summarize
from duotone.models.tokenizer import load_tokenizer
from duotone.runtime.load import load
from duotone.scheme import KV_CACHE_STRATEGIES

RECORDS = Path(__file__).resolve().parent / "records" / "kv_cache.jsonl"
CPU = torch.device("cpu")


def main() -> None:
    """Rows for a cache in BF16, and in FP8 by each strategy."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--calibration", action="append", required=True)
    parser.add_argument("--text", action="append", required=True)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=256)
    arguments = parser.parse_args()
    windows = draw_windows(load_tokenizer(Path(arguments.model)), arguments.text, arguments.seq_len, arguments.samples, seed=0)
    kl_of_bf16: Tensor | None = None
    for strategy in (None, *KV_CACHE_STRATEGIES):
        row, kl_W = measured(arguments, windows, strategy)
        kl_of_bf16 = kl_W if kl_of_bf16 is None else kl_of_bf16
        difference = kl_W - kl_of_bf16
        row |= {"kl_more": float(difference.mean()), "kl_more_stderr": standard_error(difference)}
        append_records(RECORDS, [row])
        print(json.dumps(row))


def measured(arguments: argparse.Namespace, windows: TokenWindows, strategy: str | None) -> tuple[dict[str, Any], Tensor]:
    """A row, and the KL of each window."""
    cache = {} if strategy is None else {"kv_cache": "fp8", "kv_cache_strategy": strategy}
    options = {"calibration": tuple(arguments.calibration), "samples": arguments.samples, "seq_len": arguments.seq_len}
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "out"
        report = duotone.quantize(arguments.model, out, device="cpu", **options, **cache).to_json()
        scores = score_windows(load(out, torch.float32, "cpu"), windows, load(Path(arguments.model), torch.float32, "cpu"), CPU)
        held = cache_bytes(out, windows.tokens[:1])
    assert scores.kl is not None
    result = summarize(scores, windows)
    return provenance(0) | {
        "model": Path(arguments.model).name,
        "text": [Path(text.partition("#")[0]).name for text in arguments.text],
        "tokens": result.tokens,
        "method": report["config"]["method"],
        "group_size": report["config"]["group_size"],
        "calibration": {"text": report["calibration"]["text"], "tokens": report["calibration"]["tokens"], "seed": 0},
        "kv_cache": strategy and "fp8",
        "strategy": strategy,
        "cache_tokens": windows.tokens.shape[1],
        "cache_bytes": held,
        "kl": result.kl,
        "kl_stderr": result.kl_stderr,
        "perplexity": result.perplexity,
        "top1_agreement": result.top1_agreement,
    }, scores.kl


@torch.no_grad()
def cache_bytes(checkpoint: Path, tokens: Tensor) -> int:
    """Of the tensors that a cache holds once the model, in BF16, has read a text [1, T]."""
    model = load(checkpoint, torch.bfloat16, "cpu")
    cache = DynamicCache(config=model.config)
    model(tokens, past_key_values=cache, use_cache=True)
    return sum(kept.untyped_storage().nbytes() for layer in cache.layers for kept in (layer.keys, layer.values))


if __name__ == "__main__":
    main()
