# Shapes: T tokens of a window.
"""A checkpoint beside its original: the evaluator's figures, and what both write after the same words."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from duotone.calibrate.data import TokenWindows, first_token
from duotone.calibrate.sources import titles
from duotone.checkpoint.hub import locate_model
from duotone.device import resolve_device
from duotone.errors import DuotoneError
from duotone.evaluation import score_windows, summarize, windows_for
from duotone.models.skeleton import check_causal
from duotone.models.tokenizer import check_tokens, load_tokenizer
from duotone.runtime.load import load

#: Without prompts of the user's, so many are taken from the text, each of so many tokens.
_PROMPTS, _PROMPT_TOKENS = 4, 24
#: What stands for bytes that are not a whole character yet.
_UNFINISHED = "\ufffd"
#: What stands for the token that ends a text, which has no letters.
_END = "⏹"


@dataclass(frozen=True)
class Comparison:
    """What to measure. text: files, as `duotone eval` takes them. prompts: to continue; from the text where there are none.

    original: what the checkpoint was made of; None: the checkpoint alone. samples: windows of the text; None: all of them.
    """

    original: str | None = None
    text: tuple[str, ...] = ()
    prompts: tuple[str, ...] = ()
    seq_len: int = 512
    samples: int | None = None
    new_tokens: int = 48
    device: str = "auto"

    def __post_init__(self) -> None:
        if self.prompts and self.original is None:
            raise DuotoneError("--prompt: found no --original beside it, expected the model whose continuation to compare with")
        if self.original is not None and not (self.text or self.prompts):
            raise DuotoneError("--original: found neither --text nor --prompt beside it, expected what to compare the two on")
        if self.new_tokens < 1:
            raise DuotoneError(f"--new-tokens: found {self.new_tokens}, expected at least 1")

    @property
    def is_asked(self) -> bool:
        """Is there anything to measure?"""
        return bool(self.text or self.prompts)


@dataclass(frozen=True)
class Continuation:
    """A prompt continued greedily by both models.

    same: the text that both began with. original, quantized: the first token that is not the same, and what followed; both
    empty where nothing differs. same_tokens of new_tokens came before. odds: where they part, the probability that the
    original gave to its own token and to the quantized model's.
    """

    prompt: str
    same: str
    original: tuple[str, str]
    quantized: tuple[str, str]
    same_tokens: int
    new_tokens: int
    odds: tuple[float, float] | None = None


@dataclass(frozen=True)
class Measured:
    """figures: the fields of `evaluation.Evaluation`. kl_of_windows: what their mean and its error are made of."""

    text: tuple[str, ...]
    figures: dict[str, Any] | None
    sha256: str | None = None
    seq_len: int | None = None
    kl_of_windows: tuple[float, ...] = ()
    continuations: tuple[Continuation, ...] = ()


def measure(model: str | Path, asked: Comparison, progress: Callable[[int, int, str], None]) -> Measured:
    """Load both models once, in float32 but for the quantized linears, and compare them.

    Raises DuotoneError as `evaluation.evaluate` does, and for a prompt that gives no token.
    """
    folder, device = locate_model(model), resolve_device(asked.device)
    quantized, tokenizer = load(folder, torch.float32, asked.device), load_tokenizer(folder)
    check_causal(quantized, "comparing texts")
    windows = windows_for(folder, quantized, tokenizer, asked.text, asked.seq_len, asked.samples) if asked.text else None
    original = None if asked.original is None else load(locate_model(asked.original), torch.float32, asked.device)
    prompts = _prompts(folder, quantized, tokenizer, asked, windows) if original is not None else []
    figures, kl = None, None
    if windows is not None:
        scores = score_windows(quantized, windows, original, device, lambda done, total: progress(done, total, "windows"))
        figures, kl = asdict(summarize(scores, windows)), scores.kl
    continuations: list[Continuation] = []
    for tokens in prompts:
        progress(len(continuations), len(prompts), "continuations")
        if original is not None:
            check_tokens(tokens, original, Path(str(asked.original)))
            continuations.append(_continued(original, quantized, tokenizer, tokens.to(device), asked.new_tokens))
    return Measured(
        text=tuple(titles(asked.text)),
        figures=figures,
        sha256=None if windows is None else windows.sha256,
        seq_len=None if windows is None else windows.tokens.shape[1],
        kl_of_windows=() if kl is None else tuple(kl.tolist()),
        continuations=tuple(continuations),
    )


def _prompts(
    folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, asked: Comparison, windows: TokenWindows | None
) -> list[Tensor]:
    """Token ids [T] of each prompt: the user's, or beginnings of windows that lie evenly in the text."""
    if not asked.prompts:
        tokens = windows.tokens if windows is not None else torch.empty(0, 0, dtype=torch.int64)
        chosen = torch.linspace(0, len(tokens) - 1, min(_PROMPTS, len(tokens))).long()
        return [_beginning(tokenizer, window) for window in tokens[chosen]]
    prompts: list[Tensor] = []
    for prompt in asked.prompts:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"][0]  # pyright: ignore[reportIndexIssue, reportArgumentType]
        if not len(ids):
            raise DuotoneError("--prompt: gives no token, expected some text")
        check_tokens(ids, model, folder)
        prompts.append(ids)
    return prompts


def _beginning(tokenizer: PreTrainedTokenizerBase, window_T: Tensor) -> Tensor:
    """Tokens of a window from where a line begins, if one does early enough, behind the tokens that begin every text."""
    first, count = len(first_token(tokenizer)), min(_PROMPT_TOKENS, len(window_T) - 1)
    pieces = [str(tokenizer.decode(token)) for token in window_T[first : len(window_T) - count]]
    start = next((i + 1 for i, piece in enumerate(pieces) if piece.endswith("\n")), 0)
    return torch.cat((window_T[:first], window_T[first + start : start + count]))


def _continued(
    original: PreTrainedModel, quantized: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt_T: Tensor, count: int
) -> Continuation:
    """Both greedy continuations of a prompt, and where they part."""
    theirs, logits_V = _greedy(original, tokenizer, prompt_T, count)
    ours, _ = _greedy(quantized, tokenizer, prompt_T, count)
    shared = next((i for i, (one, other) in enumerate(zip(theirs, ours, strict=False)) if one != other), None)
    prompt = str(tokenizer.decode(prompt_T, skip_special_tokens=True)).rstrip(_UNFINISHED)
    if shared is None:  # one of them may have ended before the other: then its next token would have been the end
        shared = min(len(theirs), len(ours))
    whole = [*prompt_T.tolist(), *theirs[:shared]]
    same = str(tokenizer.decode(whole, skip_special_tokens=True)).rstrip(_UNFINISHED)
    sides = [_parted(tokenizer, prompt_T.tolist() + side, len(whole), same) for side in (theirs, ours)]
    odds = None
    if shared < min(len(theirs), len(ours)):
        probability_V = logits_V[shared].double().softmax(-1)
        odds = (float(probability_V[theirs[shared]]), float(probability_V[ours[shared]]))
    new_tokens = max(len(theirs), len(ours))
    return Continuation(prompt, same[len(prompt) :], sides[0], sides[1], shared, new_tokens, odds)


@torch.no_grad()
def _greedy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt_T: Tensor, count: int
) -> tuple[list[int], list[Tensor]]:
    """The likeliest tokens after a prompt, one by one, and the logits they were chosen by."""
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    output: Any = model.generate(  # pyright: ignore[reportCallIssue]
        input_ids=prompt_T[None],
        attention_mask=torch.ones_like(prompt_T[None]),
        max_new_tokens=count,
        do_sample=False,
        pad_token_id=padding,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return output.sequences[0, len(prompt_T) :].tolist(), [logits[0] for logits in output.logits]


def _parted(tokenizer: PreTrainedTokenizerBase, tokens: list[int], shared: int, same: str) -> tuple[str, str]:
    """Of a continuation, the text of the first token that is its own, and the text after that.

    With the tokens after it where it is no whole character alone; an end of the text is shown as such.
    """
    whole = str(tokenizer.decode(tokens, skip_special_tokens=True))[len(same) :]
    if len(tokens) <= shared:
        return "", ""
    for end in range(shared + 1, len(tokens)):
        own = str(tokenizer.decode(tokens[:end], skip_special_tokens=True)).rstrip(_UNFINISHED)[len(same) :]
        if own:
            return own, whole[len(own) :]
    return whole or _END, ""
