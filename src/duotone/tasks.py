# Shapes: B sequences of a batch, T tokens, V vocabulary, S sentences, D embedding width.
"""Evaluations beyond perplexity, on loaded models: multiple choice by likelihood, and how true sentence embeddings stay."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from duotone.calibrate.data import first_token
from duotone.errors import DuotoneError
from duotone.evaluation import standard_error
from duotone.models.skeleton import check_causal
from duotone.models.tokenizer import check_tokens
from duotone.questions import Item

#: Logits of one pass: padded tokens times vocabulary in float32 stay near 256 MB.
_BATCH_LOGITS = 64 * 1024 * 1024
#: Padded tokens of one pass at most: beyond it no machine gets faster.
_BATCH_TOKENS = 8192
#: Sentences whose similarities to all others are ranked at a time.
_RANKED_ROWS = 256


@dataclass(frozen=True)
class TaskResult:
    """Share of items whose true choice is the likeliest, its standard error, and each item's outcome.

    accuracy_norm and what follows: the same with the log-likelihood divided by the choice's UTF-8 bytes, its leading blank
    not counted.
    """

    accuracy: float
    stderr: float
    correct: tuple[bool, ...]
    accuracy_norm: float
    stderr_norm: float
    correct_norm: tuple[bool, ...]


@dataclass(frozen=True)
class Answers:
    """What a model made of a task: one figure with its standard error, and each item's outcome where the figure is their mean.

    by: who put it, duotone or lm-eval. metric: what the figure is. is_share: of items that were right.
    """

    task: str
    by: str
    metric: str
    is_share: bool
    items: int
    value: float
    stderr: float | None
    outcomes: tuple[float, ...]


@dataclass(frozen=True)
class EmbeddingResult:
    """How far a model's sentence embeddings are from a reference's, each figure with its standard error over sentences.

    relative_error: sum |e - e0|^2 / sum |e0|^2. cosine: mean of e . e0. rank_correlation: for each sentence, Spearman's
    correlation of its similarities to all others under the two models. neighbor_agreement: share of sentences whose
    nearest other sentence is the same.
    """

    sentences: int
    relative_error: float
    relative_error_stderr: float
    cosine: float
    cosine_stderr: float
    rank_correlation: float
    rank_correlation_stderr: float
    neighbor_agreement: float
    neighbor_agreement_stderr: float


def fits_context(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Callable[[Item], bool]:
    """Whether all of an item's choices, behind its context, fit into what the model can read."""
    limit = _context_limit(model)
    begin = len(first_token(tokenizer))
    return lambda item: all(begin + len(_tokens(tokenizer, item.context + choice)) <= limit for choice in item.choices)


def multiple_choice(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, items: Sequence[Item], device: torch.device | str
) -> TaskResult:
    """Score a causal model by the likelihood of each choice behind its context; of equally likely ones the first counts.

    Raises DuotoneError for fewer than two items (no standard error), an item whose label names no choice or whose context
    or choice gives no token, or one longer than the model reads.
    """
    check_causal(model, "multiple choice")
    if len(items) < 2:
        raise DuotoneError(f"items: found {len(items)}, expected at least 2 questions")
    sequences = [sequence for i, item in enumerate(items) for sequence in _sequences(model, tokenizer, f"items[{i}]", item)]
    _check_known([ids for ids, _ in sequences], model, tokenizer)
    scores = iter(_log_likelihoods(model, sequences, device))
    correct: list[bool] = []
    correct_norm: list[bool] = []
    for item in items:
        sums = [next(scores) for _ in item.choices]
        means = [score / len(choice.lstrip().encode()) for score, choice in zip(sums, item.choices, strict=True)]
        correct.append(sums.index(max(sums)) == item.label)
        correct_norm.append(means.index(max(means)) == item.label)
    accuracy, stderr = _mean_and_error(torch.tensor(correct))
    accuracy_norm, stderr_norm = _mean_and_error(torch.tensor(correct_norm))
    return TaskResult(accuracy, stderr, tuple(correct), accuracy_norm, stderr_norm, tuple(correct_norm))


def embedding_fidelity(
    model: PreTrainedModel,
    reference: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sentences: Sequence[str],
    device: torch.device | str,
) -> EmbeddingResult:
    """Compare two encoders by their sentence embeddings; see `EmbeddingResult` and `embed`.

    Raises DuotoneError for fewer than three sentences (a rank needs two others), or models of different width.
    """
    if len(sentences) < 3:
        raise DuotoneError(f"sentences: found {len(sentences)}, expected at least 3: each is ranked among the others")
    e_SD, e0_SD = (embed(encoder, tokenizer, sentences, device) for encoder in (model, reference))
    if e_SD.shape != e0_SD.shape:
        raise DuotoneError(f"the reference's embeddings have {e0_SD.shape[1]} values, expected {e_SD.shape[1]} as the model's")
    rho_S, agree_S = (torch.cat(parts) for parts in zip(*_rank_agreement(e_SD, e0_SD), strict=True))
    if not bool(torch.isfinite(rho_S).all()):
        raise DuotoneError("the sentences are all equally similar to one of them, expected some that can be ranked")
    return EmbeddingResult(
        len(sentences),
        # Embeddings have length 1: the ratio of the two sums is the mean of the squared distances.
        *_mean_and_error((e_SD - e0_SD).square().sum(-1)),
        *_mean_and_error((e_SD * e0_SD).sum(-1)),
        *_mean_and_error(rho_S),
        *_mean_and_error(agree_S),
    )


@torch.no_grad()
def embed(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sentences: Sequence[str], device: torch.device | str
) -> Tensor:
    """Sentence embeddings as all-MiniLM-L6-v2 makes them: the mean of the last hidden states, scaled to length 1.

    Float64 [S, D] on the CPU. A sentence longer than the model reads is cut. Raises DuotoneError for one without a token.
    """
    # Not verbose: that a sentence is cut is no news worth a warning each time.
    encoded = tokenizer(list(sentences), truncation=True, max_length=_context_limit(model), verbose=False)["input_ids"]
    for i, ids in enumerate(encoded):
        if not ids:
            raise DuotoneError(f"sentences[{i}]: {sentences[i]!r} gives no token, expected some text")
    _check_known(encoded, model, tokenizer)
    padding = cast("int | None", tokenizer.pad_token_id) or 0
    rows: dict[int, Tensor] = {}
    for members in _batches([len(ids) for ids in encoded], _BATCH_TOKENS):
        tokens_BT, mask_BT = _pad([encoded[i] for i in members], padding, device)
        output = model(input_ids=tokens_BT, attention_mask=mask_BT)
        if not hasattr(output, "last_hidden_state"):
            raise DuotoneError(f"{type(model).__name__}: gives no last_hidden_state, expected an encoder such as BertModel")
        weight_BT1 = mask_BT[:, :, None].double()
        mean_BD = (output.last_hidden_state.double() * weight_BT1).sum(1) / weight_BT1.sum(1)
        rows |= dict(zip(members, torch.nn.functional.normalize(mean_BD, dim=-1).cpu(), strict=True))
    e_SD = torch.stack([rows[i] for i in range(len(encoded))])
    if not bool(torch.isfinite(e_SD).all()):
        raise DuotoneError(f"{type(model).__name__}: gives NaN or infinite embeddings of these sentences, expected finite ones")
    return e_SD


def _sequences(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str, item: Item
) -> Iterator[tuple[list[int], int]]:
    """For each choice all tokens to read, and the position of the first that is scored."""
    if not 0 <= item.label < len(item.choices):
        raise DuotoneError(f"{name}: found the label {item.label}, expected 0 to {len(item.choices) - 1}")
    begin, context, limit = first_token(tokenizer), _tokens(tokenizer, item.context), _context_limit(model)
    for choice in item.choices:
        whole = _tokens(tokenizer, item.context + choice)
        # A token that spans the seam belongs to the choice: only what the context alone would give is not scored.
        pairs = zip(context, whole, strict=False)
        seam = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(context), len(whole)))
        if not choice.strip() or seam == len(whole) or not begin + whole[:seam]:
            raise DuotoneError(f"{name}: its context or its choice {choice!r} gives no token, expected text in both")
        if len(begin) + len(whole) > limit:
            raise DuotoneError(f"{name}: has {len(begin) + len(whole)} tokens, expected at most {limit}, the model's context")
        yield begin + whole, len(begin) + seam


@torch.no_grad()
def _log_likelihoods(
    model: PreTrainedModel, sequences: Sequence[tuple[list[int], int]], device: torch.device | str
) -> list[float]:
    """Of each sequence, the log-probability of the tokens from its given position on, in nats."""
    scores = [math.nan] * len(sequences)
    budget = min(_BATCH_TOKENS, _BATCH_LOGITS // int(model.config.vocab_size))
    for members in _batches([len(ids) for ids, _ in sequences], budget):
        # No mask, and any token for padding: it lies to the right, where a causal model does not look.
        tokens_BT, _ = _pad([sequences[i][0] for i in members], 0, device)
        logits_BTV = model(input_ids=tokens_BT, use_cache=False).logits
        for row, i in enumerate(members):
            ids, start = sequences[i]
            logp = torch.log_softmax(logits_BTV[row, start - 1 : len(ids) - 1].float(), dim=-1)
            scores[i] = float(logp.gather(-1, tokens_BT[row, start : len(ids), None]).double().sum())
    if not all(math.isfinite(score) for score in scores):
        raise DuotoneError("the model gives NaN or infinite likelihoods on these questions, expected finite ones")
    return scores


def _rank_agreement(e_SD: Tensor, e0_SD: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """For runs of sentences: Spearman's correlation of their similarities to all others, and whether the nearest agrees."""
    for rows in torch.arange(len(e_SD)).split(_RANKED_ROWS):
        similarities, similarities0 = _similarities(e_SD, rows), _similarities(e0_SD, rows)
        a, b = _centered_ranks(similarities), _centered_ranks(similarities0)
        rho = (a * b).sum(-1) / (a.square().sum(-1) * b.square().sum(-1)).sqrt()
        yield rho, similarities.argmax(-1) == similarities0.argmax(-1)


def _similarities(e_SD: Tensor, rows: Tensor) -> Tensor:
    """Cosines [rows, S - 1] of some sentences to all others."""
    others = rows[:, None] != torch.arange(len(e_SD))
    # What is equal stays equal: the order in which a product sums must not rank two copies of one sentence.
    return (e_SD[rows] @ e_SD.T).round(decimals=12)[others].view(len(rows), -1)


def _centered_ranks(values: Tensor) -> Tensor:
    """Ranks along the last dimension less their mean; equal values share the mean of their ranks."""
    ordered = values.sort(-1).values
    below = torch.searchsorted(ordered, values)
    up_to = torch.searchsorted(ordered, values, right=True)
    return (below + up_to - values.shape[-1]).double() / 2


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _check_known(sequences: Sequence[list[int]], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise DuotoneError when a token lies beyond the model's embedding table."""
    check_tokens(torch.tensor([max(ids) for ids in sequences]), model, Path(tokenizer.name_or_path))


def _context_limit(model: PreTrainedModel) -> int:
    """Tokens the model can read at once; what no text reaches for a model that sets no limit."""
    return int(getattr(model.config, "max_position_embeddings", 2**31))


def _batches(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Indices of sequences in batches of like length, longest first, each at most `budget` tokens once padded (or one)."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    while order:
        size = max(1, budget // lengths[order[0]])
        yield order[:size]
        order = order[size:]


def _pad(sequences: Sequence[list[int]], padding: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Tokens [B, T] padded on the right, and the mask [B, T] of what is none of that."""
    tokens_BT = torch.full((len(sequences), max(map(len, sequences))), padding)
    mask_BT = torch.zeros_like(tokens_BT)
    for row, ids in enumerate(sequences):
        tokens_BT[row, : len(ids)] = torch.tensor(ids)
        mask_BT[row, : len(ids)] = 1
    return tokens_BT.to(device), mask_BT.to(device)


def _mean_and_error(values: Tensor) -> tuple[float, float]:
    """Mean of independent values, at least two, and its standard error."""
    error = standard_error(values)
    assert error is not None
    return float(values.double().mean()), error
