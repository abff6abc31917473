"""`duotone compare`: the evaluator's own figures, another layout of the same codes, the front, and refusals."""

import json
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import duotone
from duotone.comparing import Contender, _beats
from duotone.converting import export_checkpoint
from duotone.page.pareto import pareto_svg
from tests.test_cli import invoke

QUICK: dict[str, Any] = {"samples": 8, "seq_len": 64, "device": "cpu", "group_size": 32}


def contender(name: str, bits: float, kl: float, on_front: bool = False) -> Contender:
    figures = {"kl": kl, "kl_stderr": kl / 10, "perplexity": 1.0, "top1_agreement": 1.0, "reference_perplexity": 1.0}
    return Contender(name, name, "dense", False, 1, bits, figures, [], on_front=on_front)


@pytest.fixture(scope="module")
def made(tiny_model: Callable[..., Path], text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An original, two checkpoints of it, and one of them as GPTQ."""
    folder, original = tmp_path_factory.mktemp("compared"), tiny_model(initializer_range=0.2)
    duotone.quantize(original, folder / "dpq", calibration=(str(text_file),), **QUICK)
    duotone.quantize(original, folder / "rtn", method="rtn", **QUICK)
    export_checkpoint(folder / "dpq", folder / "gptq", "gptq")
    return {"original": original} | {name: folder / name for name in ("dpq", "rtn", "gptq")}


def test_figures_are_the_evaluator_s(made: dict[str, Path], text_file: Path, tmp_path: Path) -> None:
    """Of each checkpoint what `eval` says; codes that lie in another layout give the same; the original stands at KL 0."""
    options = ("--text", text_file, "--seq-len", 64, "--samples", 8, "--device", "cpu")
    models = [made[name] for name in ("dpq", "rtn", "gptq", "original")]
    plot = tmp_path / "front.svg"
    rows = invoke("compare", *models, "--original", made["original"], *options, "--plot", plot, "--json").json()
    for row, name in zip(rows[:2], ("dpq", "rtn"), strict=True):
        evaluated = invoke("eval", made[name], "--reference", made["original"], *options, "--json").json()
        assert row["figures"] == evaluated and row["name"] == name and not row["imported"]
        assert row["reads"] > 0 and row["writes"] > 0
    assert rows[2]["imported"] and rows[2]["layout"] == "gptq" and rows[2]["figures"] == rows[0]["figures"]
    assert rows[3]["layout"] == "dense" and rows[3]["bits"] == 16 and rows[3]["figures"]["kl"] < 1e-6
    assert rows[0]["bits"] < rows[2]["bits"] < 16, "GPTQ holds zero points too"
    assert [row["on_front"] for row in rows] == [True, False, False, True]
    texts = [node.text for node in ElementTree.parse(plot).iter() if node.tag.endswith("text")]
    assert {"dpq", "rtn", "gptq"} <= set(texts)


def test_people_read_a_table(made: dict[str, Path], text_file: Path) -> None:
    """Stars, layouts and no speed where it was not asked for."""
    options = ("--text", text_file, "--seq-len", 64, "--samples", 4, "--no-speed", "--device", "cpu")
    outcome = invoke("compare", made["dpq"], made["rtn"], "--original", made["original"], *options)
    assert outcome.code == 0 and outcome.out.splitlines()[1].startswith("*  dpq") and "tokens/s" not in outcome.out


def test_tasks_of_all(made: dict[str, Path], text_file: Path, tmp_path: Path) -> None:
    """Each task of each checkpoint as `eval` gives it, a column in the table; the original differs from itself by nothing."""
    sums, stories, piqa = tmp_path / "sums.jsonl", tmp_path / "stories.txt", tmp_path / "piqa"
    rows = [{"question": f"{i} and {i}?", "answer": f"#### {2 * i}"} for i in range(12)]
    sums.write_text("\n".join(map(json.dumps, rows)))
    told = "Once upon a time a {0} sat on hill {1}. It liked the {0} sun so much. Then it went home to sleep {1} hours."
    stories.write_text("\n\n".join(told.format(("cat", "dog", "fox")[i % 3], i) for i in range(12)))
    piqa.mkdir()
    (piqa / "valid.jsonl").write_text(
        "\n".join(json.dumps({"goal": f"to {i}", "sol1": "do it", "sol2": "so"}) for i in range(8))
    )
    (piqa / "valid-labels.lst").write_text("0\n1\n" * 4)
    tasks = ("--tasks", f"piqa={piqa}", "--tasks", f"stories={stories}", "--tasks", f"gsm8k={sums}", "--items", 7)
    options = ("--text", text_file, "--seq-len", 64, "--samples", 2, "--device", "cpu")
    command = ("compare", made["dpq"], made["original"], "--original", made["original"], *options, *tasks, "--no-speed")
    dpq, original = invoke(*command, "--json").json()
    evaluated = invoke("eval", made["dpq"], "--reference", made["original"], *tasks, "--device", "cpu", "--json").json()
    assert dpq["tasks"] == evaluated and [(one["task"], one["items"]) for one in evaluated] == [
        ("piqa", 7), ("stories", 7), ("gsm8k", 7)
    ]  # fmt: skip
    assert all((one["difference"], one["mcnemar_p"]) == (0, 1) for one in original["tasks"])
    shown = invoke(*command).out
    assert all(f"{100 * one['value']:.2f} ± {100 * one['stderr']:.2f} %" in shown for one in evaluated)
    assert all(f"{name}, accuracy" in " ".join(shown.split()) for name in ("piqa", "stories", "gsm8k"))


@pytest.mark.parametrize(
    ("names", "options", "expected"),
    [
        (("dpq",), (), "MODELS: found 1, expected two or more"),
        (("dpq", "rtn", "dpq"), (), "twice, expected each once"),
        (("dpq", "rtn"), ("--plot", "nowhere/x.svg"), "--plot: found no folder nowhere"),
        (("dpq", "rtn"), ("--text", "nowhere.txt"), "nowhere.txt: found no such file"),
        (("dpq", "rtn"), ("--original", "rtn"), "is quantized itself"),
        (("dpq", "rtn"), ("--tasks", "chess=x"), "found 'chess=x', expected one of piqa=PATH"),
        (("dpq", "rtn"), ("--tasks", "piqa=nowhere"), "nowhere/valid.jsonl: cannot be read"),
    ],
    ids=["one", "twice", "plot", "text", "original", "task", "questions"],
)
def test_refusals(
    made: dict[str, Path], text_file: Path, names: tuple[str, ...], options: tuple[str, ...], expected: str
) -> None:
    """One sentence each."""
    given_options = tuple(made.get(option, option) for option in options)
    text = () if "--text" in options else ("--text", text_file)
    original = () if "--original" in options else ("--original", made["original"])
    outcome = invoke("compare", *(made[name] for name in names), *original, *text, *given_options, "--seq-len", 64, "--quiet")
    assert outcome.code == 2 and expected in outcome.err and outcome.err.count("\n") == 1


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(0, 5)), min_size=2, max_size=8))
def test_the_front(points: list[tuple[int, int]]) -> None:
    """Nothing on the front is beaten, whatever is not on it is beaten by something that is; every picture is XML."""
    found = [contender(f"<{i}&>", bits, kl / 100) for i, (bits, kl) in enumerate(points)]
    front = [one for one in found if not any(_beats(other, one) for other in found)]
    assert front and all(one in front or any(_beats(other, one) for other in front) for one in found)
    best = min(points)
    assert any((one.bits, one.figures["kl"]) == (best[0], best[1] / 100) for one in front)
    root = ElementTree.fromstring(pareto_svg(found))
    marks = [node for node in root.iter() if node.tag.endswith("circle")]
    assert len(marks) == len(points) and all(40 <= float(mark.get("cy", "0")) <= 400 for mark in marks)
    assert json.dumps([one.figures for one in found])
