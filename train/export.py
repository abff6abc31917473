"""Write the bundled model folder from the last checkpoint: weights, tokenizer, texts, measures and model card.

Usage: python train/export.py [--out assets/duotone-10m] [--build train/build]; train.py calls it at its end.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from card import draw_curve, render_card
from corpus import HERE, CorpusError, Document, read_pins, read_split
from evaluate import DEFAULT_MODEL, evaluate
from licences import render_licences
from model import LENGTH, SEED, make_model
from tokenizer import BOS, BOS_ID, EOS, EOS_ID, train_tokenizer

# Bytes of each shipped text; whole documents are taken until the next one would not fit.
TEXT_BYTES = {"calibration": 500_000, "evaluation": 300_000}
LARGEST_DOCUMENT = 40_000  # bytes; one long reference page must not dominate a text
# Documents that name a package index stay out of the shipped texts: this repository names no registry host.
NAMES_AN_INDEX = re.compile(r"pypi|py\w+hosted|anaconda\.", re.IGNORECASE)
PROMPT = "The function returns"
SAMPLE_TOKENS = 60


def choose_documents(documents: list[Document], size: int) -> list[Document]:
    """Return whole documents, in an order given by a hash of their paths, of at most `size` bytes together."""
    chosen, total = [], 0
    for document in sorted(documents, key=lambda d: hashlib.sha256(b"text:" + d.path.encode()).digest()):
        length = len(document.text.encode()) + 1
        usable = length <= LARGEST_DOCUMENT and not NAMES_AN_INDEX.search(document.text)
        if usable and total + length <= size:
            chosen.append(document)
            total += length
    return chosen


def write_texts(build: Path, out: Path) -> dict[str, list[str]]:
    """Write calibration.txt and evaluation.txt, documents parted by an empty line; return the paths used in each."""
    used = {}
    for split, size in TEXT_BYTES.items():
        chosen = choose_documents(read_split(build, split), size)
        (out / f"{split}.txt").write_bytes("\n".join(d.text for d in chosen).encode())
        used[f"{split}.txt"] = [d.path for d in chosen]
    return used


def write_model(build: Path, out: Path) -> dict[str, Any]:
    """Write the weights in BF16 with their configuration and tokenizer; return what the checkpoint says of the run."""
    checkpoint = build / "checkpoint.pt"
    if not checkpoint.exists():
        raise CorpusError(f"{checkpoint} is missing: run 'python train/train.py' first.")
    state = torch.load(checkpoint, weights_only=True)
    model = make_model()
    model.load_state_dict(state["model"])
    model = model.to(torch.bfloat16)
    model.generation_config = GenerationConfig(bos_token_id=BOS_ID, eos_token_id=EOS_ID)
    model.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=train_tokenizer(build),
        bos_token=BOS,
        eos_token=EOS,
        model_max_length=model.config.max_position_embeddings,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.save_pretrained(out)
    run = state["run"]
    tokens, available = run["curve"][-1]["tokens"], len(np.load(build / "train_rows.npy", mmap_mode="r")) * LENGTH
    (out / "loss.jsonl").write_text("".join(json.dumps(point) + "\n" for point in run["curve"]), encoding="utf-8")
    return {
        "parameters": model.num_parameters(),
        "layers": model.config.num_hidden_layers,
        "hidden": model.config.hidden_size,
        "vocabulary": model.config.vocab_size,
        "steps": run["step"],
        "tokens": tokens,
        "available_tokens": available,
        "passes": round(tokens / available, 2),
        "row_tokens": LENGTH,
        "seed": SEED,
        "minutes": round(run["seconds"] / 60, 1),
        "final_held_out_loss": run["curve"][-1]["held_out_loss"],
    }


@torch.no_grad()
def make_samples(out: Path) -> dict[str, str]:
    """Return a greedy and a sampled continuation of PROMPT by the exported model, in float32."""
    tokenizer = AutoTokenizer.from_pretrained(out)
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    inputs = tokenizer(PROMPT, return_tensors="pt")
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    common = {"attention_mask": mask, "max_new_tokens": SAMPLE_TOKENS, "pad_token_id": EOS_ID}
    greedy = model.generate(ids, do_sample=False, **common)
    torch.manual_seed(SEED)
    sampled = model.generate(ids, do_sample=True, temperature=0.8, top_k=40, **common)
    return {
        "prompt": PROMPT,
        "greedy": tokenizer.decode(greedy[0], skip_special_tokens=True),
        "sampled": tokenizer.decode(sampled[0], skip_special_tokens=True),
    }


def export(build: Path, out: Path) -> None:
    """Write the whole folder `out` anew."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    facts: dict[str, Any] = {"training": write_model(build, out)}
    shipped = write_texts(build, out)
    facts["corpus"] = json.loads((HERE / "corpus.lock.json").read_text(encoding="utf-8"))
    facts["texts"] = {
        name: {"files": len(paths), "bytes": (out / name).stat().st_size} for name, paths in shipped.items()
    }
    facts["evaluation"] = evaluate(out, build)
    facts["samples"] = make_samples(out)
    trained = [d.path for d in read_split(build, "train")]
    licences = render_licences(read_pins(HERE / "corpus.txt"), build, shipped, trained)
    (out / "LICENSES.md").write_text(licences, encoding="utf-8")
    draw_curve(out)
    (out / "training.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    (out / "README.md").write_text(render_card(facts), encoding="utf-8")


def main() -> int:
    """Parse the command line and export."""
    parser = argparse.ArgumentParser(description="Write the bundled model folder from the last checkpoint.")
    parser.add_argument("--out", type=Path, default=DEFAULT_MODEL, help="folder to write anew")
    parser.add_argument("--build", type=Path, default=HERE / "build", help="folder of the corpus and checkpoints")
    arguments = parser.parse_args()
    try:
        export(arguments.build, arguments.out)
    except CorpusError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"wrote {arguments.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
