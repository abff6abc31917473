"""What a newcomer types wrong: each call ends with exit code 2 and one sentence that says what to do, and writes nothing."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from huggingface_hub import errors

from duotone import version
from duotone.checkpoint import hub
from duotone.errors import DuotoneError
from tests.test_cli import commands, invoke

#: What is typed after `duotone`, with MODEL, TEXT and FOLDER (which holds something) filled in; what must be answered.
WRONG = {
    "quantise MODEL out": "Did you mean 'quantize'?",
    "quantize MODEL": "Missing argument 'out'",
    "quantize ./nothing out": "./nothing: found no such folder, expected a model folder or a hub id such as owner/name",
    "quantize MODEL FOLDER": "the output folder is not empty, expected a new or empty one",
    "quantize MODEL TEXT --method rtn": "is a file, expected a folder to write to",
    "quantize MODEL out --method gptqq": "--method: found 'gptqq', expected one of rtn, gptq, dpq-paper, dpq",
    "quantize MODEL out --target a100": "--target: found 'a100', expected one of hopper, gaudi",
    "quantize MODEL out --group-size 100": "found 100, expected a positive multiple of 8",
    "quantize MODEL out --group-size abc": "Invalid value for '--group-size'",
    "quantize MODEL out --calibration missing.txt": "missing.txt: found no such file, expected a text or .jsonl file",
    "quantize MODEL out --calibration EMPTY": "found 0 tokens of text, expected at least one sequence of",
    "quantize MODEL out --ignore lm_heads": "--ignore lm_heads: matches no linear of this model; names look like 'model.",
    "quantize MODEL out --ignore re:(": "not a regular expression",
    "quantize MODEL out --seq-len 0 --dry-run": "--seq-len: found 0, expected at least 2 tokens",
    "quantize MODEL out --save-every -1": "Invalid value for '--save-every'",
    "quantize MODEL out --order foo": "--order: found 'foo', expected one of gar, act, min-pivot, none",
    "quantize MODEL out --equalize 2": "--equalize: found 2.0, expected a number above 0 and at most 1",
    "quantize MODEL out --method rtn --runtime vllm --gpu a100": "would not load in vllm",
    "eval MODEL": "eval: expected --text FILE, or --tasks NAME",
    "eval MODEL --tasks arc=x": "--tasks: found 'arc=x', expected one of piqa=PATH",
    "eval MODEL --tasks piqa=x --items 0": "Invalid value for '--items'",
    "eval MODEL --text TEXT --dtype fp8": "--dtype: found 'fp8', expected one of float32, bfloat16",
    "generate MODEL": "Missing argument 'prompt'",
    "generate MODEL/config.json hi": "config.json: is a file, expected a model folder or a hub id",
    "generate MODEL hi --temperature -1": "--temperature: found -1.0, expected 0 (greedy) or more",
    "inspect FOLDER": "config.json: found no such file, expected it in a model folder",
    "explain MODEL --device tpu": "--device: found 'tpu', expected auto, cpu, cuda or cuda:N",
    "export MODEL out": "Missing option '--format'",
    "export MODEL out --format awq": "--format: found 'awq', expected one of compressed-tensors, w4a16, gptq",
    "export MODEL out --format w4a16": "is not quantized, expected a checkpoint; make one with duotone quantize",
    "import MODEL out": "is not quantized, expected a 4-bit checkpoint; quantize it with duotone quantize",
    "check MODEL --runtime vlm": "--runtime: found 'vlm', expected one of vllm, ",
    "check MODEL --tensor-parallel 0": "--tensor-parallel: found 0, expected at least 1",
    "report MODEL --format pdf": "--format: found 'pdf', expected one of html, md, png, json",
    "compare MODEL": "Missing option '--original'",
    "serve MODEL --port 99999": "Invalid value for '--port'",
    "bench linear --shape 12": "--shape: found '12', expected NxK such as 4096x14336",
}


@pytest.mark.parametrize("call", WRONG, ids=str)
def test_a_wrong_call_is_told_what_is_wrong(
    call: str, tiny_model: Callable[..., Path], text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 2, the sentence, no traceback, and no output folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note").write_text("mine")
    (tmp_path / "empty.txt").touch()
    sentence = WRONG[call]
    places = {"MODEL": tiny_model(), "TEXT": text_file, "FOLDER": tmp_path / "full", "EMPTY": tmp_path / "empty.txt"}
    for name, place in places.items():
        call = call.replace(name, str(place))
    outcome = invoke(*call.split())
    told = " ".join(outcome.err.replace("│", " ").split())
    assert outcome.code == 2 and outcome.out == ""
    assert sentence in told and "Traceback" not in told
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty.txt", "full"]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (errors.GatedRepoError, "accept its terms on its page there, then hf auth login"),
        (errors.RepositoryNotFoundError, "no model of that name, or a private one"),
        (errors.LocalEntryNotFoundError, "it cannot be reached from here"),
        (errors.HfHubHTTPError, "500 Server Error"),
    ],
)
def test_what_the_hub_refuses_is_told_apart(
    error: type[errors.HfHubHTTPError], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gated model, one that is not there, no network, and anything else by the hub's own first line."""

    def refuse(*_: object, **__: object) -> str:
        answer = httpx.Response(500, request=httpx.Request("GET", "http://hub"))
        message = "500 Server Error\nRequest ID: 1"
        raise error(message) if error is errors.LocalEntryNotFoundError else error(message, response=answer)

    monkeypatch.setattr(hub, "snapshot_download", refuse)
    with pytest.raises(DuotoneError, match=reason) as told:
        hub.locate_model("owner/name")
    assert "\n" not in str(told.value)


def test_every_help_is_light() -> None:
    """No command's `--help` imports what takes long; a bare import of the package not even what the command line does."""
    heavy = {"torch", "transformers", "numpy", "safetensors", "tokenizers", "huggingface_hub", "jinja2", "yaml", "httpx"}
    probe = f"""
import sys, duotone
print({{name.partition(".")[0] for name in sys.modules}} & {heavy | {"typer", "rich"}})
from duotone import cli
from typer.main import get_command
for path in {sorted(commands())}:
    try:
        get_command(cli.app).main([*path, "--help"], prog_name="duotone")
    except SystemExit as end:
        assert not end.code
print({{name.partition(".")[0] for name in sys.modules}} & {heavy})
"""
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True, timeout=120)
    lines = done.stdout.splitlines()
    assert (lines[0], lines[-1]) == ("set()", "set()")


def test_the_shell_completes() -> None:
    """Commands and options, as a bash with the script of --install-completion asks for them."""
    for words, expected in (("duotone qu", ["quantize"]), ("duotone export --allow", ["--allow-lossy"])):
        asked = {"_DUOTONE_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
        command = [sys.executable, "-c", "from duotone.cli import app; app(prog_name='duotone')"]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | asked, check=False, timeout=120)
        assert done.stdout.split() == expected, done.stderr


def test_the_version_is_told() -> None:
    """`duotone --version`: what pip installed."""
    assert invoke("--version").out == f"duotone {version.VERSION}\n"
