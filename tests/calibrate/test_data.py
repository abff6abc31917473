"""Text to windows."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from duotone.calibrate.data import draw_windows
from duotone.errors import DuotoneError
from duotone.models.tokenizer import load_tokenizer
from tests.conftest import TEXT

ModelMaker = Callable[..., Path]


@pytest.fixture(scope="module")
def tokenizer(tiny_model: ModelMaker):
    return load_tokenizer(tiny_model())


def test_all_windows_cover_the_text_once(tokenizer, text_file: Path) -> None:
    """count=None: BOS, then the text's bytes in order, nothing twice, only the tail dropped."""
    windows = draw_windows(tokenizer, [str(text_file)], 64, None, seed=0)
    assert windows.tokens[:, 0].tolist() == [256] * len(windows.tokens)
    text = tokenizer.decode(windows.tokens[:, 1:].reshape(-1))
    assert TEXT.startswith(text) and len(TEXT) - len(text) < 63
    assert windows.text_bytes == len(text.encode())


def test_bytes_are_those_of_predicted_tokens(tiny_model: ModelMaker, text_file: Path) -> None:
    """Without a BOS nothing predicts a window's first token, and its bytes do not count (one byte a token here)."""
    tokenizer = load_tokenizer(tiny_model())
    tokenizer.bos_token = None
    windows = draw_windows(tokenizer, [str(text_file)], 32, 6, seed=0)
    assert windows.tokens.shape == (6, 32) and 256 not in windows.tokens
    assert windows.text_bytes == 6 * 31


def test_drawing_is_seeded_and_in_equal_shares(tokenizer, text_file: Path, tmp_path: Path) -> None:
    """The same seed draws the same windows, another seed others; each source gives its share."""
    (tmp_path / "digits.txt").write_text("0123456789 " * 2000)
    sources = [str(text_file), str(tmp_path / "digits.txt")]
    first, again, other = (draw_windows(tokenizer, sources, 32, 9, seed).tokens for seed in (5, 5, 6))
    assert torch.equal(first, again) and not torch.equal(first, other)
    digits = torch.tensor(tokenizer("0123456789 ", add_special_tokens=False)["input_ids"])
    assert [bool(torch.isin(window[1:], digits).all()) for window in first] == [False] * 5 + [True] * 4


def test_thinning_a_long_text_keeps_whole_runs(tokenizer, tmp_path: Path) -> None:
    """Of a text far longer than asked for, windows still come from all over it, and each is a piece of it."""
    lines = [f"line {i} of a long text\n" for i in range(40_000)]
    (tmp_path / "long.txt").write_text("".join(lines))
    windows = draw_windows(tokenizer, [str(tmp_path / "long.txt")], 64, 40, seed=0)
    assert len(windows.tokens) == 40 and not windows.notes
    seen = [
        int(word)
        for window in windows.tokens
        for word in tokenizer.decode(window[1:]).split()
        if word.isdigit() and len(word) == 5
    ]
    assert min(seen) < 15_000 and max(seen) > 35_000
    assert draw_windows(tokenizer, [str(tmp_path / "long.txt")], 64, 40, seed=0).sha256 == windows.sha256


def test_too_few_windows_are_noted(tokenizer, text_file: Path) -> None:
    """Fewer windows than asked for is said, not hidden."""
    windows = draw_windows(tokenizer, [str(text_file)], 128, 100_000, seed=0)
    assert 100 < len(windows.tokens) < 1000
    assert f"holds {len(windows.tokens)} windows" in windows.notes[0]


@pytest.mark.parametrize(
    ("source", "message"),
    [("short.txt", "found 3 tokens of text, expected at least one sequence of 16"), ("absent.txt", "found no such file")],
)
def test_bad_sources(tokenizer, tmp_path: Path, source: str, message: str) -> None:
    """Each is one sentence that names the text."""
    (tmp_path / "short.txt").write_text("abc")
    with pytest.raises(DuotoneError, match=message) as caught:
        draw_windows(tokenizer, [str(tmp_path / source)], 16, 4, seed=0)
    assert source in str(caught.value)
