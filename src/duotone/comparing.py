# Shapes: W windows of a text.
"""Several checkpoints against one original, by one evaluator: how far each is from it, how large, how fast."""

import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from duotone.calibrate.data import TokenWindows
from duotone.card import base_name
from duotone.checkpoint.compressed_tensors import layout_of
from duotone.checkpoint.hub import locate_model
from duotone.checkpoint.prequantized import widened
from duotone.checkpoint.source import open_source
from duotone.converting import import_checkpoint
from duotone.device import resolve_device
from duotone.errors import DuotoneError
from duotone.evaluation import score_windows, summarize, windows_for
from duotone.examining import Examination, TaskFigures, compared
from duotone.models.skeleton import check_causal
from duotone.models.tokenizer import load_tokenizer
from duotone.runtime.load import load
from duotone.tasks import Answers

Progress = Callable[[int, int, str], None]
#: Layouts that the runtime reads; others are imported first.
_READ = ("compressed-tensors", "duotone-gaudi")
#: Of the speed: tokens of the prompt, and tokens that are written after it.
_PROMPT, _WRITTEN = 128, 32


@dataclass(frozen=True)
class Asked:
    """What to compare on. text, tasks: as `duotone eval` takes them; items: the most questions of a task.

    samples: windows of the text; None: all. speed: time a prompt and its continuation too.
    """

    original: str
    text: tuple[str, ...]
    seq_len: int = 512
    samples: int | None = None
    tasks: tuple[str, ...] = ()
    items: int | None = None
    speed: bool = True
    device: str = "auto"


@dataclass(frozen=True)
class Contender:
    """A checkpoint's figures. layout: how it is stored; imported: it was read into ours first, and runs in our arithmetic.

    bits: of all its tensors, for each weight of the original. figures: `evaluation.Evaluation`. tasks: what each gave, against
    the original on the same items. reads, writes: tokens a second here, of a prompt and of what follows; None where not asked
    for. on_front: no other has both fewer bits and a smaller KL.
    """

    name: str
    path: str
    layout: str
    imported: bool
    nbytes: int
    bits: float
    figures: dict[str, Any]
    tasks: list[TaskFigures]
    reads: float | None = None
    writes: float | None = None
    on_front: bool = False


@dataclass(frozen=True, eq=False)
class _Ground:
    """What all are measured on: the original and its number of weights, the windows, the tasks."""

    asked: Asked
    original: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    windows: TokenWindows
    examination: Examination | None
    answers: list[Answers]
    weights: int


def compare(models: Sequence[str], asked: Asked, progress: Progress) -> list[Contender]:
    """Measure checkpoints in turn, then say which ones lie on the front of bits and KL; in the order given.

    Every model runs in float32 but for its quantized linears; speed is that of the dtype it is stored in. Raises DuotoneError
    for fewer than two models, one named twice, and as `evaluate` and `import_checkpoint` do.
    """
    if len(models) < 2:
        raise DuotoneError(f"MODELS: found {len(models)}, expected two or more checkpoints to compare")
    folders = [locate_model(model) for model in models]
    twice = next((model for i, model in enumerate(models) if folders[i].resolve() in {f.resolve() for f in folders[:i]}), None)
    if twice is not None:
        raise DuotoneError(f"MODELS: found {twice} twice, expected each once")
    place = locate_model(asked.original)
    source, tokenizer = widened(open_source(place)), load_tokenizer(place)
    if source.config.get("quantization_config") is not None:
        raise DuotoneError(f"--original: {asked.original} is quantized itself, expected what the checkpoints were made of")
    weights = sum(math.prod(spec.shape) for spec in source.tensors.values())
    examination = Examination(asked.tasks, asked.items) if asked.tasks else None
    original = load(place, torch.float32, asked.device)
    check_causal(original, "comparing")
    windows = windows_for(place, original, tokenizer, asked.text, asked.seq_len, asked.samples)
    device = resolve_device(asked.device)
    answers = examination.put(original, tokenizer, device) if examination is not None else []
    ground = _Ground(asked, original, tokenizer, windows, examination, answers, weights)
    found: list[Contender] = []
    for i, (model, folder) in enumerate(zip(models, folders, strict=True)):
        progress(i, len(models), base_name(model)[0])
        with tempfile.TemporaryDirectory() as scratch:
            found.append(_measured(model, folder, Path(scratch), ground))
    return [replace(one, on_front=not any(_beats(other, one) for other in found)) for one in found]


def _measured(model: str, folder: Path, scratch: Path, ground: _Ground) -> Contender:
    asked, windows = ground.asked, ground.windows
    source, device = open_source(folder), resolve_device(asked.device)
    quantization = source.config.get("quantization_config")
    layout = "dense" if quantization is None else layout_of(quantization)[0]
    imported = quantization is not None and layout not in _READ
    if imported:
        import_checkpoint(model, scratch / "imported", allow_lossy=False)
        folder = scratch / "imported"
    network = load(folder, torch.float32, asked.device)
    figures = asdict(summarize(score_windows(network, windows, ground.original, device), windows))
    answers = ground.examination.put(network, ground.tokenizer, device) if ground.examination is not None else []
    del network
    reads, writes = _speed(folder, windows, asked.device) if asked.speed else (None, None)
    return Contender(
        name=base_name(model)[0].rpartition("/")[2],
        path=model,
        layout=layout,
        imported=imported,
        nbytes=source.weight_bytes,
        bits=8 * source.weight_bytes / ground.weights,
        figures=figures,
        tasks=[compared(*pair) for pair in zip(answers, ground.answers, strict=True)],
        reads=reads,
        writes=writes,
    )


@torch.no_grad()
def _speed(folder: Path, windows: TokenWindows, device: str) -> tuple[float, float]:
    """Tokens a second: of a prompt from the text, and of greedy writing after it; each the best of three."""
    model = load(folder, device=device)
    room = int(getattr(model.config, "max_position_embeddings", _PROMPT + _WRITTEN + 1)) - _WRITTEN - 1
    prompt = windows.tokens[:1, : max(1, min(_PROMPT, room))].to(model.device)
    options: dict[str, Any] = {"attention_mask": torch.ones_like(prompt), "do_sample": False, "pad_token_id": 0}

    def seconds(tokens: int) -> float:
        start = time.perf_counter()
        model.generate(  # pyright: ignore[reportCallIssue]
            input_ids=prompt, max_new_tokens=tokens, min_new_tokens=tokens, **options
        )
        return time.perf_counter() - start

    seconds(1)  # the first call prepares what the others find
    reading = min(seconds(1) for _ in range(3))
    both = min(seconds(1 + _WRITTEN) for _ in range(3))
    return prompt.shape[1] / reading, _WRITTEN / max(both - reading, 1e-9)


def _beats(one: Contender, other: Contender) -> bool:
    """Is one at least as good in both, and better in one?"""
    bits, kl = one.bits - other.bits, one.figures["kl"] - other.figures["kl"]
    return bits <= 0 and kl <= 0 and (bits < 0 or kl < 0)
