"""PIQA and story endings: what the files say becomes questions, and a damaged file is refused in one sentence."""

import json
from pathlib import Path

import pytest

from duotone.errors import DuotoneError
from duotone.questions import Item, load_piqa, load_piqa_goals, load_story_cloze

ROWS = [
    {"goal": "boil eggs", "sol1": "in water", "sol2": "in sand"},
    {"goal": "cut paper", "sol1": "with soap", "sol2": "with scissors"},
    {"goal": "boil eggs", "sol1": "on ice", "sol2": "on a stove"},
]


def write_piqa(folder: Path, rows: list[object] = ROWS, labels: str = "0\n1\n1\n") -> Path:
    (folder / "valid.jsonl").write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    (folder / "valid-labels.lst").write_text(labels)
    return folder


def test_piqa(tmp_path: Path) -> None:
    """Prompt, choices and label as lm-evaluation-harness makes them; goals once each, in order."""
    items = load_piqa(write_piqa(tmp_path))
    assert items[1] == Item("Question: cut paper\nAnswer:", (" with soap", " with scissors"), 1)
    assert [item.label for item in items] == [0, 1, 1]
    assert load_piqa_goals(tmp_path) == ["boil eggs", "cut paper"]


def test_real_piqa(shared: Path) -> None:
    """The real file: 1838 questions, labels near even."""
    items = load_piqa(shared / "data" / "piqa")
    assert len(items) == 1838 and 0.45 < sum(item.label for item in items) / len(items) < 0.55


@pytest.mark.parametrize(
    ("rows", "labels", "words"),
    [
        (ROWS, "0\n1\n", ["valid-labels.lst", "found 2 labels", "expected 3"]),
        (ROWS, "0\n2\n1\n", ["valid-labels.lst:2", "'2'", "expected 0 or 1"]),
        ([*ROWS[:2], {"goal": "x", "sol1": "y"}], "0\n1\n1\n", ["valid.jsonl", "row 3", "expected text in 'sol2'"]),
        ([*ROWS[:2], {"goal": 5, "sol1": "y", "sol2": "z"}], "0\n1\n1\n", ["valid.jsonl", "row 3", "expected text in 'goal'"]),
        ([*ROWS[:2], "{broken"], "0\n1\n1\n", ["valid.jsonl:3", "not valid JSON"]),
        ([*ROWS[:2], "[1]"], "0\n1\n1\n", ["valid.jsonl:3", "found a JSON list", "expected an object"]),
    ],
)
def test_damaged_piqa(tmp_path: Path, rows: list[object], labels: str, words: list[str]) -> None:
    """One sentence that names the file, what was found and what was expected."""
    with pytest.raises(DuotoneError) as error:
        load_piqa(write_piqa(tmp_path, rows, labels))
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


@pytest.mark.parametrize("missing", ["valid.jsonl", "valid-labels.lst"])
def test_missing_piqa(tmp_path: Path, missing: str) -> None:
    """The file that is not there is named."""
    (write_piqa(tmp_path) / missing).unlink()
    with pytest.raises(DuotoneError, match=missing):
        load_piqa(tmp_path)


STORIES = """the tail of a story that began before.

Once upon a time, a fox ate a red apple. It was sweet.

"More!" said the fox. Then it slept under a very old tree.

Once there was a stone. It said, "I am quite a heavy stone." Nobody ever answered it at all. The end.

Once upon a time there was one sentence.

Once upon a midnight, Ann sang. The moon listened to her all night."""


def test_story_parts(tmp_path: Path) -> None:
    """A story ends with its last sentence, or with more where that is short; a single sentence is no story."""
    path = tmp_path / "stories.txt"
    path.write_text(STORIES)
    endings = {
        "Then it slept under a very old tree.",
        "Nobody ever answered it at all. The end.",
        "The moon listened to her all night.",
    }
    items = load_story_cloze(path, 3, seed=0)
    true = {item.context: item.choices[item.label] for item in items}
    assert {ending.strip() for ending in true.values()} == endings
    for context, ending in true.items():
        assert context + ending in STORIES and context.startswith("Once") and ending[0] == " "
    for item in items:
        assert item.choices[1 - item.label].strip() in endings - {true[item.context].strip()}
    path.write_text(STORIES.replace("\n\nOnce", "<|endoftext|>Once"))
    assert load_story_cloze(path, 3, seed=0) == items


def test_story_cloze_is_drawn_by_seed(shared: Path) -> None:
    """The same seed asks the same questions, another seed others; `fits` only leaves some out; both labels occur."""
    path = shared / "data" / "tinystories" / "tinystories_val.txt"
    items = load_story_cloze(path, 200, seed=0)
    assert items == load_story_cloze(path, 200, seed=0)
    assert items != load_story_cloze(path, 200, seed=1)
    assert len({item.context for item in items}) == 200
    assert 60 < sum(item.label for item in items) < 140
    short = load_story_cloze(path, 100, seed=0, fits=lambda item: len(item.context) < 800)
    assert short == [item for item in load_story_cloze(path, 400, seed=0) if len(item.context) < 800][:100]
    text = path.read_text(encoding="utf-8")
    assert all(item.context + item.choices[item.label] in text for item in items)


def test_too_few_stories(tmp_path: Path) -> None:
    """The file and both counts are named; no stories at all, one story that has no other to be compared with, no file."""
    path = tmp_path / "stories.txt"
    for text, count, found in ((STORIES, 4, 3), ("No story here.", 1, 0), ("Once upon a time. It rained on us all.", 1, 0)):
        path.write_text(text)
        with pytest.raises(DuotoneError, match=rf"stories.txt: found {found} stories .* expected {count}"):
            load_story_cloze(path, count, seed=0)
    with pytest.raises(DuotoneError, match=r"stories.txt: found 0 stories"):
        load_story_cloze(path, 1, seed=0, fits=lambda _: False)
    with pytest.raises(DuotoneError, match="count: found 0"):
        load_story_cloze(path, 0, seed=0)
    with pytest.raises(DuotoneError, match=r"nowhere.txt: cannot be read"):
        load_story_cloze(tmp_path / "nowhere.txt", 1, seed=0)
