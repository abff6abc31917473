"""Text to token windows of equal length, the same for calibration and for evaluation."""

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from duotone.calibrate.sources import parse_sources, read_source, shares
from duotone.errors import DuotoneError

#: Tokens of one forward pass: enough to fill the machine, small beside the weights of a block.
BATCH_POSITIONS = 4096
#: Characters read from a hub data set for each window asked for and each token of it; English has about four a token.
_CHARACTERS_PER_TOKEN = 8


@dataclass(frozen=True, eq=False)
class TokenWindows:
    """Token windows int64 [count, seq_len] and where they came from.

    sha256: of the whole texts. text_bytes: UTF-8 bytes of the tokens that are predicted, all but each window's first.
    counts: windows of each source. rendering: how the rows of each became text (`sources.SourceText`). chats: the tokenizer has
    a chat template.
    """

    tokens: Tensor
    sources: tuple[str, ...]
    sha256: str
    text_bytes: int
    notes: tuple[str, ...] = ()
    counts: tuple[int, ...] = ()
    rendering: tuple[tuple[str, ...], ...] = ()
    chats: bool = False

    def __len__(self) -> int:
        """How many windows."""
        return len(self.tokens)

    @property
    def positions(self) -> int:
        """Tokens in all."""
        return self.tokens.numel()

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All that the calibration's numbers depend on."""
        return {"tokens": self.tokens}

    def batches(self, least: int = 1, written: int = 0) -> list[dict[str, Tensor]]:
        """The inputs of forward passes, by name: at least so many, if there are windows enough.

        written: for a model that reads one text and writes another, how many tokens of a window, its last, it writes.
        """
        return token_batches(self.tokens, least, written)


def token_batches(tokens: Tensor, least: int = 1, written: int = 0) -> list[dict[str, Tensor]]:
    """Token windows int64 [windows, T] as inputs of forward passes; the last `written` of a window are the decoder's."""
    batches = tokens.split(batch_size(len(tokens), BATCH_POSITIONS // tokens.shape[1], least))
    if not written:
        return [{"input_ids": batch} for batch in batches]
    return [{"input_ids": batch[:, :-written], "decoder_input_ids": batch[:, -written:]} for batch in batches]


def batch_size(count: int, most: int, least: int) -> int:
    """How many of `count` samples a batch has: the most it may have, less only where that makes too few batches.

    What comes of a batch may depend on its size, to the last bit, and is not to depend on how many processes share them.
    """
    size = max(1, most)
    return size if -(-count // size) >= least else max(1, count // least)


def draw_windows(
    tokenizer: PreTrainedTokenizerBase, sources: Sequence[str], seq_len: int, count: int | None, seed: int
) -> TokenWindows:
    """`count` windows of `seq_len` tokens, in equal shares from each source or by weight, drawn by `seed`, kept in text order.

    sources: as `sources.parse_sources` takes them. Each window begins and ends with the tokens that begin and end every text,
    where the tokenizer has them. count=None takes every whole window. Raises DuotoneError when a source is missing, shorter
    than one window, or than the share that its weight asks for; without weights such a share is noted.
    """
    if seq_len < 2:
        raise DuotoneError(f"--seq-len: found {seq_len}, expected at least 2 tokens")
    named, notes = parse_sources(sources), list[str]()
    digest, parts, text_bytes, renderings = hashlib.sha256(), list[Tensor](), 0, list[tuple[str, ...]]()
    for source, share in zip(named, shares(named, count), strict=True):
        read = read_source(source, tokenizer, None if share is None else share * seq_len * _CHARACTERS_PER_TOKEN)
        digest.update(read.text.encode("utf-8"))
        windows, nbytes = _windows_of(source.name, read.text, tokenizer, seq_len, share, seed)
        if share is not None and len(windows) < share:
            lacking = f"holds {len(windows)} windows of {seq_len} tokens, {share} were asked for"
            if source.weight is not None:
                raise DuotoneError(f"{source.name}: {lacking} by its weight; fewer --samples or a smaller weight would do")
            notes.append(f"{Path(source.name).name}: {lacking}")
        parts.append(windows)
        text_bytes += nbytes
        renderings.append(read.rendering)
    counts = tuple(len(part) for part in parts)
    return TokenWindows(
        tokens=torch.cat(parts),
        sources=tuple(sources),
        sha256=digest.hexdigest(),
        text_bytes=text_bytes,
        notes=tuple(notes),
        counts=counts,
        rendering=tuple(renderings),
        chats=bool(tokenizer.chat_template),
    )


def _windows_of(
    name: str, text: str, tokenizer: PreTrainedTokenizerBase, seq_len: int, share: int | None, seed: int
) -> tuple[Tensor, int]:
    """Of one text at most `share` windows int64 [windows, seq_len], and the UTF-8 bytes of their predicted tokens."""
    first, last = first_token(tokenizer), last_token(tokenizer)
    if share is not None:
        text = _thin(text, 2 * share * seq_len * _CHARACTERS_PER_TOKEN, seq_len * _CHARACTERS_PER_TOKEN, seed)
    windows, offsets = _cut(tokenizer, text, seq_len - len(first) - len(last), 1 - len(first))
    if not len(windows):
        found = _token_count(tokenizer, text)
        raise DuotoneError(f"{name}: found {found} tokens of text, expected at least one sequence of {seq_len} (--seq-len)")
    if share is not None and share < len(windows):
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(len(windows), generator=generator)[:share].sort().values
        windows, offsets = windows[chosen], offsets[chosen]
    nbytes = sum(len(text[start:stop].encode("utf-8")) for start, stop in offsets.tolist())
    framed = [torch.tensor(ends, dtype=torch.int64).expand(len(windows), -1) for ends in (first, last)]
    return torch.cat([framed[0], windows, framed[1]], dim=1), nbytes


def _thin(text: str, characters: int, span: int, seed: int) -> str:
    """A random choice of the text's lines in runs of about `span` characters, `characters` in all: enough to draw from.

    Tokenizing a whole large file to keep a thousandth of it would take longer than quantizing.
    """
    if len(text) <= 2 * characters:
        return text
    runs: list[str] = []
    start = 0
    while start < len(text):
        end = text.find("\n", start + span) + 1 or len(text)
        runs.append(text[start:end])
        start = end
    order = torch.randperm(len(runs), generator=torch.Generator().manual_seed(seed)).tolist()
    lengths = itertools.accumulate(len(runs[i]) for i in order)
    chosen = [i for i, length in zip(order, lengths, strict=True) if length - len(runs[i]) < characters]
    return "".join(runs[i] for i in sorted(chosen))


def first_token(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token that begins every text: BOS for a decoder, [CLS] for an encoder; nothing when the tokenizer has neither."""
    names = (tokenizer.bos_token_id, tokenizer.cls_token_id)
    return [int(token) for token in names if isinstance(token, int)][:1]


def last_token(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token that ends every text of an encoder, [SEP]; nothing for a decoder, whose texts go on."""
    is_encoder = tokenizer.bos_token_id is None and isinstance(tokenizer.cls_token_id, int)
    return [tokenizer.sep_token_id] if is_encoder and isinstance(tokenizer.sep_token_id, int) else []


def _cut(tokenizer: PreTrainedTokenizerBase, text: str, length: int, unpredicted: int) -> tuple[Tensor, Tensor]:
    """Every whole run of `length` tokens [windows, length], and the characters [windows, 2] of its predicted tokens.

    unpredicted: tokens at the head of a run that nothing predicts (one, when no BOS stands before it).
    """
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=bool(tokenizer.is_fast), verbose=False)
    ids = encoded["input_ids"]
    count = len(ids) // length
    windows = torch.tensor(ids[: count * length], dtype=torch.int64).view(count, length)
    if not count:
        return windows, torch.empty(0, 2, dtype=torch.int64)
    if tokenizer.is_fast:
        starts = [start for start, _ in encoded["offset_mapping"]] + [len(text)]
    else:  # no offsets: each token's own text
        starts = [0, *itertools.accumulate(len(tokenizer.decode([token])) for token in ids)]
    spans = [(starts[i * length + unpredicted], starts[(i + 1) * length]) for i in range(count)]
    return windows, torch.tensor(spans)


def _token_count(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
