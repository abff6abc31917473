"""Train the bundled model in float32 on the processor: `--steps N` exactly, or as many steps as fit `--minutes M`.

Usage: python train/train.py [--steps N | --minutes M] [--resume]
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from transformers import LlamaForCausalLM

from corpus import HERE, CorpusError, read_split
from model import LENGTH, SEED, make_model
from optimizer import WARMUP_STEPS, decay_start, learning_rate_factor, make_optimizers, steps_for_decay_at
from tokenizer import rows, token_stream, train_tokenizer

DEFAULT_STEPS = 546
ROWS_PER_STEP = 16  # 8192 tokens per step
ROWS_AT_ONCE = 4  # a micro-batch whose logits still fit well in memory caches
HELD_OUT_ROWS = 32
HELD_OUT_EVERY = 50  # steps
CHECKPOINT_EVERY = 50  # steps
# With --minutes, this share of the remaining time is planned for; the rest is slack for other work on the machine.
PLANNED_SHARE = 0.97


Optimizers = list[torch.optim.Optimizer]


@dataclass
class Run:
    """What a checkpoint has to hold besides weights: progress, seconds spent, and the curve so far."""

    step: int = 0
    seconds: float = 0.0
    steps: int | None = None
    curve: list[dict[str, float]] = field(default_factory=list)


def training_rows(build: Path) -> np.ndarray:
    """Return all training rows in a fixed shuffled order, cached under `build`."""
    cache = build / "train_rows.npy"
    if cache.exists():
        return np.load(cache)
    generator = np.random.default_rng(SEED)
    texts = [d.text for d in read_split(build, "train")]
    order = generator.permutation(len(texts))
    table = rows(token_stream(train_tokenizer(build), [texts[i] for i in order]), LENGTH)
    table = table[generator.permutation(len(table))]
    np.save(cache, table.astype(np.uint16))
    return np.load(cache)


def held_out_rows(build: Path) -> np.ndarray:
    """Return a few rows spread over the calibration split; the evaluation split stays untouched while training."""
    texts = [d.text for d in read_split(build, "calibration")]
    table = rows(token_stream(train_tokenizer(build), texts), LENGTH)
    return table[:: max(1, len(table) // HELD_OUT_ROWS)][:HELD_OUT_ROWS]


def loss_of(model: LlamaForCausalLM, table: np.ndarray) -> torch.Tensor:
    """Return the mean loss, in nats per token, of one micro-batch of rows."""
    batch = torch.from_numpy(table.astype(np.int64))
    logits = model(input_ids=batch[:, :-1], use_cache=False).logits
    return cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, table: np.ndarray) -> float:
    """Return the mean loss, in nats per token, over the held-out rows."""
    parts = [table[i : i + ROWS_AT_ONCE] for i in range(0, len(table), ROWS_AT_ONCE)]
    return sum(loss_of(model, part).item() * len(part) for part in parts) / len(table)


def training_step(model: LlamaForCausalLM, optimizers: Optimizers, table: np.ndarray, run: Run) -> float:
    """Take one optimizer step and return its loss in nats per token."""
    chosen = np.arange(run.step * ROWS_PER_STEP, (run.step + 1) * ROWS_PER_STEP) % len(table)
    total = 0.0
    for start in range(0, ROWS_PER_STEP, ROWS_AT_ONCE):
        loss = loss_of(model, table[chosen[start : start + ROWS_AT_ONCE]]) * (ROWS_AT_ONCE / ROWS_PER_STEP)
        loss.backward()
        total += loss.item()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    factor = learning_rate_factor(run.step, run.steps)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return total


def plan(run: Run, seconds_allowed: float, recent: list[float]) -> None:
    """Fix the run length once the time left is just enough for the decay, judged by the latest step times."""
    pace = sum(recent) / len(recent)
    fitting = run.step + (seconds_allowed - run.seconds) * PLANNED_SHARE / pace
    if run.step >= WARMUP_STEPS and run.step >= decay_start(int(fitting)):
        run.steps = steps_for_decay_at(run.step)
        print(f"decay from step {run.step} to step {run.steps}", flush=True)


def save_checkpoint(path: Path, model: LlamaForCausalLM, optimizers: Optimizers, run: Run) -> None:
    """Write everything a resumed run needs; the rename keeps the old checkpoint whole until the new one is."""
    state = {"model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers], "run": vars(run)}
    torch.save(state, path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)


def train(build: Path, steps: int | None, minutes: float | None, resume: bool) -> Run:
    """Run the whole training and leave `checkpoint.pt` and `loss.jsonl` under `build`."""
    table, held_out = training_rows(build), held_out_rows(build)
    model = make_model()
    optimizers = make_optimizers(model)
    run = Run(steps=steps)
    checkpoint = build / "checkpoint.pt"
    if resume and checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        run = Run(**state["run"])
        # A run length that was already fixed stays, because the decay may have begun.
        run.steps = run.steps or steps
    print(f"{model.num_parameters()} parameters, {len(table) * LENGTH} tokens, {torch.get_num_threads()} threads")
    recent: list[float] = []
    while run.steps is None or run.step < run.steps:
        begun = time.perf_counter()
        loss = training_step(model, optimizers, table, run)
        run.step += 1
        tokens = run.step * ROWS_PER_STEP * LENGTH
        point: dict[str, float] = {"step": run.step, "tokens": tokens, "loss": round(loss, 4)}
        if run.step % HELD_OUT_EVERY == 0 or run.step == run.steps:
            point["held_out_loss"] = round(held_out_loss(model, held_out), 4)
        seconds = time.perf_counter() - begun
        run.seconds += seconds
        recent = [*recent[-29:], seconds]
        run.curve.append(point)
        if run.steps is None and minutes is not None:
            plan(run, minutes * 60, recent)
        if run.step % CHECKPOINT_EVERY == 0 or run.step == run.steps:
            save_checkpoint(checkpoint, model, optimizers, run)
        if run.step % 10 == 0 or run.step <= 3:
            print(json.dumps({**point, "seconds": round(run.seconds, 1)}), flush=True)
    (build / "loss.jsonl").write_text("".join(json.dumps(p) + "\n" for p in run.curve), encoding="utf-8")
    return run


def export_folder(build: Path) -> None:
    """Write the model folder from the last checkpoint."""
    # Imported here because drawing and evaluation are of no use while training.
    from evaluate import DEFAULT_MODEL
    from export import export

    export(build, DEFAULT_MODEL)


def main() -> int:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description="Train the bundled model in float32 on the processor.")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, help=f"exact number of steps (default: {DEFAULT_STEPS})")
    length.add_argument("--minutes", type=float, help="choose the number of steps so that training ends in time")
    parser.add_argument("--resume", action="store_true", help="continue from the last checkpoint")
    parser.add_argument("--build", type=Path, default=HERE / "build", help="folder of the corpus and checkpoints")
    parser.add_argument("--no-export", action="store_true", help="do not write assets/duotone-10m at the end")
    arguments = parser.parse_args()
    steps = arguments.steps if arguments.minutes is None else None
    if arguments.minutes is None and steps is None:
        steps = DEFAULT_STEPS
    try:
        run = train(arguments.build, steps, arguments.minutes, arguments.resume)
        print(f"{run.step} steps in {run.seconds / 60:.1f} minutes")
        if not arguments.no_export:
            export_folder(arguments.build)
    except CorpusError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
