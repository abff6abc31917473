"""Texts made into questions with one true answer, and into sentences: PIQA, and endings of TinyStories."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from duotone.calibrate.sources import json_lines, read_utf8
from duotone.errors import DuotoneError

#: An ending has at least this many words: "The end." says nothing about its story.
_ENDING_WORDS = 5
#: Before a TinyStories story: a mark in some editions of the text; in others nothing but the way that stories open.
_OPENING = re.compile(r"<\|endoftext\|>\s*|\n\n+(?=Once (?:upon|there))")
#: The blank between two sentences; the first may end with a quotation mark.
_BETWEEN_SENTENCES = re.compile(r"(?:(?<=[.!?])|(?<=[.!?][\"'”’]))\s+(?=[\"'“‘A-Z])")


@dataclass(frozen=True)
class Item:
    """A question: the choices continue the context and begin with the blank that parts them from it; label: the true one."""

    context: str
    choices: tuple[str, ...]
    label: int


def load_piqa(folder: str | Path) -> list[Item]:
    """PIQA's validation questions, asked as lm-evaluation-harness asks them: `Question: ...`, `Answer: ...`."""
    questions, labels = Path(folder) / "valid.jsonl", Path(folder) / "valid-labels.lst"
    rows, truths = list(_piqa_rows(questions)), read_utf8(labels).split()
    if len(rows) != len(truths):
        raise DuotoneError(f"{labels}: found {len(truths)} labels, expected {len(rows)} as there are rows in {questions.name}")
    items: list[Item] = []
    for number, (row, truth) in enumerate(zip(rows, truths, strict=True), 1):
        if truth not in {"0", "1"}:
            raise DuotoneError(f"{labels}:{number}: found the label {truth!r}, expected 0 or 1")
        choices = (f" {row['sol1']}", f" {row['sol2']}")
        items.append(Item(f"Question: {row['goal']}\nAnswer:", choices, int(truth)))
    return items


def load_gsm8k(path: str | Path) -> list[Item]:
    """GSM8K's questions with their final number, behind `####`, against the next question's that has another.

    Small models do not compute; what is measured is whether a text about a sum makes its own result likelier than another's.
    Raises DuotoneError naming a row without question and answer, or fewer than two different numbers.
    """
    found: list[tuple[str, str]] = []
    for number, row in enumerate(json_lines(Path(path), read_utf8(Path(path))), 1):
        question, answer = row.get("question"), row.get("answer")
        if not isinstance(question, str) or not isinstance(answer, str) or "####" not in answer:
            raise DuotoneError(f"{path}: row {number} has the fields {sorted(row)}, expected question and answer with '####'")
        found.append((question, answer.rpartition("####")[2].strip()))
    if len({number for _, number in found}) < 2:
        raise DuotoneError(f"{path}: found {len(found)} questions of one answer, expected different ones")
    items: list[Item] = []
    for index, (question, number) in enumerate(found):
        others = (found[(index + step) % len(found)][1] for step in range(1, len(found)))
        other = next(other for other in others if other != number)
        choices = (f" {number}", f" {other}")
        items.append(Item(f"Question: {question}\nAnswer:", choices if index % 2 == 0 else choices[::-1], index % 2))
    return items


def load_piqa_goals(folder: str | Path) -> list[str]:
    """The distinct goals of PIQA's validation questions, in the file's order: short sentences to embed."""
    return list(dict.fromkeys(row["goal"] for row in _piqa_rows(Path(folder) / "valid.jsonl") if row["goal"].strip()))


def load_story_cloze(text_file: str | Path, count: int, seed: int, fits: Callable[[Item], bool] = lambda _: True) -> list[Item]:
    """`count` stories of a TinyStories text without their ending, to choose between that and another story's ending.

    The ending is the last sentence, or the last few where that is short. Stories, false endings and the order of the two
    choices are drawn by `seed`; a story for which `fits` says no is passed over (see `tasks.fits_context`). A story is
    taken to begin at `Once upon` or `Once there`: one that begins otherwise hangs on to its predecessor, and its ending is
    still what follows the context. Raises DuotoneError when the text holds fewer stories.
    """
    path = Path(text_file)
    if count < 1:
        raise DuotoneError(f"count: found {count}, expected at least 1 story")
    pieces = _OPENING.split("\n\n" + read_utf8(path))[1:]  # before the first opening lies the tail of a story
    stories = [parts for piece in pieces if (parts := _part_ending(piece.strip())) is not None]
    generator = torch.Generator().manual_seed(seed)
    items: list[Item] = []
    for index in torch.randperm(len(stories), generator=generator).tolist():
        context, blank, ending = stories[index]
        step = 1 + int(torch.randint(max(1, len(stories) - 1), (), generator=generator))
        label = int(torch.randint(2, (), generator=generator))
        false = stories[(index + step) % len(stories)][2]
        choices = (blank + ending, blank + false) if label == 0 else (blank + false, blank + ending)
        item = Item(context, choices, label)
        if false != ending and fits(item):
            items.append(item)
        if len(items) == count:
            return items
    raise DuotoneError(f"{path}: found {len(items)} stories that fit the model's context, expected {count}")


def _piqa_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of PIQA's questions, their three texts checked."""
    for number, row in enumerate(json_lines(path, read_utf8(path)), 1):
        missing = [name for name in ("goal", "sol1", "sol2") if not isinstance(row.get(name), str)]
        if missing:
            raise DuotoneError(f"{path}: row {number} has the fields {sorted(row)}, expected text in {missing[0]!r}")
        yield row


def _part_ending(story: str) -> tuple[str, str, str] | None:
    """Context, blank and ending of a story; None for one without two sentences."""
    for between in reversed(list(_BETWEEN_SENTENCES.finditer(story))):
        if len(story[between.end() :].split()) >= _ENDING_WORDS:
            return story[: between.start()], between.group(), story[between.end() :]
    return None
