"""Input that is broken, hostile or merely wrong: one sentence, exit code 2, and nothing left on the disk."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from duotone.models.text import LLAMA
from tests.test_cli import Outcome, invoke

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"
RTN = ("--method", "rtn")
CALIBRATED = ("--seq-len", "64", "--samples", "4")

Damage = Callable[[Path], object]


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """HF_HUB_OFFLINE=1, also for a hub client that read the environment long ago."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def original(tiny_model: Callable[..., Path]) -> Path:
    """A model folder without fault."""
    return tiny_model()


@pytest.fixture(scope="module")
def quantized(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint without fault."""
    out = tmp_path_factory.mktemp("hostile") / "out"
    assert invoke("quantize", original, out, *RTN).code == 0
    return out


@pytest.fixture
def model(original: Path, tmp_path: Path) -> Path:
    """A copy of the model folder, to be damaged, two levels below a place that nobody may read from."""
    return Path(shutil.copytree(original, tmp_path / "models" / "model"))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A place for the output, in a folder of its own."""
    (tmp_path / "outputs").mkdir()
    return tmp_path / "outputs" / "out"


def listing(folder: Path) -> dict[str, bytes | None]:
    """Everything below a folder, hidden things too: path to content."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


def sentence(outcome: Outcome) -> str:
    """What holds for every refusal: exit code 2, an empty standard output, one printable line on standard error."""
    assert outcome.code == 2, outcome
    assert outcome.out == ""
    assert outcome.err.endswith("\n")
    line = outcome.err.removesuffix("\n")
    assert line.isprintable(), ascii(outcome.err)
    assert line.startswith("duotone: ")
    assert "Traceback" not in line
    return line


def refusal(model: object, out: Path, *options: object) -> str:
    """The sentence with which `duotone quantize` refuses; beside and in the output folder everything is as it was."""
    before = listing(out.parent)
    line = sentence(invoke("quantize", model, out, *options))
    assert listing(out.parent) == before
    return line


def edit_config(**changes: Any) -> Damage:
    """Set values of config.json; ... removes one."""

    def damage(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))

    return damage


def edit_weight(name: str, edit: Callable[[torch.Tensor], torch.Tensor]) -> Damage:
    """Replace one tensor by an edited copy."""

    def damage(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        tensors[name] = edit(tensors[name].clone())
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})

    return damage


def holding(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """The tensor with one entry, neither first nor last, replaced."""

    def edit(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[tensor.numel() // 2] = value
        return tensor

    return edit


def shard(folder: Path) -> dict[str, str]:
    """Cut the model in two shards with an index; returns its weight_map."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    files = {name: f"model-0000{1 + (i >= 9)}-of-00002.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in tensors if files[name] == file}, folder / file, metadata={"format": "pt"})
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return files


def lose_a_shard(folder: Path) -> None:
    """A download that was not complete."""
    shard(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()


def lead_outside(target: str) -> Damage:
    """An index that fetches one tensor from a file outside the folder; the file is there and holds it."""

    def damage(folder: Path) -> None:
        shutil.copy(folder / WEIGHTS, folder.parent.parent / "x.safetensors")
        shutil.copy(folder / WEIGHTS, folder.parent.parent / "x")
        files = shard(folder)
        path = target.format(outside=folder.parent.parent)
        (folder / INDEX).write_text(json.dumps({"weight_map": files | {Q_PROJ: path}}))

    return damage


def write(name: str, content: bytes) -> Damage:
    """Replace a file's content."""
    return lambda folder: (folder / name).write_bytes(content)


def remove(name: str) -> Damage:
    """Remove a file."""
    return lambda folder: (folder / name).unlink()


def cut(name: str, nbytes: int) -> Damage:
    """Remove a file's last bytes."""
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size - nbytes)


def forget(name: str) -> Damage:
    """Remove one tensor."""

    def damage(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        del tensors[name]
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})

    return damage


#: What is done to the folder, and what the sentence must say.
BROKEN_MODELS: dict[str, tuple[Damage, list[str]]] = {
    "shard missing": (lose_a_shard, ["model-00002-of-00002.safetensors", "found no such shard"]),
    "weights truncated": (cut(WEIGHTS, 100), [WEIGHTS, "truncated"]),
    "weights cut in the header": (lambda folder: os.truncate(folder / WEIGHTS, 99), [WEIGHTS, "truncated"]),
    "weights empty": (write(WEIGHTS, b""), [WEIGHTS, "truncated or no safetensors file"]),
    "weights are HTML": (write(WEIGHTS, b"<!DOCTYPE html><html>404</html>"), [WEIGHTS, "no safetensors file"]),
    "weights are a git-lfs pointer": (
        write(WEIGHTS, b"version https://git-lfs.github.com/spec/v1\n"),
        [WEIGHTS, "no safetensors file"],
    ),
    "only a pickle": (
        lambda f: (f / WEIGHTS).rename(f / "pytorch_model.bin"),
        ["pytorch_model.bin", "convert it to safetensors"],
    ),
    "NaN in a linear": (edit_weight(Q_PROJ, holding(float("nan"))), [WEIGHTS, Q_PROJ, "1 NaN or infinite"]),
    "infinity in a linear": (edit_weight(Q_PROJ, holding(float("inf"))), [WEIGHTS, Q_PROJ, "1 NaN or infinite"]),
    "minus infinity in a norm": (edit_weight("model.norm.weight", holding(-float("inf"))), [WEIGHTS, "model.norm.weight"]),
    "NaN in the embedding": (
        edit_weight("model.embed_tokens.weight", holding(float("nan"))),
        [WEIGHTS, "model.embed_tokens.weight"],
    ),
    "NaN in the head": (edit_weight("lm_head.weight", holding(float("nan"))), [WEIGHTS, "lm_head.weight"]),
    "wrong shape": (
        edit_weight(Q_PROJ, lambda w: w[:64].contiguous()),
        [WEIGHTS, Q_PROJ, "[64, 128]", "[128, 128]", "config.json"],
    ),
    "flat shape": (edit_weight(Q_PROJ, lambda w: w.reshape(-1)), [WEIGHTS, Q_PROJ, "[16384]", "[128, 128]"]),
    "wrong width in config": (
        edit_config(intermediate_size=512),
        [WEIGHTS, "gate_proj", "[256, 128]", "[512, 128]", "config.json"],
    ),
    "more layers in config": (edit_config(num_hidden_layers=3), ["model.layers.2.", "found no tensor"]),
    "tensor missing": (forget(Q_PROJ), [Q_PROJ, "found no tensor"]),
    "integer weight": (edit_weight(Q_PROJ, lambda w: w.to(torch.int8)), [WEIGHTS, Q_PROJ, "I8", "expected BF16"]),
    "FP8 weight": (edit_weight(Q_PROJ, lambda w: w.to(torch.float8_e4m3fn)), [WEIGHTS, Q_PROJ, "F8_E4M3", "expected BF16"]),
    "index leads out": (lead_outside("../../x"), [INDEX, "../../x", "inside the folder"]),
    "index leads out to a safetensors file": (
        lead_outside("../../x.safetensors"),
        [INDEX, "../../x.safetensors", "inside the folder"],
    ),
    "index names an absolute path": (lead_outside("{outside}/x.safetensors"), [INDEX, "x.safetensors", "inside the folder"]),
    "index with an escape sequence": (lead_outside("\x1b[2J.safetensors"), ["2J.safetensors"]),
    "index with a second line": (lead_outside("a\nb.safetensors"), ["b.safetensors"]),
    "config missing": (remove("config.json"), ["config.json", "found no such file"]),
    "config not JSON": (write("config.json", b"{"), ["config.json", "not valid JSON"]),
    "config without model_type": (edit_config(model_type=...), ["config.json", "model_type", "expected"]),
    "unknown architecture": (edit_config(model_type="nonsense"), ["config.json", "'nonsense'", "llama"]),
    "another architecture's name": (edit_config(model_type="gpt2"), ["transformer.", "expected it for this architecture"]),
    "already quantized by another tool": (
        edit_config(quantization_config={"quant_method": "gptq"}),
        ["already quantized", "gptq"],
    ),
    "quantization_config a word": (edit_config(quantization_config="gptq"), ["already quantized"]),
    "quantization_config a list": (edit_config(quantization_config=[]), ["already quantized"]),
    "width a word": (edit_config(hidden_size="many"), ["config.json", "hidden_size"]),
    "width null": (edit_config(hidden_size=None), ["config.json"]),
    "width negative": (edit_config(hidden_size=-128), ["config.json"]),
    "width beyond memory": (edit_config(intermediate_size=10**13), ["config.json"]),
    "no heads": (edit_config(num_attention_heads=0), ["config.json"]),
    "layers a word": (edit_config(num_hidden_layers="two"), ["config.json", "num_hidden_layers"]),
    "activation unknown": (edit_config(hidden_act="nonsense"), ["config.json", "nonsense"]),
    "rope unknown": (edit_config(rope_parameters={"rope_type": "nonsense", "rope_theta": 1e4}), ["config.json", "nonsense"]),
}


@pytest.mark.parametrize(("damage", "words"), BROKEN_MODELS.values(), ids=BROKEN_MODELS.keys())
def test_broken_model(damage: Damage, words: list[str], model: Path, out: Path) -> None:
    """A model folder that cannot be quantized is refused with the file or layer, what was found and what was expected."""
    damage(model)
    line = refusal(model, out, *RTN)
    for word in words:
        assert word in line


#: Damage that only calibration meets.
BROKEN_TOKENIZERS: dict[str, tuple[Damage, list[str]]] = {
    "tokenizer missing": (
        lambda folder: [file.unlink() for file in folder.glob("tokenizer*")],
        ["{model}", "found no usable tokenizer"],
    ),
    "tokenizer not JSON": (write("tokenizer.json", b"{"), ["{model}", "found no usable tokenizer"]),
    "tokenizer empty": (write("tokenizer.json", b"{}"), ["{model}", "found no usable tokenizer"]),
    "tokenizer config a list": (write("tokenizer_config.json", b"[]"), ["{model}", "found no usable tokenizer"]),
    "tokenizer of a larger vocabulary": (
        lambda folder: [
            edit_config(vocab_size=100)(folder),
            edit_weight("model.embed_tokens.weight", lambda w: w[:100].contiguous())(folder),
            edit_weight("lm_head.weight", lambda w: w[:100].contiguous())(folder),
        ],
        ["{model}", "tokenizer", "100"],
    ),
}


@pytest.mark.parametrize(("damage", "words"), BROKEN_TOKENIZERS.values(), ids=BROKEN_TOKENIZERS.keys())
def test_broken_tokenizer(damage: Damage, words: list[str], model: Path, out: Path, text_file: Path) -> None:
    """A tokenizer that is missing, damaged or of another model is refused with the folder named."""
    damage(model)
    line = refusal(model, out, "--calibration", text_file, *CALIBRATED)
    for word in words:
        assert word.format(model=model) in line


def test_already_quantized_by_us(quantized: Path, out: Path) -> None:
    """Our own checkpoint is no source either."""
    line = refusal(quantized, out)
    for word in (str(quantized), "already quantized", "compressed-tensors", "expected original weights"):
        assert word in line


def test_code_in_a_model_folder_never_runs(
    model: Path, out: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tokenizer and a model that bring their own code: the code does not run, and nobody is asked whether it should."""
    trace = tmp_path / "trace"
    (model / "evil.py").write_text(f"open({str(trace)!r}, 'w').close()\nraise ValueError('the code ran')\n")
    edit_config(auto_map={"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.EvilConfig"})(model)
    tokenizer = json.loads((model / "tokenizer_config.json").read_text())
    tokenizer |= {
        "tokenizer_class": "EvilTokenizer",
        "auto_map": {"AutoTokenizer": ["evil.EvilTokenizer", "evil.EvilTokenizer"]},
    }
    (model / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda prompt="": asked.append(prompt) or "y")
    outcome = invoke("quantize", model, out, "--calibration", text_file, *CALIBRATED)
    assert not trace.exists()
    assert asked == []
    assert outcome.code == 0 or str(model) in sentence(outcome)


LONG = "x" * 300

#: Options, and what the sentence must say.
WRONG_OPTIONS: dict[str, tuple[tuple[object, ...], list[str]]] = {
    "method": (("--method", "nonsense"), ["--method", "'nonsense'", "dpq", "rtn"]),
    "target": (("--target", "nonsense"), ["--target", "'nonsense'", "hopper", "gaudi"]),
    "order": (("--order", "nonsense"), ["--order", "'nonsense'", "gar"]),
    "device": (("--device", "nonsense"), ["--device", "'nonsense'", "cpu"]),
    "device of another kind": (("--device", "meta"), ["--device", "meta", "cpu"]),
    "group of 12": (("--group-size", 12), ["group_size", "12", "multiple of 8"]),
    "group of 0": (("--group-size", 0), ["group_size", "found 0", "multiple of 8"]),
    "group of -128": (("--group-size", -128), ["group_size", "-128", "multiple of 8"]),
    "no samples": (("--samples", 0), ["--samples", "found 0", "at least 1"]),
    "windows of one token": (("--seq-len", 1), ["--seq-len", "found 1", "at least 2"]),
    "negative windows": (("--seq-len", -5), ["--seq-len", "found -5", "at least 2"]),
    "no damping": (("--damping", 0), ["--damping", "0", "between 0 and 1"]),
    "damping above 1": (("--damping", 1.5), ["--damping", "1.5", "between 0 and 1"]),
    "damping NaN": (("--damping", "nan"), ["--damping", "nan", "between 0 and 1"]),
    "seed beyond 64 bits": (("--seed", 10**30), ["--seed", str(10**30)]),
    "rule that matches nothing": (("--ignore", "model.layers.7.mlp"), ["--ignore", "model.layers.7.mlp", "matches no linear"]),
    "second rule matches nothing": (
        ("--ignore", "lm_head", "--ignore", "re:nothing"),
        ["--ignore re:nothing", "matches no linear"],
    ),
    "rule that is no expression": (("--ignore", "re:("), ["--ignore", "re:(", "not a regular expression"]),
    "everything ignored": (("--ignore", "re:.*"), ["every linear", "--ignore"]),
    "text missing": (("--calibration", "absent.txt"), ["absent.txt", "found no such file", "--calibration"]),
    "text missing elsewhere": (("--calibration", "/no/such/text"), ["/no/such/text", "found no such file", "--calibration"]),
    "text itself": (
        ("--calibration", "It was a bright cold day in April. " * 20),
        ["It was a bright", "found no such file", "--calibration"],
    ),
    "fewer samples than texts": (
        ("--samples", 1, "--calibration", "{text}", "--calibration", "{text}"),
        ["--samples", "2 texts"],
    ),
    "hub data set": (("--calibration", "nobody/nothing"), ["nobody/nothing", "--calibration FILE"]),
}


@pytest.mark.parametrize(("options", "words"), WRONG_OPTIONS.values(), ids=WRONG_OPTIONS.keys())
def test_wrong_option(options: tuple[object, ...], words: list[str], original: Path, out: Path, text_file: Path) -> None:
    """An option that cannot be had is named with what was given and what is expected."""
    defaults = ("--calibration", text_file) if "--calibration" not in options else ()
    options = tuple(text_file if option == "{text}" else option for option in options)
    line = refusal(original, out, *defaults, *CALIBRATED, *options)
    for word in words:
        assert word in line


def test_no_text_at_all(original: Path, out: Path) -> None:
    """Without --calibration, and offline, the default data set is named and the way out."""
    line = refusal(original, out)
    assert "HuggingFaceH4/ultrachat_200k" in line
    assert "--calibration FILE" in line


#: File name and content, the suffix of the option, and what the sentence must say.
BAD_TEXTS: dict[str, tuple[str, bytes, str, list[str]]] = {
    "shorter than a sequence": ("t.txt", b"Too short.", "", ["found 10 tokens", "at least one sequence of 64", "--seq-len"]),
    "empty": ("t.txt", b"", "", ["found 0 tokens", "at least one sequence of 64"]),
    "not UTF-8": ("t.txt", b"ok \xff" * 100, "", ["is not UTF-8 text", "byte 3"]),
    "jsonl not UTF-8": ("t.jsonl", b'{"text": "\xff"}\n', "", ["is not UTF-8"]),
    "jsonl empty": ("t.jsonl", b"", "", ["found 0 tokens"]),
    "jsonl not JSON": ("t.jsonl", b'{"text": "a"}\n{"text"\n', "", ["t.jsonl:2", "not valid JSON"]),
    "jsonl row a list": ("t.jsonl", b'["text"]\n', "", ["t.jsonl:1", "expected an object"]),
    "jsonl nested too deeply": ("t.jsonl", b"[" * 200_000 + b"\n", "", ["t.jsonl:1", "not valid JSON"]),
    "jsonl without the usual fields": ("t.jsonl", b'{"body": "a"}\n', "", ["'body'", "'messages'", "t.jsonl#body"]),
    "jsonl with an escape sequence": ("t.jsonl", b'{"\\u001b[2J\\n": "a"}\n', "", ["[2J", "'messages'"]),
    "jsonl without the named field": ("t.jsonl", b'{"q": "a", "b": "c"}\n', "#q,answer", ["'b', 'q'", "'answer'", "t.jsonl#q"]),
    "jsonl with a number": ("t.jsonl", b'{"text": 3}\n', "", ["'text'"]),
    "jsonl with messages that are words": ("t.jsonl", b'{"messages": ["hello"]}\n', "", ["messages"]),
}


@pytest.mark.parametrize(("name", "content", "fields", "words"), BAD_TEXTS.values(), ids=BAD_TEXTS.keys())
def test_bad_text(name: str, content: bytes, fields: str, words: list[str], original: Path, out: Path, tmp_path: Path) -> None:
    """A calibration text that cannot be used is named with what is wrong in it."""
    (tmp_path / name).write_bytes(content)
    line = refusal(original, out, "--calibration", f"{tmp_path / name}{fields}", *CALIBRATED)
    for word in (str(tmp_path / name), *words):
        assert word in line


NO_MODELS = ["no/such/folder", "./nonsense", "~/nonsense", "nonsense/model", "not a model!", "nonsense", "owner/na..me", LONG]


@pytest.mark.parametrize("name", NO_MODELS, ids=lambda name: name[:20])
def test_no_such_model(name: str, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a folder nor an id of the hub's cache: named as given, and no file is made."""
    monkeypatch.chdir(tmp_path)
    assert name in refusal(name, out, *RTN)


def test_model_is_a_file(original: Path, out: Path) -> None:
    """A file where a folder is expected is named."""
    line = refusal(original / WEIGHTS, out, *RTN)
    assert str(original / WEIGHTS) in line
    assert "expected a model folder" in line


def test_strict(original: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A linear that the architecture's table does not know: refused by name with --strict, kept with its reason without."""
    table = dataclasses.replace(LLAMA, shared_inputs=LLAMA.shared_inputs[:-1])
    monkeypatch.setattr("duotone.models.adapter._ADAPTERS", (table,))
    line = refusal(original, out, *RTN, "--strict")
    for word in ("model.layers.0.mlp.down_proj", "--strict", "--ignore"):
        assert word in line
    kept = invoke("quantize", original, out, *RTN, "--dry-run", "--json").json()["kept"]
    assert kept["model.layers.1.mlp.down_proj"] == "not in the architecture's table"


@pytest.mark.parametrize("options", [(), ("--dry-run",)], ids=["run", "dry run"])
def test_output_not_empty(original: Path, out: Path, options: tuple[str, ...]) -> None:
    """Somebody's folder stays as it is."""
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    line = refusal(original, out, *RTN, *options)
    assert str(out) in line
    assert "not empty" in line


def test_output_is_the_model(model: Path) -> None:
    """A model is not overwritten by its own quantization."""
    line = refusal(model, model, *RTN)
    assert str(model) in line
    assert "not empty" in line


def test_output_is_a_file(original: Path, out: Path) -> None:
    """A file, or a place below a file, is no folder to write to."""
    out.write_text("mine")
    assert str(out) in refusal(original, out, *RTN)
    assert str(out) in refusal(original, out / "below", *RTN)


def test_output_name_too_long(original: Path, out: Path) -> None:
    """A name the file system does not take is named."""
    assert LONG in refusal(original, out.parent / LONG, *RTN)


def test_failure_keeps_an_empty_output(model: Path, out: Path) -> None:
    """An output folder that was there, and empty, is there and empty after a failure in the middle of the work."""
    out.mkdir()
    edit_weight(Q_PROJ, holding(float("nan")))(model)
    refusal(model, out, *RTN)
    assert list(out.iterdir()) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """make(bytes) -> a file system of that size, unmounted at the end; skips where none can be mounted."""
    mounted: list[Path] = []

    def make(nbytes: int) -> Path:
        place = tmp_path / f"disk{len(mounted)}"
        place.mkdir()
        if os.geteuid() != 0 or shutil.which("mount") is None:
            pytest.skip("mounting a small tmpfs needs root")
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={nbytes}", "tmpfs", str(place)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            pytest.skip(f"cannot mount a tmpfs here: {done.stderr.strip()}")
        mounted.append(place)
        return place

    yield make
    for place in mounted:
        subprocess.run(["umount", str(place)], check=True)


def test_disk_full_at_the_start(original: Path, small_disk: Callable[[int], Path]) -> None:
    """A disk too small for the weights is found before any work, with the megabytes needed and those there."""
    disk = small_disk(64 * 1024)
    line = refusal(original, disk / "out", *RTN)
    for word in (str(disk), "the disk is full: needs 0.3 MB, found 0.1 MB free"):
        assert word in line


def test_disk_full_at_the_end(original: Path, quantized: Path, small_disk: Callable[[int], Path]) -> None:
    """A disk that holds the weights but not the files beside them: found at the end, and all is taken back."""
    pages = -(-(quantized / WEIGHTS).stat().st_size // 4096)
    disk = small_disk((pages + 2) * 4096)
    line = refusal(original, disk / "out", *RTN)
    assert str(disk) in line
    assert "the disk is full" in line


def test_output_is_a_mount_point(original: Path, small_disk: Callable[[int], Path]) -> None:
    """An empty disk mounted as the output folder, as containers do: refused before the work, or filled; never work lost."""
    disk = small_disk(16 * 1024 * 1024)
    outcome = invoke("quantize", original, disk, *RTN)
    if outcome.code == 0:
        assert {WEIGHTS, "config.json"} <= {file.name for file in disk.iterdir()}
    else:
        assert str(disk) in sentence(outcome)


def test_file_size_limit(original: Path, out: Path) -> None:
    """A limit on file sizes, in a process of its own: refused like a full disk, with the megabytes needed."""
    code = (
        "import resource, signal, sys\n"
        "from duotone.cli import main\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "main()\n"
    )
    command = [sys.executable, "-B", "-c", code, "quantize", str(original), str(out), *RTN]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    line = sentence(Outcome(done.returncode, done.stdout, done.stderr))
    assert "0.3 MB" in line
    assert out.name in line
    assert listing(out.parent) == {}


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.int16, torch.float8_e4m3fn, torch.float64, torch.bool, torch.int64], ids=str
)
def test_a_tensor_nobody_knows(dtype: torch.dtype, model: Path, out: Path) -> None:
    """A tensor outside the architecture, of any dtype, travels along: floats of a weight's kind as BF16, others unchanged."""
    extra = torch.tensor([1.0, 0.0, 1.0, 1.0]).to(dtype)
    tensors = load_file(model / WEIGHTS) | {"extra": extra}
    save_file(tensors, model / WEIGHTS, metadata={"format": "pt"})
    outcome = invoke("quantize", model, out, *RTN)
    assert outcome.code == 0, outcome.err
    found = load_file(out / WEIGHTS)["extra"]
    assert found.dtype == (torch.bfloat16 if dtype == torch.float64 else dtype)
    assert torch.equal(found.float(), extra.float())


def test_quantization_config_null(model: Path, out: Path) -> None:
    """`"quantization_config": null` says that the model is not quantized."""
    edit_config(quantization_config=None)(model)
    assert invoke("quantize", model, out, *RTN, "--dry-run").code == 0


@pytest.mark.parametrize("separator", ["\u2028", "\x85"], ids=ascii)
def test_jsonl_with_unusual_separators(separator: str, original: Path, out: Path, tmp_path: Path) -> None:
    """Only a newline ends a row of a .jsonl file: a JSON string may hold U+2028 and U+0085 as they are."""
    row = json.dumps({"text": f"left{separator}right " * 100}, ensure_ascii=False)
    (tmp_path / "t.jsonl").write_text(row + "\n", encoding="utf-8")
    outcome = invoke("quantize", original, out, "--calibration", tmp_path / "t.jsonl", *CALIBRATED)
    assert outcome.code == 0, outcome.err


def drop_tensor(suffix: str) -> Damage:
    """Remove the first tensor with this suffix."""

    def damage(folder: Path) -> None:
        forget(next(name for name in sorted(load_file(folder / WEIGHTS)) if name.endswith(suffix)))(folder)

    return damage


def edit_json(name: str, **changes: Any) -> Damage:
    """Set values of a JSON file."""
    return lambda folder: (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | changes))


PACKED = "model.layers.0.mlp.down_proj.weight_packed"

#: Damage to a checkpoint of ours, the commands that must refuse it, and what the sentence must say.
BROKEN_CHECKPOINTS: dict[str, tuple[Damage, tuple[str, ...], list[str]]] = {
    "weights truncated": (cut(WEIGHTS, 10), ("inspect", "explain", "generate", "eval"), [WEIGHTS, "truncated"]),
    "sidecar not JSON": (write("duotone.json", b"{"), ("inspect", "generate"), ["duotone.json", "not valid JSON"]),
    "sidecar a list": (
        write("duotone.json", b"[]"),
        ("inspect", "explain", "generate"),
        ["duotone.json", "expected an object"],
    ),
    "sidecar of a newer format": (
        edit_json("duotone.json", format_version=2),
        ("inspect", "generate", "eval"),
        ["duotone.json", "format_version 2", "expected 1", "update duotone"],
    ),
    "sidecar layers a list": (edit_json("duotone.json", layers=[]), ("inspect", "generate"), ["duotone.json", "layers"]),
    "quantization_config a word": (edit_config(quantization_config="w4a8"), ("inspect", "eval"), ["quantization_config"]),
    "another layout": (
        edit_config(quantization_config={"quant_method": "awq"}),
        ("inspect", "explain", "generate"),
        ["config.json", "'awq'"],
    ),
    "packed weight missing": (drop_tensor(".weight_packed"), ("generate",), ["model.layers.0.mlp.down_proj"]),
    "scale missing": (drop_tensor(".weight_scale"), ("generate",), ["model.layers.0.mlp.down_proj", "weight_scale"]),
    "shape missing": (drop_tensor(".weight_shape"), ("generate",), ["model.layers.0.mlp.down_proj", "weight_shape"]),
    "norm missing": (forget("model.norm.weight"), ("generate", "eval"), ["model.norm.weight", "found no tensor"]),
    "packed weight of another shape": (edit_weight(PACKED, lambda w: w[:8].contiguous()), ("generate",), [PACKED, "[8, 32]"]),
    "other sizes in config": (
        edit_config(intermediate_size=512),
        ("generate",),
        ["mlp", "[128, 256]", "[128, 512]", "config.json"],
    ),
}


@pytest.mark.parametrize(
    ("damage", "command", "words"),
    [(damage, command, words) for damage, commands, words in BROKEN_CHECKPOINTS.values() for command in commands],
    ids=[f"{name}, {command}" for name, (_, commands, _) in BROKEN_CHECKPOINTS.items() for command in commands],
)
def test_broken_checkpoint(
    damage: Damage, command: str, words: list[str], quantized: Path, text_file: Path, tmp_path: Path
) -> None:
    """A damaged checkpoint is refused by whoever reads it, with the file or layer named; never loaded in part."""
    folder = Path(shutil.copytree(quantized, tmp_path / "checkpoint"))
    damage(folder)
    options = {
        "inspect": (),
        "explain": (),
        "generate": ("A prompt", "--max-new-tokens", 1, "--quiet"),
        "eval": ("--text", text_file, "--seq-len", 64, "--samples", 1),
    }[command]
    line = sentence(invoke(command, folder, *options))
    for word in words:
        assert word in line


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--text", "absent.txt"), ["absent.txt", "found no such file"]),
        (("--text", "{text}", "--dtype", "nonsense"), ["'nonsense'", "float32"]),
        (("--text", "{text}", "--samples", 0), ["--samples", "0"]),
        (("--text", "{text}", "--reference", "no/such/folder"), ["no/such/folder"]),
        (("--text", "{text}", "--reference", "{other}"), ["--reference", "300", "260"]),
    ],
    ids=["text missing", "dtype", "no samples", "reference missing", "reference of another vocabulary"],
)
def test_wrong_evaluation(
    options: tuple[object, ...], words: list[str], original: Path, text_file: Path, tiny_model: Callable[..., Path]
) -> None:
    """`duotone eval` refuses as `quantize` does."""
    places = {"{text}": text_file, "{other}": tiny_model(vocab_size=300)}
    line = sentence(invoke("eval", original, *(places.get(str(option), option) for option in options), "--seq-len", 64))
    for word in words:
        assert word in line


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("Hello", "--max-new-tokens", 0), ["--max-new-tokens", "found 0", "at least 1"]),
        (("Hello", "--temperature", "nan"), ["--temperature", "nan"]),
        (("Hello", "--temperature", "-1"), ["--temperature", "-1"]),
        (("Hello", "--seed", 10**30), ["--seed"]),
    ],
    ids=["no tokens", "temperature NaN", "temperature negative", "seed beyond 64 bits"],
)
def test_wrong_generation(options: tuple[object, ...], words: list[str], original: Path) -> None:
    """`duotone generate` refuses as `quantize` does, before a word is printed."""
    line = sentence(invoke("generate", original, *options, "--quiet"))
    for word in words:
        assert word in line
