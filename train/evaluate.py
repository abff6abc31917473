"""Measure held-out perplexity of an exported model folder beside a unigram baseline on the same tokens.

Usage: python train/evaluate.py [--model assets/duotone-10m] [--build train/build]
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from corpus import HERE, CorpusError
from model import LENGTH
from tokenizer import BOS_ID, VOCABULARY

DEFAULT_MODEL = HERE.parent / "assets" / "duotone-10m"
WINDOWS_AT_ONCE = 8


@torch.no_grad()
def total_nats(model: PreTrainedModel, ids: np.ndarray) -> float:
    """Return the summed loss, in nats, of all `ids` in windows of LENGTH tokens, the first of each being BOS.

    Every id is predicted exactly once; the last window may be shorter than the others.
    """
    fresh = LENGTH - 1
    whole = len(ids) // fresh * fresh
    groups = list(np.array_split(ids[:whole].reshape(-1, fresh), max(1, whole // fresh // WINDOWS_AT_ONCE)))
    if whole < len(ids):
        groups.append(ids[None, whole:])
    total = 0.0
    for group in groups:
        windows = torch.from_numpy(np.pad(group, ((0, 0), (1, 0)), constant_values=BOS_ID))
        logits = model(input_ids=windows[:, :-1], use_cache=False).logits.float()
        total += cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten(), reduction="sum").item()
    return total


def unigram_nats(training_ids: np.ndarray, ids: np.ndarray) -> float:
    """Return the summed loss, in nats, of token frequencies counted on the training split (one added to each)."""
    counts = np.bincount(training_ids, minlength=VOCABULARY) + 1.0
    return float(-np.log(counts / counts.sum())[ids].sum())


def measures(nats: float, tokens: int, size: int) -> dict[str, float]:
    """Turn a summed loss over `tokens` tokens and `size` bytes of text into perplexity and bits per byte."""
    return {"perplexity": round(math.exp(nats / tokens), 3), "bits_per_byte": round(nats / math.log(2) / size, 4)}


def evaluate(folder: Path, build: Path) -> dict[str, object]:
    """Return the held-out measures of the stored BF16 weights, computed in float32 on `evaluation.txt`."""
    rows_path = build / "train_rows.npy"
    if not rows_path.exists() or not (folder / "model.safetensors").exists():
        raise CorpusError("The model folder or the training rows are missing: run 'python train/train.py' first.")
    data = (folder / "evaluation.txt").read_bytes()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = np.array(tokenizer(data.decode(), add_special_tokens=False, verbose=False)["input_ids"], dtype=np.int64)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    training_ids = np.load(rows_path)[:, 1:].ravel()  # without the BOS of every row
    return {
        "text": "evaluation.txt",
        "bytes": len(data),
        "tokens": len(ids),
        "window_tokens": LENGTH,
        "model": measures(total_nats(model, ids), len(ids), len(data)),
        "unigram": measures(unigram_nats(training_ids, ids), len(ids), len(data)),
    }


def main() -> int:
    """Print the measures as JSON."""
    parser = argparse.ArgumentParser(description="Held-out perplexity of a model folder beside a unigram baseline.")
    parser.add_argument("--model", type=Path, default=DEFAULT_MODEL, help="exported model folder")
    parser.add_argument("--build", type=Path, default=HERE / "build", help="folder of the training rows")
    arguments = parser.parse_args()
    try:
        print(json.dumps(evaluate(arguments.model, arguments.build), indent=2))
    except CorpusError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
