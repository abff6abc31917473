"""What texts are named as, with their shares, and what is read from them: files, rows, conversations, hub data sets."""

import itertools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from duotone.errors import DuotoneError

#: What llm-compressor's examples calibrate on; used when no text is named and the model folder brings none.
DEFAULT_DATASET = "HuggingFaceH4/ultrachat_200k:train_sft"
#: A model folder may bring its own calibration text under this name.
OWN_TEXT = "calibration.txt"
#: A weight behind a source; a comma behind it begins the next source, and no other comma does, since fields have commas too.
_WEIGHT = r":([0-9]+\.?[0-9]*|\.[0-9]+)"
_WEIGHTED, _NEXT = re.compile(rf"(.+){_WEIGHT}"), re.compile(rf"({_WEIGHT}),")
#: Rows of a question and its answer, by their fields, as data sets for instruction tuning have them.
_PAIRS = (("prompt", "response"), ("prompt", "completion"), ("instruction", "output"))
#: Who speaks, where a data set does not use a chat template's words.
_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant"}
#: How a row became text.
TEMPLATE, TURNS, PLAIN = "chat template", "turns joined, for want of a chat template", "plain text"


@dataclass(frozen=True)
class TextSource:
    """A text as it was named: NAME[#field,...][:WEIGHT], NAME a file or a hub data set owner/name[:split].

    weight: its share of the windows, among the others' weights; None: all have equal shares.
    """

    name: str
    fields: tuple[str, ...] = ()
    weight: Decimal | None = None

    @property
    def is_on_hub(self) -> bool:
        """Is this owner/name, and nothing that lies here or looks like a file?"""
        like_a_file = Path(self.name).suffix in {".txt", ".jsonl", ".json"} or self.name.startswith((".", "/", "~"))
        return self.name.count("/") == 1 and not like_a_file and not _is(Path.exists, self.name)

    @property
    def title(self) -> str:
        """As it is recorded: a file without its folders, whose names are nobody's business; the rest as it was named."""
        name = self.name if self.is_on_hub else Path(self.name).name
        fields = f"#{','.join(self.fields)}" if self.fields else ""
        return name + fields + (f":{self.weight}" if self.weight is not None else "")


@dataclass(frozen=True)
class SourceText:
    """The text of a source. rendering: how its rows became that: those of `TEMPLATE`, `TURNS` and `PLAIN` that occurred."""

    text: str
    rendering: tuple[str, ...]


def parse_sources(given: Sequence[str]) -> tuple[TextSource, ...]:
    """Sources as the command line names them, one each or several with weights between commas: `a.jsonl#q,a:0.7,b.txt:0.3`.

    A last `:NUMBER` is a weight, whatever else has colons is a name: a file that is called `a:1` is `a:1:1`. Raises
    DuotoneError for a weight of 0, and where some have weights and some do not.
    """
    sources = [_parse(one) for text in given for one in _NEXT.sub("\\1\0", text).split("\0")]
    unweighted = next((source.name for source in sources if source.weight is None), None)
    weighted = next((source for source in sources if source.weight is not None), None)
    if unweighted is not None and weighted is not None:
        raise DuotoneError(f"{unweighted}: found no weight, expected one as {weighted.title} has; all have one, or none")
    return tuple(sources)


def _parse(text: str) -> TextSource:
    found = _WEIGHTED.fullmatch(text)
    named, weight = (text, None) if found is None else (found[1], Decimal(found[2]))
    if weight == 0:
        raise DuotoneError(f"{text}: found a weight of 0, expected more, or the text left out")
    name, _, fields = named.partition("#")
    return TextSource(name, tuple(fields.split(",")) if fields else (), weight)


def titles(given: Sequence[str]) -> list[str]:
    """The sources as they are recorded, see `TextSource.title`."""
    return [source.title for source in parse_sources(given)]


def calibration_sources(given: Sequence[str], model: Path) -> tuple[str, ...]:
    """The texts to calibrate on: those named, else the model folder's own, else the default hub data set."""
    if given:
        return tuple(given)
    own = model / OWN_TEXT
    return (str(own),) if own.is_file() else (DEFAULT_DATASET,)


def shares(sources: Sequence[TextSource], count: int | None) -> list[int | None]:
    """`count` windows dealt out by weight, what does not divide to the largest remainders, the first of equal ones.

    None: every window of each. Raises DuotoneError where a source would get none, and for weights without a count.
    """
    if count is None:
        if sources[0].weight is not None:
            raise DuotoneError(f"{sources[0].title}: found a weight, expected --samples beside it: a share of how many")
        return [None] * len(sources)
    if count < len(sources):
        raise DuotoneError(f"--samples: found {count}, expected at least one for each of the {len(sources)} texts")
    weights = [Fraction(source.weight or 1) for source in sources]
    exact = [count * weight / sum(weights) for weight in weights]
    dealt = [int(share) for share in exact]
    order = sorted(range(len(sources)), key=lambda i: dealt[i] - exact[i])
    for i in order[: count - sum(dealt)]:
        dealt[i] += 1
    if 0 in dealt:
        raise DuotoneError(f"--samples: found {count}, which leaves no window for {sources[dealt.index(0)].title}; take more")
    return list(dealt)


def read_source(source: TextSource, tokenizer: PreTrainedTokenizerBase, max_characters: int | None = None) -> SourceText:
    """The text of a file (.jsonl: one object a line), or of a hub data set, as much of that as is needed.

    Of a row the named fields, joined by line. Without names its `text`, or a conversation: `messages`, `conversations`, or a
    pair such as `prompt` and `response`; these go through the tokenizer's chat template if it has one, without the token that
    begins a text, which windows have already.
    """
    path = Path(source.name)
    if _is(Path.is_file, source.name):
        text = read_utf8(path)
        if path.suffix != ".jsonl":
            return SourceText(text, (PLAIN,))
        return _joined([_render(row, source, tokenizer) for row in json_lines(path, text)])
    if not source.is_on_hub:
        raise DuotoneError(
            f"{source.name}: found no such file, expected a text or .jsonl file, or owner/name on the hub "
            "(--calibration, --text)"
        )
    return _joined(_hub_rows(source, tokenizer, max_characters))


def _is(what: Callable[[Path], bool], name: str) -> bool:
    try:
        return what(Path(name))
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


def _joined(documents: Sequence[tuple[str, str]]) -> SourceText:
    """Documents with how each was rendered: a template ends its own, all others end with a blank line."""
    parts = [text if kind == TEMPLATE else f"{text}\n\n" for text, kind in documents]
    if documents and documents[-1][1] != TEMPLATE:
        parts[-1] = documents[-1][0]
    return SourceText("".join(parts), tuple(dict.fromkeys(kind for _, kind in documents)))


def _render(row: dict[str, Any], source: TextSource, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """One document from a row of a data set, and how it was rendered."""
    names = source.fields or (("text",) if isinstance(row.get("text"), str) else _conversation_fields(row))
    values = [row.get(name) for name in names]
    if all(isinstance(value, str) for value in values) and (source.fields or names == ("text",)):
        return "\n".join(map(str, values)), PLAIN
    messages = _messages(row, names)
    if messages is None:
        lacking = next((name for name in names if not isinstance(row.get(name), str)), names[0])
        wanted = f"text in {lacking!r}" if source.fields else "'text', or a conversation in 'messages'"
        example = f"{source.name}#{next(iter(row), 'text')}"
        raise DuotoneError(f"{source.name}: found the fields {sorted(row)}, expected {wanted}; name them as in {example}")
    if not tokenizer.chat_template:
        return "\n".join(_words(message["content"]) for message in messages), TURNS
    try:
        text = str(tokenizer.apply_chat_template(messages, tokenize=False))
    except (TemplateError, ValueError, TypeError, KeyError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        roles = ", ".join(str(message["role"]) for message in messages[:6])
        raise DuotoneError(f"{source.name}: the model's chat template refuses a conversation of {roles} ({reason})") from None
    return text.removeprefix(str(tokenizer.bos_token or "")), TEMPLATE


def _conversation_fields(row: dict[str, Any]) -> tuple[str, ...]:
    """Those of a row's fields that hold a conversation; `text` where there are none, which is then missed."""
    known = (("messages",), ("conversations",), *_PAIRS)
    return next((names for names in known if all(row.get(name) for name in names)), ("text",))


def _messages(row: dict[str, Any], names: tuple[str, ...]) -> list[dict[str, Any]] | None:
    """The turns of a conversation, as chat templates take them; None where the fields hold none."""
    values = [row.get(name) for name in names]
    if names in _PAIRS and all(isinstance(value, str) for value in values):
        asked = "\n\n".join(part for part in (values[0], row.get("input")) if isinstance(part, str) and part)
        return [{"role": "user", "content": asked}, {"role": "assistant", "content": values[1]}]
    if not all(isinstance(value, list) and value for value in values):
        return None
    turns: list[dict[str, Any]] = []
    for turn in (turn for value in values for turn in value or ()):
        if not isinstance(turn, dict):
            return None
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if not isinstance(role, str):
            return None
        others = {key: value for key, value in turn.items() if key not in {"role", "from", "content", "value"}}
        turns.append({"role": _ROLES.get(role, role), "content": content, **others})  # tool calls and the like
    return turns


def _words(content: Any) -> str:
    """The text of a turn, which may be given in parts."""
    if isinstance(content, list):
        return "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return "" if content is None else str(content)


def _hub_rows(source: TextSource, tokenizer: PreTrainedTokenizerBase, max_characters: int | None) -> list[tuple[str, str]]:
    """Documents streamed from a hub data set, as many as are needed."""
    name = source.name
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
        documents: list[tuple[str, str]] = []
        length = 0
        for row in itertools.islice(rows, 1_000_000):
            documents.append(_render(row, source, tokenizer))
            length += len(documents[-1][0])
            if max_characters is not None and length >= max_characters:
                break
    except DuotoneError:
        raise
    except Exception as error:  # the hub client raises many kinds: offline, missing, gated, wrong split
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DuotoneError(
            f"{name}: the hub data set cannot be read ({reason}); name a text file with --calibration FILE"
        ) from None
    return documents
