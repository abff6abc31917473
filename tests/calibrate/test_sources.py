"""What texts are named as, their shares, and how rows and conversations become text."""

import json
import re
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from duotone.calibrate.data import draw_windows
from duotone.calibrate.sources import (
    DEFAULT_DATASET,
    PLAIN,
    TEMPLATE,
    TURNS,
    SourceText,
    TextSource,
    calibration_sources,
    parse_sources,
    read_source,
    shares,
    titles,
)
from duotone.errors import DuotoneError
from duotone.models.tokenizer import load_tokenizer

ModelMaker = Callable[..., Path]
TURN_PAIR = [{"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": "Four, I should think."}]
#: As ChatML's, with the token that begins a text before all turns, and a refusal as Gemma's.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "<|{{ message.role }}|>{{ message.content | trim }}{{ eos_token }}\n{% endfor %}"
)


@pytest.fixture(scope="module")
def tokenizer(tiny_model: ModelMaker):
    return load_tokenizer(tiny_model())


@pytest.fixture
def instructed(tiny_model: ModelMaker):
    """The same tokenizer with a chat template."""
    tokenizer = load_tokenizer(tiny_model())
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def read(source: str, tokenizer: Any, max_characters: int | None = None) -> str:
    (named,) = parse_sources([source])
    return read_source(named, tokenizer, max_characters).text


def write_rows(path: Path, *rows: Any) -> str:
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


@pytest.mark.parametrize(
    ("named", "meant"),
    [
        ("a.txt", [("a.txt", (), None)]),
        ("a.jsonl#question,answer", [("a.jsonl", ("question", "answer"), None)]),
        ("a.jsonl#question,answer:0.5,b.txt:.5", [("a.jsonl", ("question", "answer"), "0.5"), ("b.txt", (), ".5")]),
        ("a.txt:3,b.txt:1,c.txt:2", [("a.txt", (), "3"), ("b.txt", (), "1"), ("c.txt", (), "2")]),
        ("owner/name:train[:1000]", [("owner/name:train[:1000]", (), None)]),
        ("owner/name:train:0.25", [("owner/name:train", (), "0.25")]),
        ("C:\\texts\\a.txt", [("C:\\texts\\a.txt", (), None)]),
        ("a:1:1", [("a:1", (), "1")]),
        ("one, two.txt", [("one, two.txt", (), None)]),
    ],
)
def test_names(named: str, meant: list[tuple[str, tuple[str, ...], str | None]]) -> None:
    """A last number is a weight and a comma behind one parts two texts; other colons and commas are of the names."""
    expected = [TextSource(name, fields, None if weight is None else Decimal(weight)) for name, fields, weight in meant]
    assert list(parse_sources([named])) == expected


#: Names with colons, commas and digits, but for a weight's: `x:1,y` is two texts.
NAMES = st.text("ab.:,01 ", max_size=8).map(lambda text: f"x{text}y").filter(lambda name: not re.search(":[0-9.]+,", name))
SOURCES = st.builds(
    TextSource,
    NAMES | NAMES.map(lambda name: f"owner/{name}"),
    st.lists(st.sampled_from(["question", "answer", "a b"]), max_size=2, unique=True).map(tuple),
    st.decimals(Decimal("0.001"), 9, places=3),
)


@given(st.lists(SOURCES, min_size=1, max_size=4))
def test_a_title_is_read_as_what_it_was(sources: list[TextSource]) -> None:
    """One by one and between commas; so the command that a report gives asks for the same mixture."""
    told = [source.title for source in sources]
    assert list(parse_sources(told)) == list(parse_sources([",".join(told)])) == sources
    assert titles(told) == told


def test_a_title_has_no_folder(tmp_path: Path) -> None:
    """A file's name alone, its fields and weight kept; what is no file stands as it was named."""
    source = write_rows(tmp_path / "a.jsonl", {"text": "x"})
    assert titles([f"{source}#text:2", "owner/name:train:1"]) == ["a.jsonl#text:2", "owner/name:train:1"]


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=6), st.integers(1, 500))
def test_shares(weights: list[int], count: int) -> None:
    """All windows are dealt out, none is off by one or more, equal weights are as no weights; a share of none is an error."""
    sources = [TextSource(f"{i}", (), Decimal(weight) / 10) for i, weight in enumerate(weights)]
    exact = [count * weight / sum(weights) for weight in weights]
    try:
        dealt = shares(sources, count)
    except DuotoneError as error:
        assert min(exact) < 1
        assert ("leaves no window for" if count >= len(sources) else "at least one for each of the") in str(error)
        return
    assert sum(share or 0 for share in dealt) == count
    assert all(share is not None and share > 0 and abs(share - meant) < 1 for share, meant in zip(dealt, exact, strict=True))
    if len(set(weights)) == 1:
        n = len(weights)
        assert dealt == shares([TextSource("x")] * n, count) == [count // n + (i < count % n) for i in range(n)]


def test_a_mixture(tokenizer, text_file: Path, tmp_path: Path) -> None:
    """Each text gives its weight's share, the same at each seed; equal weights draw what no weights draw."""
    (tmp_path / "digits.txt").write_text("0123456789 " * 2000)
    mixture = f"{text_file}:0.75,{tmp_path / 'digits.txt'}:0.25"
    first, again, other = (draw_windows(tokenizer, [mixture], 32, 16, seed) for seed in (5, 5, 6))
    assert torch.equal(first.tokens, again.tokens) and not torch.equal(first.tokens, other.tokens)
    digits = torch.tensor(tokenizer("0123456789 ", add_special_tokens=False)["input_ids"])
    assert [bool(torch.isin(window[1:], digits).all()) for window in first.tokens] == [False] * 12 + [True] * 4
    assert first.counts == (12, 4) and first.rendering == ((PLAIN,), (PLAIN,))
    equal = [f"{text_file}:2", f"{tmp_path / 'digits.txt'}:2"]
    plain = [str(text_file), str(tmp_path / "digits.txt")]
    assert torch.equal(*(draw_windows(tokenizer, sources, 32, 9, 0).tokens for sources in (equal, plain)))


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        (["a.txt:1", "b.txt"], "b.txt: found no weight, expected one as a.txt:1 has"),
        (["a.txt:0"], "found a weight of 0"),
        (["a.txt:1,b.txt:99"], "leaves no window for a.txt:1"),
        (["a.txt:1,b.txt:1"], r"a.txt: holds 2 windows of 16 tokens, 5 were asked for by its weight"),
    ],
)
def test_mixtures_that_cannot_be(tokenizer, tmp_path: Path, monkeypatch, sources: list[str], message: str) -> None:
    """Each is a sentence that names the text: shares are kept, or nothing is drawn."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("x" * 40)
    (tmp_path / "b.txt").write_text("y" * 4000)
    with pytest.raises(DuotoneError, match=message):
        draw_windows(tokenizer, sources, 16, 10, seed=0)


def test_a_weight_is_a_share_of_a_number(tokenizer, text_file: Path) -> None:
    """Without --samples there is nothing to have a share of."""
    with pytest.raises(DuotoneError, match="expected --samples beside it"):
        draw_windows(tokenizer, [f"{text_file}:1"], 16, None, seed=0)


def test_conversations_go_through_the_model_s_template(instructed, tmp_path: Path) -> None:
    """A window is what the template itself gives as tokens: one BOS, before the first turn, and the turns' own ends."""
    path = write_rows(tmp_path / "chat.jsonl", {"messages": TURN_PAIR}, {"messages": TURN_PAIR})
    meant = instructed.apply_chat_template(TURN_PAIR, tokenize=True, return_dict=False)
    assert meant.count(instructed.bos_token_id) == 1
    windows = draw_windows(instructed, [path], len(meant), None, seed=0)
    assert windows.tokens[0].tolist() == meant and windows.rendering == ((TEMPLATE,),)
    text = read(path, instructed)
    assert text == 2 * instructed.apply_chat_template(TURN_PAIR, tokenize=False).removeprefix("<s>")


@pytest.mark.parametrize(
    "row",
    [
        {"messages": TURN_PAIR},
        {
            "conversations": [
                {"from": "human", "value": TURN_PAIR[0]["content"]},
                {"from": "gpt", "value": TURN_PAIR[1]["content"]},
            ]
        },
        {"conversations": TURN_PAIR, "id": 7},
        {"prompt": TURN_PAIR[0]["content"], "response": TURN_PAIR[1]["content"]},
        {"prompt": TURN_PAIR[:1], "completion": TURN_PAIR[1:]},
        {"instruction": TURN_PAIR[0]["content"], "input": "", "output": TURN_PAIR[1]["content"]},
        {"instruction": "What is", "input": "2 + 2?", "output": TURN_PAIR[1]["content"]},
    ],
    ids=lambda row: ",".join(row),
)
def test_ways_to_write_a_conversation(instructed, tokenizer, tmp_path: Path, row: dict[str, Any]) -> None:
    """All are the same two turns, to a template and without one."""
    path = write_rows(tmp_path / "chat.jsonl", row)
    if row.get("input"):
        assert read(path, tokenizer) == "What is\n\n2 + 2?\nFour, I should think."
        return
    assert read(path, instructed) == "<|user|>What is 2 + 2?</s>\n<|assistant|>Four, I should think.</s>\n"
    assert read(path, tokenizer) == "What is 2 + 2?\nFour, I should think."
    assert read_source(TextSource(path), tokenizer).rendering == (TURNS,)


def test_what_is_no_conversation_stays_plain(instructed, tmp_path: Path) -> None:
    """Text, named fields and files of text are not the template's, and what was done is told; so is both."""
    (tmp_path / "a.txt").write_text("plain")
    assert read_source(TextSource(str(tmp_path / "a.txt")), instructed) == SourceText("plain", (PLAIN,))
    path = write_rows(tmp_path / "a.jsonl", {"text": "t", "prompt": "p", "response": "r"})
    assert read(path, instructed) == "t" and read(f"{path}#prompt,response", instructed) == "p\nr"
    path = write_rows(tmp_path / "both.jsonl", {"text": "t"}, {"messages": TURN_PAIR}, {"text": "u"}, {"text": "v"})
    both = read_source(TextSource(path), instructed)
    assert both.rendering == (PLAIN, TEMPLATE) and both.text.startswith("t\n\n<|user|>") and both.text.endswith("</s>\nu\n\nv")


def test_contents_in_parts(tokenizer, tmp_path: Path) -> None:
    """Of a turn in parts the words count; a turn that only calls a tool has none."""
    parts = [{"type": "text", "text": "hi "}, {"type": "text", "text": "there"}]
    path = write_rows(
        tmp_path / "chat.jsonl", {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": None}]}
    )
    assert read(path, tokenizer) == "hi there\n"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [{"role": "system", "content": "x"}]}, r"chat template refuses a conversation of system \(no system\)"),
        ({"messages": [{"content": "x"}]}, r"found the fields \['messages'\]"),
        ({"messages": ["x"]}, r"found the fields \['messages'\]"),
        ({"messages": []}, r"found the fields \['messages'\]"),
        ({"prompt": "x"}, r"found the fields \['prompt'\], expected 'text', or a conversation in"),
        ({"text": None}, r"found the fields \['text'\]"),
    ],
    ids=str,
)
def test_bad_conversations(instructed, tmp_path: Path, row: dict[str, Any], message: str) -> None:
    """One sentence that names the file."""
    with pytest.raises(DuotoneError, match=message) as caught:
        read(write_rows(tmp_path / "chat.jsonl", row), instructed)
    assert "chat.jsonl" in str(caught.value)


def test_jsonl_fields_and_messages(tokenizer, tmp_path: Path) -> None:
    """`text` by default, named fields joined, chat messages without a template joined by line."""
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"t{i}", "question": f"q{i}", "answer": f"a{i}"}) for i in range(2)))
    assert read(str(path), tokenizer) == "t0\n\nt1"
    assert read(f"{path}#question,answer", tokenizer) == "q0\na0\n\nq1\na1"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}))
    assert read(str(path), tokenizer) == "hi\nho"
    path.write_text(json.dumps({"body": "x"}))
    with pytest.raises(DuotoneError, match=r"found the fields \['body'\].*#body"):
        read(str(path), tokenizer)
    path.write_text('{"text": "x"}\n{broken')
    with pytest.raises(DuotoneError, match=r"rows\.jsonl:2: is not valid JSON"):
        read(str(path), tokenizer)


def test_default_sources(tmp_path: Path) -> None:
    """Named texts first, then the model folder's own, then the hub data set llm-compressor users know."""
    assert calibration_sources(["a.txt"], tmp_path) == ("a.txt",)
    assert calibration_sources([], tmp_path) == (DEFAULT_DATASET,)
    (tmp_path / "calibration.txt").write_text("x")
    assert calibration_sources([], tmp_path) == (str(tmp_path / "calibration.txt"),)


def test_hub_data_that_cannot_be_had_names_the_way_out(tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the datasets package, or offline, the sentence names --calibration."""
    import sys

    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DuotoneError, match=r"pip install datasets\).*--calibration FILE"):
        read("owner/name:train", tokenizer)

    class Offline:
        @staticmethod
        def load_dataset(*_: object, **__: object) -> None:
            raise ConnectionError("no network\nsecond line")

    monkeypatch.setitem(sys.modules, "datasets", Offline)
    with pytest.raises(DuotoneError, match=r"cannot be read \(no network\); name a text file with --calibration"):
        read("owner/name:train", tokenizer)


def test_hub_rows_are_read_until_there_is_enough(tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A streamed data set is read only as far as the windows need."""
    import sys

    taken: list[int] = []

    def rows():
        for i in range(10_000):
            taken.append(i)
            yield {"text": "x" * 100}

    class Hub:
        @staticmethod
        def load_dataset(name: str, split: str, streaming: bool):
            assert (name, split, streaming) == ("owner/name", "train_sft", True)
            return rows()

    monkeypatch.setitem(sys.modules, "datasets", Hub)
    assert len(read("owner/name:train_sft", tokenizer, 1000)) == 10 * 100 + 9 * 2
    assert len(taken) == 10
