"""`duotone report`: facts are those of the checkpoint, the evaluator and the run; files are whole; refusals are clear."""

import contextlib
import dataclasses
import json
import math
import re
import shlex
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import duotone
from duotone.checkpoint.reader import WeightReader, packed_layers
from duotone.checkpoint.source import open_source
from duotone.errors import DuotoneError
from duotone.formats import E4M3FN
from duotone.models.tokenizer import load_tokenizer
from duotone.page import view
from duotone.page.census import take_census
from duotone.page.command import command_of
from duotone.page.facts import Facts, gather
from duotone.page.html import write_html
from duotone.page.markdown import write_markdown
from duotone.page.measured import Comparison, measure
from duotone.page.write import write_report
from duotone.runtime.load import load
from duotone.settings import QuantizeConfig
from tests.page.made import made_facts
from tests.test_cli import invoke, tensor_bytes

QUICK: dict[str, Any] = {"samples": 8, "seq_len": 64, "device": "cpu"}
ModelMaker = Callable[..., Path]


def silent(*_: object) -> None:
    """No progress bar."""


@pytest.fixture(scope="module")
def original(tiny_model: ModelMaker) -> Path:
    """Random weights, large enough that rounding them changes a continuation."""
    return tiny_model(initializer_range=0.2)


@pytest.fixture(scope="module")
def checkpoint(original: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `quantize` made of it."""
    out = tmp_path_factory.mktemp("page") / "out"
    duotone.quantize(original, out, calibration=(str(text_file),), **QUICK)
    return out


def test_the_facts_are_those_of_the_checkpoint(checkpoint: Path, original: Path, text_file: Path, tmp_path: Path) -> None:
    """Bytes as on the disk, errors as in duotone.json, figures as `eval` measures them; the same on the page as in --json."""
    path, measuring = tmp_path / "r.html", ("--text", text_file, "--seq-len", 64, "--samples", 8, "--device", "cpu")
    told = invoke("report", checkpoint, "--out", path, "--original", original, *measuring, "--json").json()
    facts, sidecar = told["facts"], json.loads((checkpoint / "duotone.json").read_text())
    assert told["out"] == str(path) and list(tmp_path.iterdir()) == [path]
    sizes = facts["sizes"]
    assert sizes["codes"] + sizes["scales"] + sizes["kept"] + sizes["other"] == tensor_bytes(checkpoint)
    assert (sizes["original"], sizes["estimated"]) == (tensor_bytes(original), False)
    assert [linear["layer"] for linear in facts["linears"]] == list(sidecar["layers"]), "in the order in which they run"
    for linear in facts["linears"]:
        assert linear["output_error"] == sidecar["layers"][linear["layer"]]["output_error"]
        assert (linear["block"], linear["path"]) == (int(linear["layer"].split(".")[2]), linear["layer"].split(".", 3)[3])
    assert {kept["layer"] for kept in facts["kept"]} == {"model.embed_tokens", "lm_head"}
    figures = invoke("eval", checkpoint, "--reference", original, *measuring, "--json").json()
    assert facts["measured"]["figures"] == figures
    assert math.isclose(sum(facts["measured"]["kl_of_windows"]) / 8, figures["kl"], rel_tol=1e-9)
    assert facts["calibration"] == sidecar["calibration"] and facts["base"] == "tiny"
    page = path.read_text(encoding="utf-8")
    for words in (sidecar["calibration"]["sha256"], view.number(figures["kl"]), *sidecar["layers"], "Cholesky", "vllm"):
        assert words in page, words
    assert set(re.findall(r"https?://[^ '\"]+", page)) == {"http://www.w3.org/2000/svg"} and str(tmp_path) not in page


def test_census(checkpoint: Path) -> None:
    """Counts as a second way of counting gives them; every bin of an E4M3 scale is a value of that format."""
    source = open_source(checkpoint)
    census, reader, layers = take_census(source, silent), WeightReader(source), packed_layers(source)
    weights = [reader.read(layer) for layer in layers]
    assert census.codes == tuple(sum(int((weight.codes == code).sum()) for weight in weights) for code in range(16))
    scales = torch.cat([weight.group_scale.flatten() for weight in weights])
    assert dict(census.scales) == {float(value): int((scales == value).sum()) for value in scales.unique()}
    assert all(E4M3FN.max >= edge == float(torch.tensor(edge).to(torch.float8_e4m3fn)) for edge, _ in census.scales)
    for layer, weight in zip(layers, weights, strict=True):
        shares = torch.bincount(weight.codes.flatten().long()).double() / weight.codes.numel()
        assert census.code_bits[layer] == pytest.approx(float(-(shares * shares.clamp(min=1e-300).log2()).sum()))


def test_continuations_part_where_they_do(bundled: Path, tmp_path: Path) -> None:
    """What both began with, the first token that is not the same and the rest are transformers' own greedy search's."""
    duotone.quantize(bundled, tmp_path / "out", method="rtn", device="cpu")
    prompts = ("To install the package, ", "def main(", "The")
    asked = Comparison(str(bundled), prompts=prompts, new_tokens=24, device="cpu")
    found = measure(str(tmp_path / "out"), asked, silent)
    assert found.figures is None and [one.prompt for one in found.continuations] == list(prompts)
    assert any(one.same_tokens < 24 for one in found.continuations), "quantization that changes nothing"
    tokenizer, models = load_tokenizer(bundled), [load(path, torch.float32, "cpu") for path in (bundled, tmp_path / "out")]
    for one in found.continuations:
        ids = tokenizer(one.prompt, return_tensors="pt")["input_ids"]  # pyright: ignore[reportArgumentType]
        written = [model.generate(ids, max_new_tokens=24, do_sample=False)[0].tolist() for model in models]
        texts = [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in written]
        assert texts == [one.prompt + one.same + "".join(side) for side in (one.original, one.quantized)]
        parted = next((i for i in range(24) if written[0][ids.shape[1] + i] != written[1][ids.shape[1] + i]), 24)
        assert one.same_tokens == parted
        if parted < 24:
            own = [tokenizer.decode(tokens[ids.shape[1] + parted]) for tokens in written]
            marked = (one.original[0], one.quantized[0])
            assert all(mark and (mark == token or "\ufffd" in token) for mark, token in zip(marked, own, strict=True))
            assert one.odds is not None and one.odds[0] >= one.odds[1] > 0


def test_a_model_continues_as_itself(original: Path, text_file: Path) -> None:
    """No token differs, and none of the figures; beginnings come from the text, each a line's where one begins."""
    itself = measure(str(original), Comparison(str(original), (str(text_file),), (), 64, 4, 12, "cpu"), silent)
    assert len(itself.continuations) == 4 and itself.figures is not None and itself.figures["kl"] < 1e-6
    assert all(one.same_tokens == one.new_tokens and one.original == ("", "") for one in itself.continuations)
    assert sum(one.prompt.startswith("The ") for one in itself.continuations) >= 2


CONFIGS = st.builds(
    QuantizeConfig,
    method=st.just("dpq"),
    target=st.sampled_from(["hopper", "gaudi"]),
    group_size=st.sampled_from([32, 128]),
    symmetric=st.booleans(),
    ignore=st.lists(st.sampled_from(["lm_head", "re:.*o_proj$", "a b'c"]), max_size=2).map(tuple),
    calibration=st.sampled_from(
        [("text.txt",), ("a b.txt", "owner/name:split"), ("a.jsonl#question,answer",), ("a.jsonl#q,a:0.7", "owner/name:x:0.3")]
    ),
    samples=st.sampled_from([128, 7]),
    seq_len=st.sampled_from([2048, 64]),
    damping_frac=st.sampled_from([0.01, 0.05, 1e-05]),
    order=st.sampled_from([None, "gar", "none", "act"]),
    effort=st.sampled_from(["default", "high"]),
    rotate=st.booleans(),
    equalize=st.sampled_from([None, 0.5]),
    seed=st.sampled_from([0, 3]),
    device=st.sampled_from(["auto", "cpu"]),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    strict=st.booleans(),
    runtime=st.sampled_from([None, "duotone"]),
    gpu=st.sampled_from(["h100", "cpu"]),
    tensor_parallel=st.sampled_from([1, 2]),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(config=CONFIGS)
def test_the_command_asks_for_what_was_asked(config: QuantizeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read by the command line itself, the command to reproduce gives the settings of the run, the order written out."""
    asked: list[Any] = []

    def stop(model: str, out: Path, config: QuantizeConfig, *_: object, **__: object) -> None:
        asked.append((model, str(out), config))
        raise DuotoneError("seen")

    monkeypatch.setattr("duotone.pipeline.quantize", stop)
    values = dataclasses.asdict(config)
    sidecar = {
        "settings": {k: v for k, v in values.items() if k not in {"calibration", "device", "dtype", "runtime", "gpu"}}
        | {"order": config.solver.order},
        "calibration": {"text": list(config.calibration), "dtype": config.dtype},
    }
    run = {"asked": {name: values[name] for name in ("device", "dtype", "runtime", "gpu")}, "machine": {}}
    words = shlex.split(command_of("owner/base", "out dir", json.loads(json.dumps(sidecar)), run))
    assert words[0] == "duotone" and invoke(*words[1:]).err == "duotone: seen\n"
    ((model, out, found),) = asked
    assert (model, out) == ("owner/base", "out dir") and found.solver == config.solver
    assert dataclasses.replace(found, order=None) == dataclasses.replace(config, order=None)


def test_the_command_names_fields_and_weights(original: Path, text_file: Path, tmp_path: Path) -> None:
    """Run where the texts are, the command that the report gives makes the same bytes: the same rows, fields and shares."""
    rows = [{"question": f"{i} and {i}?", "answer": f"{2 * i}", "rubbish": "x" * 50} for i in range(200)]
    (tmp_path / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "fox.txt").write_text(text_file.read_text())
    mixture = (f"{tmp_path / 'sums.jsonl'}#question,answer:0.75,{tmp_path / 'fox.txt'}:0.25",)
    out, again = tmp_path / "out", tmp_path / "again"
    duotone.quantize(original, out, calibration=mixture, method="gptq", group_size=32, **QUICK)
    facts = invoke("report", out, "--json").json()["facts"]
    assert facts["calibration"]["text"] == ["sums.jsonl#question,answer:0.75", "fox.txt:0.25"]
    assert facts["calibration"]["windows_of"] == [6, 2] and facts["calibration"]["rendering"] == ["plain text"] * 2
    told = "sums.jsonl#question,answer:0.75 (6 windows, plain text); fox.txt:0.25 (2 windows, plain text)"
    assert told in (out / "report.html").read_text() and "fox.txt:0.25" in (out / "README.md").read_text()
    words = shlex.split(facts["command"])
    with contextlib.chdir(tmp_path):
        assert invoke(words[1], original, again, *words[4:], "--quiet").code == 0
    names = ("model.safetensors", "duotone.json")
    assert [(out / name).read_bytes() for name in names] == [(again / name).read_bytes() for name in names]


def test_the_command_of_several_processes() -> None:
    """torchrun, as it was; without calibration no calibration's options."""
    sidecar = {"settings": {"method": "rtn", "samples": 5, "seed": 0, "group_size": 32}, "calibration": None}
    command = command_of("base", "out", sidecar, {"machine": {"number of processes": 2}})
    assert command == "torchrun --nproc-per-node=2 -m duotone quantize base out --method rtn --group-size 32"


@pytest.mark.parametrize("options", [{"method": "rtn"}, {"target": "gaudi"}, {"symmetric": False}], ids=str)
def test_every_kind_of_checkpoint(original: Path, text_file: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    """Without output errors, with BF16 scales, with zero points; and without the records, as another tool leaves it."""
    out = tmp_path / "out"
    texts = {} if "method" in options else {"calibration": (str(text_file),)}
    duotone.quantize(original, out, group_size=32, **QUICK, **texts, **options)
    assert invoke("report", out).out == f"wrote {out / 'report.html'}\n"
    assert "Where it loads" in (out / "report.html").read_text()
    for kind in ("md", "json"):
        assert invoke("report", out, "--format", kind).code == 0
    facts = json.loads((out / "report.json").read_text())
    assert facts["command"].startswith("duotone quantize tiny out --") and facts["recorded"] is False
    if options.get("target") != "gaudi":  # whose scales lie in duotone.json
        for name in ("duotone.json", "duotone-run.json"):
            (out / name).unlink()
        assert invoke("report", out).code == 0
        page = (out / "report.html").read_text()
        assert "No record of how it was made" in page and "No record of errors" in page and "no record tells" in page


def test_the_figures_of_eval_are_taken_up(checkpoint: Path, original: Path, text_file: Path, tmp_path: Path) -> None:
    """What `eval --card` has left is on the page; a damaged record is refused."""
    options = ("--reference", original, "--text", text_file, "--seq-len", 64, "--samples", 4, "--device", "cpu")
    figures = invoke("eval", checkpoint, *options, "--card", "--json").json()
    facts = gather(str(checkpoint), Comparison(), silent)
    record = checkpoint / "duotone-evaluation.json"
    assert facts.recorded and facts.measured is not None and facts.measured.figures == figures
    assert "eval --card" in write_html(facts)
    assert f"| perplexity | {view.number(figures['perplexity'], 5)} |" in write_markdown(facts)
    record.write_text('{"format_version": 1, "figures": []}')
    outcome = invoke("report", checkpoint, "--out", tmp_path / "r.html")
    record.unlink()
    assert outcome.code == 2 and "found figures of []" in outcome.err and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--format", "pdf"), "--format: found 'pdf', expected one of html, md, png, json"),
        (("--out", "nowhere/r.html"), "--out: found no folder nowhere"),
        (("--out", "."), "is a folder, expected a file"),
        (("--prompt", "x"), "--prompt: found no --original beside it"),
        (("--original", "x"), "--original: found neither --text nor --prompt"),
        (("--text", "t", "--new-tokens", "0"), "--new-tokens: found 0"),
        (("--text", "nowhere.txt"), "nowhere.txt: found no such file"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_refusals(checkpoint: Path, arguments: tuple[str, ...], expected: str) -> None:
    """One sentence, and no file."""
    before = sorted(checkpoint.iterdir())
    outcome = invoke("report", checkpoint, *arguments)
    assert outcome.code == 2 and expected in outcome.err and outcome.err.count("\n") == 1
    assert sorted(checkpoint.iterdir()) == before


@pytest.mark.parametrize(
    ("file", "place", "value", "expected"),
    [
        ("duotone.json", ("calibration", "tokens"), "many", "found 'many' as calibration.tokens, expected a value of type int"),
        ("duotone.json", ("settings",), [1], "as settings.method, expected a value of type str/int"),
        ("duotone.json", ("layers", "model.layers.0.mlp.up_proj", "output_error"), "x", "found 'x' as output_error of model"),
        ("duotone-run.json", ("seconds", "solve"), -1, "found -1 as solve of seconds, expected a finite number"),
        ("duotone-run.json", ("peak_bytes",), None, "found None as peak_bytes, expected a value of type int"),
        ("duotone-run.json", ("versions",), [], "found [] as versions, expected a value of type dict"),
    ],
    ids=lambda value: value[-1] if isinstance(value, tuple) else "",
)
def test_damaged_records_are_refused(
    checkpoint: Path, tmp_path: Path, file: str, place: tuple[str, ...], value: object, expected: str
) -> None:
    """One sentence that names the file and what was found in it."""
    good = (checkpoint / file).read_text()
    record = json.loads(good)
    within = record
    for step in place[:-1]:
        within = within[step]
    within[place[-1]] = value
    (checkpoint / file).write_text(json.dumps(record))
    outcome = invoke("report", checkpoint, "--out", tmp_path / "r.html")
    (checkpoint / file).write_text(good)
    assert outcome.code == 2 and file in outcome.err and expected in outcome.err and not list(tmp_path.iterdir())


def test_a_model_that_is_not_quantized_is_refused(original: Path) -> None:
    """There is nothing to report on."""
    outcome = invoke("report", original)
    assert outcome.code == 2 and "is not quantized, expected a checkpoint of duotone quantize" in outcome.err


def test_a_report_is_whole_or_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What stops the writing leaves the report of before, and nothing beside it."""
    path = tmp_path / "report.html"
    path.write_text("before")
    monkeypatch.setattr("duotone.page.write.write_html", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_report(made_facts(1), path, "html")
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]


def test_markdown_keeps_its_tables() -> None:
    """Bars, newlines and tildes of a stranger's names end neither a cell nor a fence; each table has one width."""
    facts = made_facts(3, name="a | b\n# c <b>", notes=("x | y\nz",), command="echo '~~~~' | cat")
    lines = write_markdown(facts).split("\n")
    widths, inside = [], None
    for line in lines:
        if line.startswith("~~~"):
            fence = re.match("~+", line)[0]  # pyright: ignore[reportOptionalSubscript]
            inside = fence if inside is None else None if fence == inside and line == fence else inside
        elif inside is None and line.startswith("|"):
            widths.append(len(re.findall(r"(?<!\\)\|", line)))
        elif widths and inside is None:
            assert len(set(widths)) == 1
            widths = []
    assert inside is None and lines[0] == "# a \\| b # c &lt;b>, W4A8" and "# c" not in {line[:3] for line in lines}
    assert "⟦ was⟧ a cat." in "\n".join(lines) and "| `mlp.down_proj` | 3 |" in "\n".join(lines)


def test_experts_share_a_cell() -> None:
    """Linears that differ in a second number only are one cell: their mean, their worst, and all their bytes."""
    facts = made_facts(2)
    names = [f"mlp.experts.{i}.up" for i in range(2)]
    experts = [
        dataclasses.replace(facts.linears[-1], layer=f"model.layers.1.{name}", path=name, output_error=error)
        for name, error in zip(names, (0.1, 0.3), strict=True)
    ]
    cells = view.cells_of(dataclasses.replace(facts, linears=(*facts.linears, *experts)))
    assert len(cells) == 15 and len(cells[-1].layers) == 2 and cells[-1].path == "mlp.experts.*.up"
    assert cells[-1].mean("output_error") == pytest.approx(0.2) and "0.200, worst 0.300" in cells[-1].tip
    assert cells[-1].output_level == 100 and min(cell.output_level or 0 for cell in cells) == 0
    assert "block 1: mlp.experts.*.up (2)" in write_html(dataclasses.replace(facts, linears=(*facts.linears, *experts)))


@given(st.floats(1e-12, 1e12))
def test_numbers_for_people_are_near(value: float) -> None:
    """Three digits are right to half a unit of the third; no axis ends below what it shows."""
    assert float(view.number(value).replace("\u202f", "")) == pytest.approx(value, rel=0.0051)
    assert value * (1 - 1e-9) <= view._round_up(value) <= 2.01 * value


def test_strips_hold_their_marks() -> None:
    """Means, intervals and windows lie on their axes, the mean inside its interval; a paired difference of 0 is no crash."""
    facts = made_facts(1)
    assert facts.measured is not None and facts.measured.figures is not None
    kl = view.kl_strip(facts.measured.figures, facts.measured.kl_of_windows)
    assert kl.interval is not None and 0 <= kl.interval[0] < kl.mean < kl.interval[1] <= 100
    assert all(0 <= x <= 100 and 0 <= y <= 100 for x, y in kl.dots) and len(kl.dots) == 128
    same = facts.measured.figures | {"nll_difference": 0.0, "nll_difference_stderr": None, "kl": 0.0, "kl_stderr": None}
    strip = view.perplexity_strip(same)
    assert strip is not None and strip.mean == strip.other and view.kl_strip(same, ()).mean == 0


@pytest.mark.skipif(find_spec("matplotlib") is None, reason="pictures need matplotlib (the extra `plot`)")
@pytest.mark.parametrize("changes", [{}, {"linears": (), "run": None, "measured": None}], ids=["whole", "bare"])
def test_png(tmp_path: Path, changes: dict[str, Any]) -> None:
    """A picture of the size that was asked for, of a report with everything and of one with next to nothing."""
    write_report(made_facts(126, name="a $b_$ c", **changes), tmp_path / "r.png", "png")
    head = (tmp_path / "r.png").read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n" and int.from_bytes(head[16:20]) == 12 * 160


@pytest.mark.skipif(find_spec("matplotlib") is not None, reason="matplotlib is installed")
def test_png_without_matplotlib(checkpoint: Path) -> None:
    """A sentence that says what to install."""
    outcome = invoke("report", checkpoint, "--format", "png")
    assert outcome.code == 2 and "pip install 'duotone[plot]'" in outcome.err


def test_facts_are_plain_values() -> None:
    """JSON takes them, and gives them back."""
    facts: Facts = made_facts(2)
    assert json.loads(json.dumps(facts.to_json(), allow_nan=False))["linears"][3]["path"] == "self_attn.o_proj"
