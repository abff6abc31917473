"""`duotone eval --tasks`: local questions, against counting by hand, and the command line."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import duotone
from duotone.cli import app
from duotone.errors import DuotoneError
from duotone.examining import examine, mcnemar
from duotone.questions import load_gsm8k

ModelMaker = Callable[..., Path]


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    """Twelve sums."""
    path = tmp_path / "sums.jsonl"
    rows = [{"question": f"{i} and {i}?", "answer": f"{i} + {i} = {2 * i}\n#### {2 * i}"} for i in range(12)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_gsm8k_asks_for_the_number(questions: Path, tmp_path: Path) -> None:
    """Its own final number against another question's, in both places in turn."""
    items = load_gsm8k(questions)
    assert [item.choices[item.label] for item in items] == [f" {2 * i}" for i in range(12)]
    assert [item.label for item in items] == [0, 1] * 6
    assert all(item.choices[0] != item.choices[1] for item in items)
    bad = tmp_path / "bad.jsonl"
    for row, message in (
        ({"question": "?", "answer": "4"}, "row 1 has the fields"),
        ({"question": "?", "answer": "#### 4"}, "different"),
    ):
        bad.write_text(json.dumps(row))
        with pytest.raises(DuotoneError, match=message):
            load_gsm8k(bad)


@pytest.mark.parametrize(("better", "worse"), [(0, 0), (3, 0), (5, 2), (4, 4), (0, 9)])
def test_mcnemar_counts_coins(better: int, worse: int) -> None:
    """All ways that the coins can fall, counted one by one."""
    flips = better + worse
    heads = [sum(coins) for coins in itertools.product((0, 1), repeat=flips)]
    middle = flips / 2
    as_uneven = sum(abs(count - middle) >= abs(better - middle) for count in heads)
    assert mcnemar(better, worse) == pytest.approx(as_uneven / 2**flips)


def test_likelihood_by_hand(tiny_model: ModelMaker, questions: Path) -> None:
    """The accuracy is that of summing log-probabilities of the bytes of each choice."""
    folder = tiny_model()
    (found,) = examine(folder, [f"gsm8k={questions}"], reference=folder)
    model = duotone.load(folder, torch.float32)
    right = 0
    for item in load_gsm8k(questions):
        sums = []
        for choice in item.choices:
            ids = torch.tensor([[256, *item.context.encode(), *choice.encode()]])
            with torch.no_grad():
                log_p = model(ids).logits[0, :-1].log_softmax(-1)
            taken = log_p.gather(1, ids[0, 1:, None])[:, 0]
            sums.append(float(taken[-len(choice.encode()) :].sum()))
        right += sums.index(max(sums)) == item.label
    assert found.accuracy == pytest.approx(right / 12)
    assert (found.difference, found.difference_stderr, found.mcnemar_p) == (0, 0, 1)


def test_command_line(tiny_model: ModelMaker, questions: Path, tmp_path: Path) -> None:
    """JSON and table of a quantized model against its original; what is asked wrongly ends in a sentence."""
    duotone.quantize(tiny_model(), tmp_path / "out", method="rtn", group_size=32, device="cpu")
    asked = ["eval", str(tmp_path / "out"), "--tasks", f"gsm8k={questions}", "--reference", str(tiny_model()), "--items", "8"]
    told = CliRunner().invoke(app, [*asked, "--json"])
    (one,) = json.loads(told.stdout)
    assert told.exit_code == 0 and one["items"] == 8
    assert one["difference"] == pytest.approx(one["accuracy"] - one["reference_accuracy"])
    assert "McNemar" in CliRunner().invoke(app, [*asked, "--quiet"]).stdout
    for options, message in (
        (["--tasks", "hellaswag"], "expected one of piqa=PATH"),
        ([], "expected --text FILE, or --tasks"),
        (["--tasks", f"gsm8k={questions}", "--text", str(questions)], "expected --text FILE, or --tasks"),
    ):
        with pytest.raises(DuotoneError, match=message):
            CliRunner().invoke(app, ["eval", str(tmp_path / "out"), *options], catch_exceptions=False, standalone_mode=False)
