"""Draw the loss curve and write the model card; every number in it comes from training.json's facts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

SMOOTHING_STEPS = 20  # the drawn training loss is the mean of this many steps

CARD = """# duotone-10m

A small Llama-layout language model of {parameters:,} parameters, trained from scratch on the documentation and source
of well-known Python packages. It exists so that quantization can be tried and tested offline in seconds: it writes
plausible reStructuredText and Python, and knows nothing reliable. Do not use it for answers.

This file is written by `train/card.py`; its numbers come from `training.json`.

| | |
|---|---|
| Layout | `LlamaForCausalLM`, {layers} layers, hidden size {hidden}, tied embeddings |
| Weights | BF16, safetensors |
| Vocabulary | {vocabulary} byte-level BPE tokens; a plain tokenizer call puts `<s>` first |
| Training | {steps} steps in float32, {tokens:,} tokens in rows of {row_tokens}, seed {seed} |
| Share of data | {passes:.2f} passes over the {available_tokens:,} tokens of the training split |
| Time | {minutes} minutes over all steps, on two processor cores shared with other work |

## Held-out quality

Measured in float32 from the stored BF16 weights on `evaluation.txt` ({eval_bytes:,} bytes, {eval_tokens:,} tokens), in
windows of {window} tokens that begin with `<s>`. The baseline predicts every token by its frequency in the training
split. `train/evaluate.py` prints the same numbers.

| | Perplexity per token | Bits per byte |
|---|---|---|
| duotone-10m | {model_ppl:.2f} | {model_bpb:.3f} |
| Unigram baseline | {unigram_ppl:.2f} | {unigram_bpb:.3f} |

![Loss curve](loss.png)

## Data

Text under BSD, MIT and PSF-style licences from pinned source distributions (`train/corpus.txt`), split by
file through a hash of its path. Exact copies and long paragraphs repeated from another file are removed before the
split, so that no split holds a copy of another's text.

| Split | Files | Bytes |
|---|---|---|
{split_rows}

The folder ships whole files from the two held-out splits: `calibration.txt` ({cal_files} files, {cal_bytes:,} bytes)
and `evaluation.txt` ({eval_files} files, {eval_bytes:,} bytes). No weight was trained on either; the held-out
curve uses the calibration split, and nothing was chosen by looking at the evaluation split. `LICENSES.md` names every
package with its licence and copyright notice.

## Samples

Prompt: `{prompt}`. Greedy:

```text
{greedy}
```

Sampled (temperature 0.8, top 40, seed {seed}):

```text
{sampled}
```

## Reproduce

With the packages of `train/requirements.txt` installed, from the root of the repository:

```sh
python train/corpus.py   # downloads the pinned archives, builds and checks the three splits
python train/train.py    # trains {steps} steps, then writes this folder
```

The data, their order and the initial weights are fixed. Floating-point sums depend on the processor and on the number
of threads, so another machine gives close but not bit-identical weights.
"""


def render_card(facts: dict[str, Any]) -> str:
    """Return README.md from the facts that training.json holds."""
    evaluation, texts, samples = facts["evaluation"], facts["texts"], facts["samples"]
    split_rows = "\n".join(f"| {name} | {s['files']:,} | {s['bytes']:,} |" for name, s in facts["corpus"].items())
    return CARD.format(
        **facts["training"],
        eval_bytes=evaluation["bytes"],
        eval_tokens=evaluation["tokens"],
        window=evaluation["window_tokens"],
        model_ppl=evaluation["model"]["perplexity"],
        model_bpb=evaluation["model"]["bits_per_byte"],
        unigram_ppl=evaluation["unigram"]["perplexity"],
        unigram_bpb=evaluation["unigram"]["bits_per_byte"],
        split_rows=split_rows,
        cal_files=texts["calibration.txt"]["files"],
        cal_bytes=texts["calibration.txt"]["bytes"],
        eval_files=texts["evaluation.txt"]["files"],
        prompt=samples["prompt"],
        greedy=_fenced(samples["greedy"]),
        sampled=_fenced(samples["sampled"]),
    )


def _fenced(text: str) -> str:
    """Make generated text safe inside a fenced block."""
    return "\n".join(line.rstrip() for line in text.replace("```", "'''").strip().split("\n"))


def draw_curve(folder: Path) -> None:
    """Draw loss.png in `folder` from its loss.jsonl."""
    points = [json.loads(line) for line in (folder / "loss.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = [point["loss"] for point in points]
    recent = [losses[max(0, end - SMOOTHING_STEPS) : end] for end in range(1, len(losses) + 1)]
    smooth = [sum(values) / len(values) for values in recent]
    millions = [point["tokens"] / 1e6 for point in points]
    held_out = [(p["tokens"] / 1e6, p["held_out_loss"]) for p in points if "held_out_loss" in p]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(millions, losses, color="#9db8d2", linewidth=0.7, label="training, per step")
    axes.plot(millions, smooth, color="#1f5a92", linewidth=1.6, label="training, smoothed")
    axes.plot(*zip(*held_out, strict=True), color="#c8551b", marker="o", markersize=3, label="held out")
    axes.set(xlabel="training tokens (millions)", ylabel="loss (nats per token)", ylim=(None, 9))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(folder / "loss.png", dpi=130)
