"""lm-evaluation-harness takes our model as it takes any other, and its tasks are put by `duotone eval`."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import duotone
from duotone.errors import DuotoneError
from duotone.examining import examine, mcnemar
from duotone.harness import load_tasks
from duotone.models.tokenizer import load_tokenizer
from duotone.runtime.load import load
from tests.test_cli import invoke

harness = pytest.importorskip("lm_eval", reason="lm-eval is not installed (duotone[eval])")


def test_likelihoods(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    """HFLM(pretrained=model): the log-likelihood of a continuation is what the model's own logits say."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    out = tmp_path / "out"
    duotone.quantize(tiny_model(), out, method="rtn", device="cpu")
    model, tokenizer = load(out, device="cpu"), load_tokenizer(out)
    context, continuation = "The red fox", " jumps over"
    asked = [Instance("loglikelihood", {}, (context, continuation), 0)]
    ((found, _),) = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1).loglikelihood(asked, disable_tqdm=True)
    before = len(tokenizer(context)["input_ids"])
    tokens = tokenizer(context + continuation, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logp = torch.log_softmax(model(tokens).logits[0].float(), -1)
    meant = sum(float(logp[i - 1, tokens[0, i]]) for i in range(before, tokens.shape[1]))
    assert found == pytest.approx(meant, rel=0.01)


TASK = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {folder}/sums.jsonl}}
  cache_dir: {folder}/cache
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
doc_to_target: {target}
target_delimiter: ""
{more}
"""
#: Kinds of tasks: what the harness sums up as right or wrong, and as something else.
KINDS = {
    "sums": ("multiple_choice", "label", 'doc_to_choice: "{{choices}}"\nmetric_list: [{metric: acc}, {metric: acc_norm}]'),
    "texts": ("loglikelihood_rolling", '"{{question}}"', "metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]"),
    "written": (
        "generate_until", '"{{question}}"',
        "generation_kwargs: {until: ['.'], max_gen_toks: 4}\nmetric_list: [{metric: exact_match}]\n"
        "filter_list: [{name: first, filter: [{function: take_first}]}]",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def task_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Tasks of the harness over a local file, and a group of two of them."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [{"question": f"{i} and {i} make", "choices": [f" {2 * i}", f" {2 * i + 1}"], "label": i % 2} for i in range(10)]
    (folder / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name, (kind, target, more) in KINDS.items():
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, folder=folder, kind=kind, target=target, more=more))
    return {name: str(folder / f"{name}.yaml") for name in KINDS}


@pytest.fixture(scope="module")
def models(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint, rounded coarsely so that answers change, and its original."""
    out, original = tmp_path_factory.mktemp("harness") / "out", tiny_model(initializer_range=0.2)
    duotone.quantize(original, out, method="rtn", device="cpu")
    return out, original


def test_a_task_file(models: tuple[Path, Path], task_files: dict[str, str]) -> None:
    """A figure for each metric, as the harness itself has it of the same model, with its error; McNemar's test of the pairs."""
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    out, original = models
    acc, norm = examine(out, [task_files["sums"]], original, 8, device="cpu")
    for row, metric in ((acc, "acc"), (norm, "acc_norm")):
        assert (row.task, row.by, row.metric, row.is_share, row.items) == ("sums", "lm-eval", metric, True, 8)
        assert row.difference is not None and row.difference_stderr is not None and row.mcnemar_p is not None
    theirs: list[Any] = []
    for folder in models:
        model = HFLM(pretrained=load(folder, torch.float32, "cpu"), tokenizer=load_tokenizer(folder), batch_size=2)
        manager = TaskManager(include_defaults=False)
        theirs.append(harness.simple_evaluate(model, tasks=[task_files["sums"]], task_manager=manager, limit=8))
    results = [one["results"]["sums"] for one in theirs]
    assert (acc.value, acc.stderr) == (results[0]["acc,none"], pytest.approx(results[0]["acc_stderr,none"]))
    assert (acc.reference_value, norm.reference_value) == (results[1]["acc,none"], results[1]["acc_norm,none"])
    ours, others = ([sample["acc"] for sample in one["samples"]["sums"]] for one in theirs)
    changes = [one - other for one, other in zip(ours, others, strict=True)]
    assert acc.mcnemar_p == mcnemar(changes.count(1), changes.count(-1)) and acc.difference == pytest.approx(sum(changes) / 8)


def test_what_is_not_right_or_wrong(models: tuple[Path, Path], task_files: dict[str, str]) -> None:
    """Perplexities have no pairs to test; what a filter leaves is named by it; names between commas are several tasks."""
    out, _ = models
    rows = examine(out, [f"{task_files['texts']},{task_files['written']}"], out, 4, device="cpu")
    by_metric = {row.metric: row for row in rows}
    assert set(by_metric) == {"word_perplexity", "bits_per_byte", "exact_match (first)"}
    perplexity, match = by_metric["word_perplexity"], by_metric["exact_match (first)"]
    assert not perplexity.is_share and perplexity.value > 1 and perplexity.difference == 0 and perplexity.mcnemar_p is None
    assert match.is_share and (match.value, match.mcnemar_p) == (0, 1)


def test_beside_a_local_task(models: tuple[Path, Path], task_files: dict[str, str], tmp_path: Path) -> None:
    """One command, one table, one record: the harness's after ours; nothing but JSON on standard output."""
    out, original = models
    sums = tmp_path / "own.jsonl"
    sums.write_text("\n".join(json.dumps({"question": f"{i}?", "answer": f"#### {i}"}) for i in range(6)))
    asked = ("eval", out, "--tasks", task_files["sums"], "--tasks", f"gsm8k={sums}", "--reference", original)
    rows = invoke(*asked, "--card", "--json", "--device", "cpu").json()
    assert [(row["task"], row["by"]) for row in rows] == [("gsm8k", "duotone"), ("sums", "lm-eval"), ("sums", "lm-eval")]
    assert invoke("report", out, "--json").json()["facts"]["tasks"] == rows
    assert "sums, acc_norm (lm-eval)" in (out / "report.html").read_text()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere.yaml", "found no task file nowhere.yaml"),
        ("{folder}/bad.yaml", r"bad.yaml: lm-eval cannot load it \("),
        ("{folder}/gone.yaml", r"gone.yaml: lm-eval cannot load it \("),
    ],
)
def test_tasks_that_cannot_be_put(task_files: dict[str, str], name: str, message: str) -> None:
    """One sentence each, before any model is loaded."""
    folder = Path(task_files["sums"]).parent
    (folder / "bad.yaml").write_text("task: [")
    gone = Path(task_files["sums"]).read_text().replace("sums.jsonl", "gone.jsonl").replace("task: sums", "task: gone")
    (folder / "gone.yaml").write_text(gone)
    with pytest.raises(DuotoneError, match=message):
        load_tasks([name.format(folder=folder)])


@pytest.mark.slow
def test_a_name_that_the_harness_does_not_know() -> None:
    """The closest names are told; to read all that it knows takes ten seconds."""
    with pytest.raises(DuotoneError, match=r"found 'hellaswagg', expected .*; the closest are hellaswag"):
        load_tasks(["hellaswagg"])
