# Shapes: T tokens of a window, V vocabulary.
"""How good a model is on a text, and how far it is from another one: perplexity, KL divergence, agreement."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from duotone.calibrate.data import TokenWindows, draw_windows
from duotone.calibrate.pairs import ImageTextPairs, draw_samples, holds_images, predicted_of
from duotone.calibrate.sources import parse_sources
from duotone.checkpoint.hub import locate_model
from duotone.device import resolve_device
from duotone.errors import DuotoneError
from duotone.models.skeleton import check_causal
from duotone.models.tokenizer import check_tokens, load_tokenizer
from duotone.models.vision import image_tokens
from duotone.runtime.load import load

#: (windows done, windows in all)
Progress = Callable[[int, int], None]
#: Logits of one pass: tokens times vocabulary in float32 stay near 256 MB.
_BATCH_LOGITS = 64 * 1024 * 1024


@dataclass(frozen=True)
class Evaluation:
    """Figures over all predicted tokens.

    perplexity: exp of the mean negative log-likelihood. bits_per_byte: the same in bits over the UTF-8 bytes of the text.
    kl: mean KL(reference || model) in nats a token; kl_stderr: its standard error, windows taken as the independent units.
    top1_agreement: share of positions where both models' likeliest token is the same. The last three need a reference.
    """

    perplexity: float
    bits_per_byte: float
    tokens: int
    kl: float | None = None
    kl_stderr: float | None = None
    top1_agreement: float | None = None
    reference_perplexity: float | None = None
    nll_difference: float | None = None
    nll_difference_stderr: float | None = None


def evaluate(
    model: str | Path,
    text: Sequence[str],
    *,
    reference: str | Path | None = None,
    seq_len: int = 512,
    samples: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "auto",
    progress: Progress | None = None,
) -> Evaluation:
    """Measure a model folder on text files, against a reference model if one is given; one that sees, on images with text.

    dtype: of everything but the quantized linears; float32 leaves quantization as the only difference. samples: windows
    drawn in equal shares from the texts, all of them when None. Raises DuotoneError for a missing file, a text shorter than
    one window, or a reference with another vocabulary.
    """
    folder = locate_model(model)
    quantized = load(folder, dtype, device)
    check_causal(quantized, "perplexity")
    if any(map(holds_images, parse_sources(text))):
        windows = draw_samples(folder, text, seq_len, samples, 0, image_tokens(quantized))
        check_windows(windows, seq_len, quantized, folder)
    else:
        windows = windows_for(folder, quantized, load_tokenizer(folder), text, seq_len, samples)
    original = None if reference is None else load(locate_model(reference), dtype, device)
    return evaluate_windows(quantized, windows, original, resolve_device(device), progress)


def windows_for(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: Sequence[str],
    seq_len: int,
    samples: int | None,
) -> TokenWindows:
    """The windows that a model is measured on. Raises DuotoneError for text that is too short, or that it cannot read."""
    windows = draw_windows(tokenizer, text, seq_len, samples, seed=0)
    check_windows(windows, seq_len, model, folder)
    return windows


def check_windows(windows: TokenWindows | ImageTextPairs, seq_len: int, model: PreTrainedModel, folder: Path) -> None:
    """Raise DuotoneError for tokens that the model does not know, and more of them than it can look back on."""
    check_tokens(windows.tokens, model, folder)
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", seq_len)
    if seq_len > limit:
        raise DuotoneError(f"--seq-len: found {seq_len}, expected at most the model's max_position_embeddings, {limit}")


@dataclass(frozen=True, eq=False)
class WindowScores:
    """Figures of each window, float64 [W]: the independent units of every standard error.

    nll: mean negative log-likelihood. Against a reference: mean KL, the share of equal likeliest tokens, the reference's nll.
    predicted: tokens of each, where they have different many.
    """

    nll: Tensor
    kl: Tensor | None = None
    agreement: Tensor | None = None
    reference_nll: Tensor | None = None
    predicted: Tensor | None = None


def evaluate_windows(
    model: PreTrainedModel,
    windows: TokenWindows | ImageTextPairs,
    reference: PreTrainedModel | None,
    device: torch.device,
    progress: Progress | None = None,
) -> Evaluation:
    """Measure a loaded model on token windows, or on images with text; see `evaluate`."""
    return summarize(score_windows(model, windows, reference, device, progress), windows)


@torch.no_grad()
def score_windows(
    model: PreTrainedModel,
    windows: TokenWindows | ImageTextPairs,
    reference: PreTrainedModel | None,
    device: torch.device,
    progress: Progress | None = None,
) -> WindowScores:
    """The figures of each window. Raises DuotoneError for another vocabulary, or likelihoods that are not finite."""
    vocabulary = model.config.get_text_config().vocab_size
    if reference is not None and reference.config.get_text_config().vocab_size != vocabulary:
        found = reference.config.get_text_config().vocab_size
        raise DuotoneError(f"--reference: has a vocabulary of {found}, expected {vocabulary} as in the model")
    nll_W, kl_W, agree_W, reference_nll_W, predicted_W = ([] for _ in range(5))
    sees, done = image_tokens(model), 0
    for batch in _batches(windows, vocabulary):
        inputs = {name: tensor.to(device) for name, tensor in batch.items()}
        tokens = inputs["input_ids"]
        which = predicted_of(tokens, sees) if isinstance(windows, ImageTextPairs) else None
        mean = _mean_over(which)
        logp = _log_probabilities(model, inputs)
        nll_W.append(mean(_nll(logp, tokens)))
        if which is not None:
            predicted_W.append(which.sum(-1))
        if reference is not None:
            logq = _log_probabilities(reference, inputs)
            reference_nll_W.append(mean(_nll(logq, tokens)))
            kl_W.append(mean((logq.exp() * (logq - logp)).sum(-1).double()))
            agree_W.append(mean((logp.argmax(-1) == logq.argmax(-1)).double()))
        done += len(tokens)
        if progress is not None:
            progress(done, len(windows))
    nll, predicted = torch.cat(nll_W).cpu(), torch.cat(predicted_W).cpu() if predicted_W else None
    if not bool(torch.isfinite(nll).all()):
        raise DuotoneError("the model gives NaN or infinite likelihoods on this text, expected finite ones")
    if reference is None:
        return WindowScores(nll, predicted=predicted)
    kl, agreement, reference_nll = (torch.cat(part).cpu() for part in (kl_W, agree_W, reference_nll_W))
    return WindowScores(nll, kl, agreement, reference_nll, predicted)


def _batches(windows: TokenWindows | ImageTextPairs, vocabulary: int) -> list[dict[str, Tensor]]:
    """The inputs of forward passes whose logits have a size that fits."""
    if isinstance(windows, ImageTextPairs):
        return windows.batches()
    batch = max(1, _BATCH_LOGITS // (vocabulary * windows.tokens.shape[1]))
    return [{"input_ids": tokens} for tokens in windows.tokens.split(batch)]


def _mean_over(which: Tensor | None) -> Callable[[Tensor], Tensor]:
    """The mean of each window's values [W, T - 1], of all or of those that count."""
    return lambda values_WT: values_WT.mean(-1) if which is None else (values_WT * which).sum(-1) / which.sum(-1)


def summarize(scores: WindowScores, windows: TokenWindows | ImageTextPairs) -> Evaluation:
    """Means over all predicted tokens, with their standard errors."""
    counts = scores.predicted
    if counts is None:
        counts = torch.full_like(scores.nll, windows.tokens.shape[1] - 1)
    predicted = int(counts.sum())
    nll = _mean(scores.nll, scores.predicted)
    result = Evaluation(
        perplexity=math.exp(nll),
        bits_per_byte=nll * predicted / math.log(2) / max(1, windows.text_bytes),
        tokens=predicted,
    )
    if scores.kl is None or scores.agreement is None or scores.reference_nll is None:
        return result
    difference = scores.nll - scores.reference_nll
    return replace(
        result,
        kl=_mean(scores.kl, scores.predicted),
        kl_stderr=standard_error(scores.kl, scores.predicted),
        top1_agreement=_mean(scores.agreement, scores.predicted),
        reference_perplexity=math.exp(_mean(scores.reference_nll, scores.predicted)),
        nll_difference=_mean(difference, scores.predicted),
        nll_difference_stderr=standard_error(difference, scores.predicted),
    )


def _log_probabilities(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    """Float32 log-probabilities of the token after each position, [windows, T - 1, V]."""
    logits = model(**inputs, use_cache=False).logits[:, :-1]
    return torch.log_softmax(logits.float(), dim=-1)


def _nll(logp: Tensor, tokens: Tensor) -> Tensor:
    """Negative log-likelihood of each token but the first in nats, float64 [windows, T - 1]."""
    return -logp.gather(-1, tokens[:, 1:, None]).squeeze(-1).double()


def _mean(values: Tensor, counts: Tensor | None) -> float:
    """Of windows that are means themselves, of as many tokens each; None: of equally many."""
    return float(values.mean() if counts is None else (values * counts).sum() / counts.sum())


def standard_error(values: Tensor, counts: Tensor | None = None) -> float | None:
    """Of the mean of independent values [n], of the ratio of sums where each is a mean of its own count of tokens [n].

    None for a single one, which has no spread to measure.
    """
    n = len(values)
    if n < 2:
        return None
    if counts is None:
        return float(values.double().std() / math.sqrt(n))
    residual = counts * (values.double() - _mean(values, counts))
    return float(residual.std() * math.sqrt(n) / counts.sum())
