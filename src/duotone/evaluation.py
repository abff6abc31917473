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
from duotone.checkpoint.hub import locate_model
from duotone.device import resolve_device
from duotone.errors import DuotoneError
from duotone.models.skeleton import check_causal
from duotone.models.tokenizer import check_tokens, load_tokenizer
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
    """Measure a model folder on text files, against a reference model if one is given.

    dtype: of everything but the quantized linears; float32 leaves quantization as the only difference. samples: windows
    drawn in equal shares from the texts, all of them when None. Raises DuotoneError for a missing file, a text shorter than
    one window, or a reference with another vocabulary.
    """
    folder = locate_model(model)
    quantized = load(folder, dtype, device)
    check_causal(quantized, "perplexity")
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
    check_tokens(windows.tokens, model, folder)
    limit = getattr(model.config, "max_position_embeddings", seq_len)
    if seq_len > limit:
        raise DuotoneError(f"--seq-len: found {seq_len}, expected at most the model's max_position_embeddings, {limit}")
    return windows


@dataclass(frozen=True, eq=False)
class WindowScores:
    """Figures of each window, float64 [W]: the independent units of every standard error.

    nll: mean negative log-likelihood. Against a reference: mean KL, the share of equal likeliest tokens, the reference's nll.
    """

    nll: Tensor
    kl: Tensor | None = None
    agreement: Tensor | None = None
    reference_nll: Tensor | None = None


def evaluate_windows(
    model: PreTrainedModel,
    windows: TokenWindows,
    reference: PreTrainedModel | None,
    device: torch.device,
    progress: Progress | None = None,
) -> Evaluation:
    """Measure a loaded model on token windows; see `evaluate`."""
    return summarize(score_windows(model, windows, reference, device, progress), windows)


@torch.no_grad()
def score_windows(
    model: PreTrainedModel,
    windows: TokenWindows,
    reference: PreTrainedModel | None,
    device: torch.device,
    progress: Progress | None = None,
) -> WindowScores:
    """The figures of each window. Raises DuotoneError for another vocabulary, or likelihoods that are not finite."""
    vocabulary = model.config.vocab_size
    if reference is not None and reference.config.vocab_size != vocabulary:
        raise DuotoneError(
            f"--reference: has a vocabulary of {reference.config.vocab_size}, expected {vocabulary} as in the model"
        )
    count, length = windows.tokens.shape
    batch = max(1, _BATCH_LOGITS // (vocabulary * length))
    nll_W, kl_W, agree_W, reference_nll_W = ([] for _ in range(4))
    for tokens in windows.tokens.split(batch):
        tokens = tokens.to(device)
        logp = _log_probabilities(model, tokens)
        nll_W.append(_nll(logp, tokens))
        if reference is not None:
            logq = _log_probabilities(reference, tokens)
            reference_nll_W.append(_nll(logq, tokens))
            kl_W.append((logq.exp() * (logq - logp)).sum(-1).double().mean(-1))
            agree_W.append((logp.argmax(-1) == logq.argmax(-1)).double().mean(-1))
        if progress is not None:
            progress(min(len(nll_W) * batch, count), count)
    nll = torch.cat(nll_W).cpu()
    if not bool(torch.isfinite(nll).all()):
        raise DuotoneError("the model gives NaN or infinite likelihoods on this text, expected finite ones")
    if reference is None:
        return WindowScores(nll)
    return WindowScores(nll, torch.cat(kl_W).cpu(), torch.cat(agree_W).cpu(), torch.cat(reference_nll_W).cpu())


def summarize(scores: WindowScores, windows: TokenWindows) -> Evaluation:
    """Means over all windows, with their standard errors."""
    predicted = scores.nll.numel() * (windows.tokens.shape[1] - 1)
    result = Evaluation(
        perplexity=math.exp(float(scores.nll.mean())),
        bits_per_byte=float(scores.nll.mean()) * predicted / math.log(2) / windows.text_bytes,
        tokens=predicted,
    )
    if scores.kl is None or scores.agreement is None or scores.reference_nll is None:
        return result
    difference = scores.nll - scores.reference_nll
    return replace(
        result,
        kl=float(scores.kl.mean()),
        kl_stderr=standard_error(scores.kl),
        top1_agreement=float(scores.agreement.mean()),
        reference_perplexity=math.exp(float(scores.reference_nll.mean())),
        nll_difference=float(difference.mean()),
        nll_difference_stderr=standard_error(difference),
    )


def _log_probabilities(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """Float32 log-probabilities of the token after each position, [windows, T - 1, V]."""
    logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
    return torch.log_softmax(logits.float(), dim=-1)


def _nll(logp: Tensor, tokens: Tensor) -> Tensor:
    """Mean negative log-likelihood of each window in nats, float64."""
    return -logp.gather(-1, tokens[:, 1:, None]).squeeze(-1).double().mean(-1)


def standard_error(values: Tensor) -> float | None:
    """Of the mean of independent values [n]; None for a single one, which has no spread to measure."""
    if len(values) < 2:
        return None
    return float(values.double().std() / math.sqrt(len(values)))
