"""`duotone eval --tasks`: local questions, against counting by hand, and the command line."""

import itertools
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

import duotone
from duotone.card import task_cells
from duotone.checkpoint.sidecar import EVALUATION_RECORD
from duotone.cli import app
from duotone.errors import DuotoneError
from duotone.examining import compared, examine, mcnemar
from duotone.questions import load_gsm8k
from duotone.tasks import Answers
from tests.test_cli import invoke

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
    assert found.value == pytest.approx(right / 12) and (found.by, found.metric) == ("duotone", "accuracy")
    assert (found.difference, found.difference_stderr, found.mcnemar_p) == (0, 0, 1)


def test_command_line(tiny_model: ModelMaker, questions: Path, tmp_path: Path) -> None:
    """JSON and table of a quantized model against its original; what is asked wrongly ends in a sentence."""
    duotone.quantize(tiny_model(), tmp_path / "out", method="rtn", group_size=32, device="cpu")
    asked = ["eval", str(tmp_path / "out"), "--tasks", f"gsm8k={questions}", "--reference", str(tiny_model()), "--items", "8"]
    told = CliRunner().invoke(app, [*asked, "--json"])
    (one,) = json.loads(told.stdout)
    assert told.exit_code == 0 and one["items"] == 8
    assert one["difference"] == pytest.approx(one["value"] - one["reference_value"])
    assert "McNemar" in CliRunner().invoke(app, [*asked, "--quiet"]).stdout
    for options, message in (
        (["--tasks", "hellaswag=x"], "expected one of piqa=PATH"),
        ([], "expected --text FILE, or --tasks"),
        (["--tasks", f"gsm8k={questions}", "--text", str(questions)], "expected --text FILE, or --tasks"),
    ):
        with pytest.raises(DuotoneError, match=message):
            CliRunner().invoke(app, ["eval", str(tmp_path / "out"), *options], catch_exceptions=False, standalone_mode=False)


def test_without_lm_eval_a_sentence_says_what_to_install(tiny_model: ModelMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names alone are lm-eval's."""
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(DuotoneError, match=r"--tasks hellaswag: needs .*duotone\[eval\]"):
        examine(tiny_model(), ["hellaswag,arc_easy"])


def test_tasks_go_into_card_record_and_report(tiny_model: ModelMaker, questions: Path, text_file: Path, tmp_path: Path) -> None:
    """With --card; beside the text's figures and not in their place; a second time in the place of the first."""
    out, original = tmp_path / "out", tiny_model()
    duotone.quantize(original, out, method="rtn", group_size=32, device="cpu")
    tasks = ("eval", out, "--tasks", f"gsm8k={questions}", "--reference", original, "--card", "--json")
    text = ("eval", out, "--text", text_file, "--seq-len", 64, "--samples", 2, "--card", "--json")
    (row,) = invoke(*tasks, "--items", 6).json()
    assert json.loads((out / EVALUATION_RECORD).read_text()) == {"format_version": 1, "tasks": [row]}
    assert invoke("report", out, "--json").json()["facts"]["measured"] is None
    figures = invoke(*text).json()
    (row,) = invoke(*tasks).json()
    record = json.loads((out / EVALUATION_RECORD).read_text())
    assert record["tasks"] == [row] and row["items"] == 12 and record["figures"] == figures
    facts = invoke("report", out, "--json").json()["facts"]
    assert facts["tasks"] == [row] and facts["measured"]["figures"] == figures
    shown = task_cells(row)
    assert shown[0] == "gsm8k, accuracy" and shown[2].endswith(" %")
    invoke("report", out, "--format", "md")
    for file in ("README.md", "report.html", "report.md"):
        page = (out / file).read_text()
        assert all(cell in page for cell in shown) and f"{figures['perplexity']:.3f}"[:4] in page, file
    (out / EVALUATION_RECORD).write_text(json.dumps(record | {"tasks": [row | {"value": "<b>"}]}))
    outcome = invoke("report", out)
    assert outcome.code == 2 and "expected a list of figures with names" in outcome.err


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=40))
def test_paired_differences(pairs: list[tuple[bool, bool]]) -> None:
    """The difference and its error are those of the items' changes; figures without items have a difference alone."""
    own, original = (
        Answers("t", "lm-eval", "acc", True, len(side), fmean(side), None, tuple(map(float, side)))
        for side in zip(*pairs, strict=True)
    )
    found, changes = compared(own, original), [one - other for one, other in pairs]
    assert found.difference == pytest.approx(fmean(changes)) == pytest.approx(own.value - original.value)
    assert found.difference_stderr == pytest.approx(stdev(changes) / len(changes) ** 0.5)
    assert found.mcnemar_p == mcnemar(changes.count(1), changes.count(-1))
    bare = compared(replace(own, outcomes=()), original)
    assert bare.difference == pytest.approx(found.difference) and bare.difference_stderr is None and bare.mcnemar_p is None
