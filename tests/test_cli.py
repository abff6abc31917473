"""The command line in process: what each command prints, and what it leaves on the disk."""

import contextlib
import dataclasses
import io
import json
import math
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.main
from safetensors import safe_open

from duotone import cli
from duotone.kernels import dispatch
from duotone.scheme import HOPPER, Scheme

CALIBRATED = ("--seq-len", "64", "--samples", "8")


@dataclass(frozen=True)
class Outcome:
    """How a command ended and what it printed."""

    code: int
    out: str
    err: str

    def json(self) -> Any:
        """The one line of standard output, as JSON that any reader takes: no NaN, no Infinity."""
        assert self.code == 0, self.err
        assert self.out.count("\n") == 1
        return json.loads(self.out, parse_constant=_no_json)


def _no_json(constant: str) -> None:
    raise AssertionError(f"{constant} is no JSON")


def invoke(*arguments: object) -> Outcome:
    """Run `duotone ARGUMENTS` through its entry point, in this process."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", ["duotone", *(str(argument) for argument in arguments)])
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return Outcome(code, out.getvalue(), err.getvalue())


def tensor_bytes(folder: Path) -> int:
    """Bytes of all tensors of a folder's safetensors files: all but the headers."""
    total = 0
    for file in folder.glob("*.safetensors"):
        content = file.read_bytes()
        total += len(content) - 8 - struct.unpack("<Q", content[:8])[0]
    return total


@pytest.fixture(scope="module")
def original(tiny_model: Callable[..., Path]) -> Path:
    """A model nobody has quantized."""
    return tiny_model()


@pytest.fixture(scope="module")
def quantized(original: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    """The checkpoint that `duotone quantize --json` made of it, and what the command printed."""
    out = tmp_path_factory.mktemp("cli") / "out"
    return out, invoke("quantize", original, out, "--calibration", text_file, *CALIBRATED, "--json")


def commands() -> Iterator[tuple[str, ...]]:
    """Every command there is, groups' commands included."""
    pending: list[tuple[tuple[str, ...], Any]] = [((), typer.main.get_command(cli.app))]
    while pending:
        path, command = pending.pop()
        if hasattr(command, "commands"):
            pending += [((*path, name), member) for name, member in command.commands.items()]
        else:
            yield path


def test_all_commands_are_found() -> None:
    """The walk that the help tests rely on sees the commands of the blueprint, nested ones too."""
    expected = {
        ("quantize",),
        ("eval",),
        ("generate",),
        ("inspect",),
        ("explain",),
        ("check",),
        ("bench", "accuracy"),
        ("bench", "linear"),
    }
    assert expected <= set(commands())


@pytest.mark.parametrize("command", sorted(commands()), ids=" ".join)
def test_help_shows_an_example(command: tuple[str, ...]) -> None:
    """`--help` succeeds and shows an example that begins with the command's own name."""
    outcome = invoke(*command, "--help")
    assert (outcome.code, outcome.err) == (0, "")
    assert "Example" in outcome.out
    assert f"duotone {' '.join(command)} " in outcome.out.partition("Example")[2]


def test_help_lists_the_commands() -> None:
    """`duotone --help` names every command or group."""
    outcome = invoke("--help")
    assert outcome.code == 0
    for command in commands():
        assert command[0] in outcome.out


def test_quantize_json(quantized: tuple[Path, Outcome], original: Path) -> None:
    """The fields of QuantizeReport, its figures those of the run, and what each phase took at least; nothing on stderr."""
    from duotone.outcome import QuantizeReport

    out, outcome = quantized
    report = outcome.json()
    assert set(report) == {field.name for field in dataclasses.fields(QuantizeReport)} | {"floor_seconds"}
    assert outcome.err == ""
    assert (report["model"], report["out"]) == (str(original), str(out))
    assert len(report["layers"]) == 2 * 7
    assert set(report["kept"]) == {"lm_head"}
    assert report["weight_bytes"] == tensor_bytes(out)
    assert report["original_bytes"] == tensor_bytes(original)
    assert report["calibration"]["tokens"] == 64 * 8
    assert report["config"]["method"] == "dpq"
    assert report["peak_bytes"] > 0
    assert 4 < report["bits_per_weight"] < 5
    assert sum(report["seconds"].values()) > 0


def test_quantize_leaves_a_model_folder(quantized: tuple[Path, Outcome], original: Path) -> None:
    """Weights, config, sidecar and the tokenizer's files byte for byte; nothing half-written, nothing beside the folder."""
    out, _ = quantized
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    present = {file.name for file in out.iterdir()}
    assert {"model.safetensors", "config.json", "duotone.json", "tokenizer.json"} <= present
    assert not any("partial" in name for name in present)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (original / name).read_bytes()


def test_quantize_prints_a_summary(original: Path, tmp_path: Path) -> None:
    """Without --json a person reads the folder, the method and what was left in BF16."""
    outcome = invoke("quantize", original, tmp_path / "out", "--method", "rtn", "--ignore", "re:.*down_proj")
    assert outcome.code == 0
    for part in ("rtn, target hopper, group size 128", "bits per weight", "lm_head", "ignored by the rule re:.*down_proj"):
        assert part in outcome.out
    assert "\x1b" not in outcome.out + outcome.err, "a pipe gets no colors"


def test_effort_reaches_the_run(
    tiny_model: Callable[..., Path],
    quantized: tuple[Path, Outcome],
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`--effort high` is what is reported and stored, and what was done; without it, `default`."""
    monkeypatch.setattr("duotone.solver.couple.BEAM_WIDTH", 1)
    source = tiny_model(hidden_size=64, intermediate_size=96, head_dim=16)
    arguments = (source, tmp_path / "out", "--calibration", text_file, *CALIBRATED, "--json")
    report = invoke("quantize", *arguments, "--effort", "high").json()
    assert report["config"]["effort"] == "high"
    assert json.loads((tmp_path / "out" / "duotone.json").read_text())["settings"]["effort"] == "high"
    assert report["seconds"]["curvature"] > 0
    default = quantized[1].json()
    assert default["config"]["effort"] == "default"
    assert "curvature" not in default["seconds"]


def test_transforms_reach_the_run(
    tiny_model: Callable[..., Path], quantized: tuple[Path, Outcome], text_file: Path, tmp_path: Path
) -> None:
    """`--rotate` and `--equalize` are what is reported, stored, foreseen and shown by inspect; without them, nothing of it."""
    source = tiny_model(hidden_size=64, intermediate_size=96, head_dim=16, tie_word_embeddings=True)
    arguments = ("quantize", source, tmp_path / "out", "--calibration", text_file, *CALIBRATED, "--json")
    arguments += ("--rotate", "--equalize", "0.25")
    foreseen, report = invoke(*arguments, "--dry-run").json(), invoke(*arguments).json()
    settings = json.loads((tmp_path / "out" / "duotone.json").read_text())["settings"]
    for stored in (report["config"], settings):
        assert (stored["rotate"], stored["equalize"]) == (True, 0.25)
    assert foreseen["disk_bytes"] == report["weight_bytes"] == tensor_bytes(tmp_path / "out")
    assert [note.split()[0] for note in report["notes"][:3]] == ["rotated:", "lm_head", "equalized:"]
    assert report["notes"] == invoke("inspect", tmp_path / "out", "--json").json()["notes"]
    assert foreseen["notes"][:3] == report["notes"][:3]
    default = quantized[1].json()
    assert (default["config"]["rotate"], default["config"]["equalize"]) == (False, None)
    assert not any(note.startswith(("rotated", "equalized")) for note in default["notes"])


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--equalize", "0"), "--equalize: found 0.0, expected a number above 0 and at most 1 (0.5 is usual)"),
        (("--equalize", "nan"), "--equalize: found nan, expected a number above 0 and at most 1 (0.5 is usual)"),
        (("--equalize", "0.5", "--method", "rtn"), "--equalize: found --method rtn, expected one that looks at its inputs"),
    ],
)
def test_transforms_that_cannot_be(original: Path, tmp_path: Path, options: tuple[str, ...], sentence: str) -> None:
    """One sentence before any work."""
    outcome = invoke("quantize", original, tmp_path / "out", *options)
    assert (outcome.code, outcome.out) == (2, "") and outcome.err.startswith(f"duotone: {sentence}")
    assert outcome.err.count("\n") == 1 and list(tmp_path.iterdir()) == []


def test_dry_run(quantized: tuple[Path, Outcome], original: Path, tmp_path: Path) -> None:
    """Nothing is written, and what is foreseen is what the run then took: bytes exactly, the layers and the one kept."""
    out, outcome = quantized
    report = outcome.json()
    foreseen = invoke("quantize", original, tmp_path / "out", "--dry-run", "--json", *CALIBRATED).json()
    assert list(tmp_path.iterdir()) == []
    assert foreseen["disk_bytes"] == tensor_bytes(out)
    assert foreseen["seconds"] > 0
    assert foreseen["peak_bytes"] > tensor_bytes(original)
    assert list(foreseen["kept"]) == ["lm_head"]
    assert foreseen["linears"] == len(report["layers"])
    for figure in ("bits_per_weight", "quantized_macs_share", "kept"):
        assert foreseen[figure] == report[figure]


@pytest.mark.parametrize("options", [("--group-size", "64"), ("--asymmetric",), ("--target", "gaudi"), ("--group-size", "96")])
def test_dry_run_knows_the_bytes(original: Path, text_file: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    """Disk bytes are exact for other schemes too, a group that does not divide K included."""
    arguments = (original, tmp_path / "out", "--method", "rtn", "--calibration", text_file, *CALIBRATED, "--json", *options)
    foreseen = invoke("quantize", *arguments, "--dry-run").json()
    assert not (tmp_path / "out").exists()
    report = invoke("quantize", *arguments).json()
    assert foreseen["disk_bytes"] == report["weight_bytes"] == tensor_bytes(tmp_path / "out")


def test_dry_run_prints_a_summary(original: Path, tmp_path: Path) -> None:
    """Time, memory and disk for a person."""
    outcome = invoke("quantize", original, tmp_path / "out", "--dry-run")
    assert outcome.code == 0
    for part in ("time", "peak memory", "disk", "lm_head"):
        assert part in outcome.out


def evaluate(*arguments: object) -> dict[str, Any]:
    """What `duotone eval --json` prints."""
    return invoke("eval", *arguments, "--seq-len", "64", "--json").json()


def test_eval_json(quantized: tuple[Path, Outcome], original: Path, text_file: Path) -> None:
    """All figures, finite, against a reference; perplexity and bits a byte are the same quantity in two units."""
    result = evaluate(quantized[0], "--text", text_file, "--reference", original, "--samples", "6")
    assert {"perplexity", "bits_per_byte", "kl", "kl_stderr", "top1_agreement", "tokens"} <= set(result)
    assert result["tokens"] == 6 * 63
    assert 1 < result["perplexity"] < 10_000
    assert 0 < result["kl"] < 1
    assert 0 < result["kl_stderr"] < result["kl"]
    assert 0.2 < result["top1_agreement"] < 1
    # The tokenizer is one token a byte of ASCII: bits a byte are bits a token.
    assert result["bits_per_byte"] == pytest.approx(math.log2(result["perplexity"]), rel=1e-6)


def test_eval_of_the_original_against_itself(original: Path, text_file: Path) -> None:
    """No distance: KL exactly 0, agreement exactly 1."""
    result = evaluate(original, "--text", text_file, "--reference", original, "--samples", "2")
    assert (result["kl"], result["top1_agreement"]) == (0, 1)
    assert result["perplexity"] == result["reference_perplexity"]


def test_eval_without_a_reference(original: Path, text_file: Path) -> None:
    """The distance is null, not a number that means nothing."""
    result = evaluate(original, "--text", text_file, "--samples", "2")
    assert result["perplexity"] > 1
    assert (result["kl"], result["kl_stderr"], result["top1_agreement"]) == (None, None, None)


def test_eval_of_one_window(original: Path, text_file: Path) -> None:
    """One window has no spread to measure; what is printed is JSON all the same (Outcome.json refuses Infinity)."""
    result = evaluate(original, "--text", text_file, "--reference", original, "--samples", "1")
    assert result["kl"] == 0


def test_eval_prints_a_summary(original: Path, text_file: Path) -> None:
    """Without --json, a person reads the figures."""
    outcome = invoke("eval", original, "--text", text_file, "--reference", original, "--seq-len", "64", "--samples", "2")
    assert outcome.code == 0
    for part in ("perplexity", "bits per byte", "KL to reference", "top-1 agreement"):
        assert part in outcome.out


def test_inspect_json(quantized: tuple[Path, Outcome]) -> None:
    """Totals are the file's bytes, summed here from its header; each quantized layer has its scheme, bytes and error."""
    out, outcome = quantized
    facts = invoke("inspect", out, "--json").json()
    sizes: dict[str, int] = {}
    with safe_open(out / "model.safetensors", framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - not a dict
            tensor = file.get_tensor(name)
            sizes[name] = tensor.numel() * tensor.element_size()
    assert facts["total_bytes"] == sum(sizes.values()) == tensor_bytes(out)
    packed = {name: size for name, size in sizes.items() if "_proj.weight_" in name}
    assert facts["quantized_bytes"] == sum(packed.values())
    quantized_layers = [layer for layer in facts["layers"] if layer["scheme"] == "w4a8 hopper g128"]
    assert len(quantized_layers) == 2 * 7
    for layer in quantized_layers:
        assert layer["nbytes"] == sum(size for name, size in packed.items() if name.startswith(f"{layer['layer']}."))
        assert 0 < layer["output_error"] < 0.1
        assert layer["kept_because"] is None
    others = {layer["layer"]: layer for layer in facts["layers"] if layer["scheme"] == "BF16"}
    assert set(others) == {"lm_head", "model.embed_tokens"}
    assert others["lm_head"]["nbytes"] == sizes["lm_head.weight"]
    assert "output head" in others["lm_head"]["kept_because"]
    assert facts["bits_per_weight"] == pytest.approx(outcome.json()["bits_per_weight"])


def test_inspect_of_an_original(original: Path) -> None:
    """An ordinary model folder has no quantized layer, all its matrices are listed, and nothing was kept for a reason."""
    facts = invoke("inspect", original, "--json").json()
    assert facts["total_bytes"] == tensor_bytes(original)
    assert (facts["quantized_bytes"], facts["bits_per_weight"], facts["calibration"]) == (0, 0, None)
    assert len(facts["layers"]) == 2 * 7 + 2
    assert {(layer["scheme"], layer["kept_because"]) for layer in facts["layers"]} == {("BF16", None)}


def test_inspect_prints_a_table(quantized: tuple[Path, Outcome]) -> None:
    """Every layer on a line, with its shape, through a pipe too."""
    outcome = invoke("inspect", quantized[0])
    assert outcome.code == 0
    lines = [line for line in outcome.out.splitlines() if line.startswith("model.layers.1.mlp.down_proj")]
    assert len(lines) == 1
    assert "128 x 256" in lines[0]
    assert "w4a8 hopper g128" in lines[0]


def test_inspect_says_what_multiplies(quantized: tuple[Path, Outcome], original: Path) -> None:
    """The backend of this machine, in JSON and in the table, and why no faster one; an ordinary folder has none."""
    verdict = dispatch.explain(Scheme(HOPPER, 128), torch.device("cpu"))
    facts = invoke("inspect", quantized[0], "--json").json()
    assert (facts["backend"], tuple(facts["refusals"])) == (verdict.runs, verdict.refusals)
    assert f"multiplied here by  {verdict.runs}" in invoke("inspect", quantized[0]).out
    assert invoke("inspect", original, "--json").json()["backend"] is None
    assert "multiplied" not in invoke("inspect", original).out


def test_explain_json(quantized: tuple[Path, Outcome]) -> None:
    """One object: each linear with its kernel, and each kernel with its share, the same kernel that `inspect` names."""
    facts = invoke("explain", quantized[0], "--device", "cpu", "--json").json()
    assert len(facts["layers"]) == 2 * 7 + 1 and facts["device"] == "cpu"
    inspected = invoke("inspect", quantized[0], "--json").json()
    assert (facts["kernels"][0]["runs"], facts["kernels"][0]["refusals"]) == (inspected["backend"], inspected["refusals"])
    assert facts["kernels"][0]["macs_share"] == pytest.approx(quantized[1].json()["quantized_macs_share"])
    by_name = {layer["layer"]: layer for layer in facts["layers"]}
    assert by_name["model.layers.1.mlp.down_proj"]["shape"] == [128, 256]
    assert by_name["lm_head"]["kept_because"] == next(x for x in inspected["layers"] if x["layer"] == "lm_head")["kept_because"]


def test_explain_of_what_is_no_model(tmp_path: Path) -> None:
    """Exit code 2 and one sentence: an empty folder, a folder that is not there, a device that nobody has."""
    for arguments, found in (
        ((tmp_path,), f"{tmp_path / 'config.json'}: found no such file"),
        ((tmp_path / "absent",), f"{tmp_path / 'absent'}: found no such folder"),
        ((tmp_path, "--device", "tpu"), "--device: found 'tpu', expected auto, cpu, cuda or cuda:N"),
    ):
        outcome = invoke("explain", *arguments)
        assert (outcome.code, outcome.out) == (2, "") and outcome.err.count("\n") == 1
        assert outcome.err.startswith(f"duotone: {found}")


def test_explain_prints_like_layers_together(original: Path, tmp_path: Path) -> None:
    """One line for the layers of all blocks, unless one of them stays BF16; the work that each kernel does, and refusals."""
    ignored = "model.layers.1.mlp.up_proj"
    options = ("--method", "rtn", "--group-size", 16, "--ignore", ignored, "--quiet")
    assert invoke("quantize", original, tmp_path / "out", *options).code == 0
    outcome = invoke("explain", tmp_path / "out", "--device", "cpu")
    assert (outcome.code, outcome.err) == (0, "")
    lines = [line.split() for line in outcome.out.splitlines()]
    gate, *ups = (line for line in lines if line and line[0] in ("model.layers.*.mlp.gate_proj", "model.layers.*.mlp.up_proj"))
    assert gate[1:5] == ["2", "256", "x", "128"] and [up[1] for up in ups] == ["1", "1"]
    assert "plain torch: exact, not fast" in outcome.out and f"ignored by the rule {ignored}" in " ".join(outcome.out.split())
    assert "refused: cpu: " in outcome.out
    share = invoke("explain", tmp_path / "out", "--json").json()["kernels"][0]["macs_share"]
    assert f"{100 * share:.1f} % of multiply-accumulates, linears: 13" in outcome.out


def generate(model: Path, *options: str) -> Outcome:
    """A short continuation of a fixed prompt."""
    return invoke("generate", model, "The red fox", "--max-new-tokens", "5", *options)


def test_generate_json(quantized: tuple[Path, Outcome]) -> None:
    """One object with the text, its length and the speed; standard error is silent, and a second run says the same."""
    outcome = generate(quantized[0], "--json")
    result = outcome.json()
    assert set(result) == {"text", "new_tokens", "tokens_per_second"}
    assert 1 <= result["new_tokens"] <= 5
    assert result["tokens_per_second"] > 0
    assert isinstance(result["text"], str)
    assert outcome.err == ""
    assert generate(quantized[0], "--json").json()["text"] == result["text"]


def test_generate_samples_by_seed(original: Path) -> None:
    """With a temperature the seed decides: the same one gives the same text, another one another."""
    texts = [generate(original, "--json", "--temperature", "2", "--seed", seed).json()["text"] for seed in ("1", "1", "2")]
    assert texts[0] == texts[1] != texts[2]


def test_generate_prints_text_and_speed_apart(original: Path) -> None:
    """The text goes to standard output, the speed to standard error, and --quiet leaves only the text."""
    spoken, quiet = generate(original), generate(original, "--quiet")
    assert spoken.code == quiet.code == 0
    assert spoken.out == quiet.out != ""
    assert "tokens/s" in spoken.err
    assert "tokens/s" not in spoken.out
    assert quiet.err == ""


def test_order_and_refreshed_scales_reach_the_run(original: Path, text_file: Path, tmp_path: Path) -> None:
    """Both are stored with the checkpoint and change its weights; refreshed scales bring the order that they need."""
    weights, settings = [], []
    asked = ((), ("--order", "gar"), ("--refresh-scales",), ("--order", "min-pivot"))
    for i, options in enumerate(asked):
        arguments = ("quantize", original, tmp_path / str(i), "--calibration", text_file, "--group-size", 32, *CALIBRATED)
        assert invoke(*arguments, *options, "--quiet").code == 0
        weights.append((tmp_path / str(i) / "model.safetensors").read_bytes())
        settings.append(json.loads((tmp_path / str(i) / "duotone.json").read_text())["settings"])
    assert [(its["order"], its["refresh_scales"]) for its in settings] == [
        ("act", False), ("gar", False), ("gar", True), ("min-pivot", False),
    ]  # fmt: skip
    assert len(set(weights)) == len(asked)


def test_refreshed_scales_are_for_dpq(original: Path, tmp_path: Path) -> None:
    """Another method, or an order that scatters groups, is one sentence before any work."""
    for options, found in (
        (("--method", "gptq"), "--method gptq, expected dpq"),
        (("--order", "act"), "--order act, expected gar"),
    ):
        outcome = invoke("quantize", original, tmp_path / "out", "--refresh-scales", *options)
        assert outcome.code == 2 and outcome.err.startswith(f"duotone: --refresh-scales: found {found}")
    assert not (tmp_path / "out").exists()


def test_dtype_reaches_the_run(original: Path, quantized: tuple[Path, Outcome], text_file: Path, tmp_path: Path) -> None:
    """`--dtype` is what calibration ran in and what is reported of it; another word is one sentence before any work."""
    arguments = ("quantize", original, tmp_path / "out", "--calibration", text_file, *CALIBRATED, "--json", "--dtype")
    report = invoke(*arguments, "bfloat16").json()
    assert (report["config"]["dtype"], report["calibration"]["dtype"]) == ("bfloat16", "bfloat16")
    assert json.loads((tmp_path / "out" / "duotone.json").read_text())["calibration"]["dtype"] == "bfloat16"
    default = quantized[1].json()
    assert (default["config"]["dtype"], default["calibration"]["dtype"]) == ("auto", "float32")
    outcome = invoke("quantize", original, tmp_path / "none", "--dtype", "float16")
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err == "duotone: --dtype: found 'float16', expected one of auto, float32, bfloat16\n"
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("silencer", ["--quiet", "--json"])
@pytest.mark.parametrize("command", ["quantize", "eval"])
def test_no_bar_when_quiet(
    command: str, silencer: str, original: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a terminal there is a bar on standard error; with --quiet or --json there is none."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    arguments = {
        "quantize": lambda out: ("quantize", original, tmp_path / out, "--method", "rtn"),
        "eval": lambda out: ("eval", original, "--text", text_file, "--seq-len", 64, "--samples", 2),  # noqa: ARG005
    }[command]
    shown, hidden = invoke(*arguments("a")), invoke(*arguments("b"), silencer)
    assert shown.code == hidden.code == 0
    title = {"quantize": "quantizing", "eval": "evaluating"}[command]
    assert title in shown.err
    assert title not in shown.out
    assert hidden.err == ""


@pytest.mark.parametrize("code", ["import duotone", "import duotone.cli", "from duotone import DuotoneError"])
def test_importing_is_light(code: str) -> None:
    """The package and its command line import without torch and transformers, which take seconds."""
    probe = f"{code}; import sys; print(*({{'torch', 'transformers', 'safetensors', 'huggingface_hub'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.split() == []


def test_help_is_light() -> None:
    """`python -m duotone --help` succeeds, and among all modules it imports there is neither torch nor transformers."""
    command = [sys.executable, "-X", "importtime", "-m", "duotone", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert "quantize" in done.stdout
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "duotone.cli" in imported
    assert {name.partition(".")[0] for name in imported}.isdisjoint({"torch", "transformers", "numpy"})


def test_an_error_is_one_sentence_from_a_real_process(tmp_path: Path) -> None:
    """Outside this process too: exit code 2, one line on standard error, nothing on standard output."""
    command = [sys.executable, "-m", "duotone", "inspect", str(tmp_path / "absent")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"duotone: {tmp_path / 'absent'}: found no such folder")


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to")])
def test_a_lack_of_memory_is_one_sentence(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2 and what to do; another RuntimeError is a bug and stays one."""

    def fail(wrong: Exception) -> None:
        def app() -> None:
            raise wrong

        monkeypatch.setattr(cli, "app", app)

    fail(error)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2 and capsys.readouterr().err.startswith("duotone: out of memory; fewer --samples")
    fail(RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes"):
        cli.main()


# ---- check


def test_check_json_and_exit_code(quantized: tuple[Path, Outcome]) -> None:
    """One place or several: a list. Exit code 1 where the checkpoint loads at none of them, as a script wants it."""
    (one,) = invoke("check", quantized[0], "--runtime", "transformers", "--gpu", "cpu", "--json").json()
    assert one["outcome"] == "bf16" and one["tensor_parallel"] == 1 and one["reasons"] == []
    assert {layer["outcome"] for layer in one["layers"]} == {"bf16"}
    refused = invoke("check", quantized[0], "--runtime", "vllm", "--gpu", "a100", "--json")
    assert refused.code == 1 and json.loads(refused.out)[0]["reasons"][0].startswith("the device is a100")
    both = invoke("check", quantized[0], "--runtime", "vllm", "--runtime", "duotone", "--gpu", "a100", "--json")
    assert [place["outcome"] for place in both.json()] == ["refused", "w4a8"]


def test_check_of_a_model_and_its_words(original: Path) -> None:
    """A model that is not quantized is planned with the options given; names that are not known are refused."""
    text = invoke("check", original, "--runtime", "vllm", "--gpu", "h100", "--group-size", "32").out
    assert "refused: group_size is 32" in text and "--group-size 128" in text
    table = invoke("check", original).out
    assert all(name in table for name in ("tensorrt-llm", "mi300x", "as w4a16"))
    outcome = invoke("check", original, "--runtime", "ollama")
    assert outcome.code == 2 and "--runtime: found 'ollama'" in outcome.err


def test_quantize_refuses_what_would_not_load(original: Path, tmp_path: Path) -> None:
    """Before the work, with what would; nothing is written."""
    arguments = (original, tmp_path / "out", "--method", "rtn", "--group-size", "32", "--runtime", "vllm")
    for dry in ((), ("--dry-run",)):
        outcome = invoke("quantize", *arguments, *dry)
        assert outcome.code == 2 and "would not load in vllm (0.33.0) on h100" in outcome.err
        assert not (tmp_path / "out").exists()
    fits = invoke("quantize", *arguments[:-1], "duotone", "--gpu", "cpu", "--json").json()
    assert "loads in duotone (this one) on cpu: its own CPU kernel" in fits["notes"]


# ---- export, import


def test_export_and_import(quantized: tuple[Path, Outcome], tmp_path: Path) -> None:
    """There and back by the command line, as JSON and in words; what is only approximate needs leave."""
    there, back = tmp_path / "there", tmp_path / "back"
    report = invoke("export", quantized[0], there, "--format", "w4a16", "--json").json()
    assert report["layout"] == "w4a16" and {layer["exactness"] for layer in report["layers"]} == {"product-exact"}
    outcome = invoke("import", there, back)
    assert outcome.code == 0 and "bit-exact" in outcome.out and "imported from compressed-tensors" in outcome.out
    assert (back / "model.safetensors").read_bytes() == (quantized[0] / "model.safetensors").read_bytes()
    refused = invoke("export", quantized[0], tmp_path / "dense", "--format", "dense-bf16")
    assert refused.code == 2 and refused.err.count("\n") == 1 and "--allow-lossy takes it" in refused.err
    assert invoke("export", quantized[0], tmp_path / "dense", "--format", "dense-bf16", "--allow-lossy").code == 0
