"""Text to token windows of equal length, the same for calibration and for evaluation."""

import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from duotone.errors import DuotoneError

#: What llm-compressor's examples calibrate on; used when no text is named and the model folder brings none.
DEFAULT_DATASET = "HuggingFaceH4/ultrachat_200k:train_sft"
#: A model folder may bring its own calibration text under this name.
OWN_TEXT = "calibration.txt"
#: Tokens of one forward pass: enough to fill the machine, small beside the weights of a block.
BATCH_POSITIONS = 4096
#: Characters read from a hub data set for each window asked for and each token of it; English has about four a token.
_CHARACTERS_PER_TOKEN = 8


@dataclass(frozen=True, eq=False)
class TokenWindows:
    """Token windows int64 [count, seq_len] and where they came from.

    sha256: of the whole texts. text_bytes: UTF-8 bytes of the tokens that are predicted, all but each window's first.
    """

    tokens: Tensor
    sources: tuple[str, ...]
    sha256: str
    text_bytes: int
    notes: tuple[str, ...] = ()

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

    def batches(self, share: slice = slice(None), written: int = 0) -> list[dict[str, Tensor]]:
        """The inputs of forward passes through those windows, by name.

        written: for a model that reads one text and writes another, how many tokens of a window, its last, it writes.
        """
        return token_batches(self.tokens[share], written)


def token_batches(tokens: Tensor, written: int = 0) -> list[dict[str, Tensor]]:
    """Token windows int64 [windows, T] as inputs of forward passes; the last `written` of a window are the decoder's."""
    batches = tokens.split(max(1, BATCH_POSITIONS // tokens.shape[1]))
    if not written:
        return [{"input_ids": batch} for batch in batches]
    return [{"input_ids": batch[:, :-written], "decoder_input_ids": batch[:, -written:]} for batch in batches]


def calibration_sources(given: Sequence[str], model: Path) -> tuple[str, ...]:
    """The texts to calibrate on: those named, else the model folder's own, else the default hub data set."""
    if given:
        return tuple(given)
    own = model / OWN_TEXT
    return (str(own),) if own.is_file() else (DEFAULT_DATASET,)


def draw_windows(
    tokenizer: PreTrainedTokenizerBase, sources: Sequence[str], seq_len: int, count: int | None, seed: int
) -> TokenWindows:
    """`count` windows of `seq_len` tokens, in equal shares from each source, drawn by `seed` and kept in text order.

    Each window begins and ends with the tokens that begin and end every text, where the tokenizer has them. count=None takes
    every whole window. Raises DuotoneError when a source is missing, or shorter than one window.
    """
    if seq_len < 2:
        raise DuotoneError(f"--seq-len: found {seq_len}, expected at least 2 tokens")
    first, last = first_token(tokenizer), last_token(tokenizer)
    shares = _shares(count, len(sources))
    parts: list[Tensor] = []
    notes: list[str] = []
    digest, text_bytes = hashlib.sha256(), 0
    for source, share in zip(sources, shares, strict=True):
        text = read_text(source, tokenizer, None if share is None else share * seq_len * _CHARACTERS_PER_TOKEN)
        digest.update(text.encode("utf-8"))
        if share is not None:
            text = _thin(text, 2 * share * seq_len * _CHARACTERS_PER_TOKEN, seq_len * _CHARACTERS_PER_TOKEN, seed)
        windows, offsets = _cut(tokenizer, text, seq_len - len(first) - len(last), 1 - len(first))
        if not len(windows):
            found = _token_count(tokenizer, text)
            raise DuotoneError(
                f"{source}: found {found} tokens of text, expected at least one sequence of {seq_len} (--seq-len)"
            )
        if share is not None and share < len(windows):
            generator = torch.Generator().manual_seed(seed)
            chosen = torch.randperm(len(windows), generator=generator)[:share].sort().values
            windows, offsets = windows[chosen], offsets[chosen]
        elif share is not None and share > len(windows):
            notes.append(f"{Path(source).name}: holds {len(windows)} windows of {seq_len} tokens, {share} were asked for")
        text_bytes += sum(len(text[start:stop].encode("utf-8")) for start, stop in offsets.tolist())
        framed = [torch.tensor(ends, dtype=torch.int64).expand(len(windows), -1) for ends in (first, last)]
        parts.append(torch.cat([framed[0], windows, framed[1]], dim=1))
    return TokenWindows(torch.cat(parts), tuple(sources), digest.hexdigest(), text_bytes, tuple(notes))


def read_text(source: str, tokenizer: PreTrainedTokenizerBase, max_characters: int | None = None) -> str:
    """The text of a file (.jsonl: one object a line), or of a hub data set `owner/name[:split]`.

    `FILE.jsonl#question,answer` names the fields to join; without it, `text`, or `messages` through the chat template.
    """
    name, _, fields = source.partition("#")
    path = Path(name)
    if _is_file(path):
        text = read_utf8(path)
        if path.suffix != ".jsonl":
            return text
        return "\n\n".join(_render(row, fields, source, tokenizer) for row in json_lines(path, text))
    if name.count("/") != 1 or path.suffix in {".txt", ".jsonl", ".json"} or name.startswith((".", "/", "~")):
        raise DuotoneError(
            f"{name}: found no such file, expected a text or .jsonl file, or owner/name on the hub (--calibration, --text)"
        )
    return _hub_text(name, fields, tokenizer, max_characters)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that no file system takes, such as the text itself
        return False


def read_utf8(path: Path) -> str:
    """The text of a file. Raises DuotoneError when it cannot be read or is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DuotoneError(f"{path}: is not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise DuotoneError(f"{path}: cannot be read ({error.strerror})") from None


def json_lines(path: Path, text: str) -> Iterator[dict[str, Any]]:
    """Objects of a .jsonl text; only a newline ends a line (JSON strings may hold other separators)."""
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DuotoneError(f"{path}:{number}: is not valid JSON ({error})") from None
            if not isinstance(row, dict):
                raise DuotoneError(f"{path}:{number}: found a JSON {type(row).__name__}, expected an object")
            yield row


def _render(row: dict[str, Any], fields: str, source: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """One document from a row of a data set."""
    names = fields.split(",") if fields else ["text"] if "text" in row else ["messages"]
    messages = row.get("messages")
    if names == ["messages"] and isinstance(messages, list) and all(isinstance(message, dict) for message in messages):
        if tokenizer.chat_template:
            return str(tokenizer.apply_chat_template(messages, tokenize=False))
        return "\n".join(str(message.get("content", "")) for message in messages)
    missing = [name for name in names if not isinstance(row.get(name), str)]
    if missing:
        example = f"{source.partition('#')[0]}#{next(iter(row), 'text')}"
        raise DuotoneError(
            f"{source}: found the fields {sorted(row)}, expected text in {missing[0]!r}; name them as in {example}"
        )
    return "\n".join(row[name] for name in names)


def _hub_text(name: str, fields: str, tokenizer: PreTrainedTokenizerBase, max_characters: int | None) -> str:
    """Text streamed from a hub data set, as much as is needed."""
    try:
        from datasets import load_dataset  # pyright: ignore[reportMissingImports] - an extra: heavy, and for hub data only
    except ImportError:
        raise DuotoneError(
            f"{name}: a hub data set needs the datasets package (pip install datasets); "
            "or name a text file with --calibration FILE"
        ) from None
    identifier, _, split = name.partition(":")
    try:
        rows = load_dataset(identifier, split=split or "train", streaming=True)
        documents: list[str] = []
        length = 0
        for row in itertools.islice(rows, 1_000_000):
            documents.append(_render(row, fields, name, tokenizer))
            length += len(documents[-1])
            if max_characters is not None and length >= max_characters:
                break
    except DuotoneError:
        raise
    except Exception as error:  # the hub client raises many kinds: offline, missing, gated, wrong split
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DuotoneError(
            f"{name}: the hub data set cannot be read ({reason}); name a text file with --calibration FILE"
        ) from None
    return "\n\n".join(documents)


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


def _shares(count: int | None, sources: int) -> list[int | None]:
    """`count` cut into equal shares, the first ones larger by one where it does not divide."""
    if count is None:
        return [None] * sources
    if count < sources:
        raise DuotoneError(f"--samples: found {count}, expected at least one for each of the {sources} texts")
    return [count // sources + (i < count % sources) for i in range(sources)]
