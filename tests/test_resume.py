"""A run that is killed goes on where it was saved and ends with the same bytes; one asked for something else does not."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import duotone
from duotone.checkpoint.journal import RECORD, digest
from duotone.checkpoint.sidecar import RUN_RECORD
from duotone.checkpoint.staging import output_folder, staging_of
from duotone.checkpoint.writer import CheckpointWriter
from duotone.errors import DuotoneError, UnfinishedError
from tests.test_cli import invoke

ROOT = Path(__file__).resolve().parents[1]
QUICK: dict[str, Any] = {"samples": 4, "seq_len": 32, "device": "cpu"}
ModelMaker = Callable[..., Path]


@pytest.fixture(scope="module")
def model(tiny_model: ModelMaker) -> Path:
    """Four blocks in one shard."""
    return tiny_model(num_hidden_layers=4, hidden_size=64, intermediate_size=96, head_dim=16)


def contents(folder: Path) -> dict[str, bytes]:
    """All files but the one that tells of times."""
    files = (file for file in sorted(folder.rglob("*")) if file.is_file() and file.name != RUN_RECORD)
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


class Stopped(Exception):
    """Ends a run as a full disk or a lost machine would."""


def stopped_after(blocks: int) -> Callable[[int, int, str], None]:
    """A listener that ends the run before it begins a block."""

    def tell(done: int, total: int, what: str) -> None:
        del total, what
        if done == blocks:
            raise Stopped

    return tell


@pytest.mark.parametrize(
    ("options", "before"),
    [
        pytest.param((), "absent", id="default"),
        pytest.param((), "empty", id="into a folder"),
        pytest.param(("effort=high",), "absent", id="effort high"),
        pytest.param(("target=gaudi", "method=gptq"), "absent", id="gaudi", marks=pytest.mark.slow),
    ],
)
def test_killed_twenty_times_it_gives_the_same_bytes(
    model: Path, text_file: Path, tmp_path: Path, options: tuple[str, ...], before: str
) -> None:
    """At any moment, inside a shard's writes, a save or the last renaming too."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    kills = "20" if not options and before == "absent" else "5"
    if before == "empty":
        out.mkdir()
    for folder, times in ((whole, "0"), (out, kills)):
        command = [sys.executable, "-m", "tests.killed", str(model), str(folder), str(text_file), times, "1", *options]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert f"killed {times}" in done.stdout
    assert "resumed" in done.stdout, "no try went on from a save"
    assert contents(out) == contents(whole)
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "out"}, "nothing is left beside it"


def unfinished(model: Path, out: Path, text_file: Path, **options: Any) -> None:
    """A run that ends before its third block, with two saved."""
    with pytest.raises(Stopped):
        duotone.quantize(
            model, out, calibration=(str(text_file),), progress=stopped_after(2), save_every=0.0, **(QUICK | options)
        )
    assert (staging_of(out) / RECORD).exists() and not (out / "config.json").exists()


def test_what_was_saved_is_not_done_again(model: Path, text_file: Path, tmp_path: Path) -> None:
    """The report tells of all blocks, and where it went on; the folder is as that of a run in one piece."""
    out, whole = tmp_path / "out", tmp_path / "whole"
    unfinished(model, out, text_file)
    begun: list[int] = []
    report = duotone.quantize(
        model, out, calibration=(str(text_file),), resume=True, progress=lambda done, *_: begun.append(done), **QUICK
    )
    assert report.resumed_at == 2 and begun == [2, 3, 4]
    alone = duotone.quantize(model, whole, calibration=(str(text_file),), **QUICK)
    assert alone.resumed_at is None and report.layers == alone.layers
    assert contents(out) == contents(whole)


def test_shards_are_taken_up(model: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole ones, begun ones, ones that were whole after the last save, and ones that nothing was written to."""
    monkeypatch.setattr(CheckpointWriter.__init__, "__defaults__", (50_000, None))
    out, whole = tmp_path / "out", tmp_path / "whole"
    unfinished(model, out, text_file)
    names = sorted(file.name for file in staging_of(out).iterdir())
    assert any(name.endswith(".partial") for name in names) and any(name.endswith(".safetensors") for name in names)
    begun = next(staging_of(out).glob("*.partial"))
    begun.rename(begun.with_suffix(""))  # as if its last tensors had been there, behind the save
    assert duotone.quantize(model, out, calibration=(str(text_file),), resume=True, **QUICK).resumed_at == 2
    duotone.quantize(model, whole, calibration=(str(text_file),), **QUICK)
    assert contents(out) == contents(whole) and len(list(out.glob("model-*"))) > 3


def test_with_nothing_to_go_on_with_it_begins(model: Path, text_file: Path, tmp_path: Path) -> None:
    """--resume in a script that may be the first: no record, no complaint; what a run left that saved nothing is cleared."""
    out = tmp_path / "out"
    staging_of(out).mkdir()
    (staging_of(out) / ".lock").touch()
    (staging_of(out) / "model.safetensors.partial").write_bytes(b"x")
    outcome = invoke("quantize", model, out, "--method", "rtn", "--resume", "--calibration", text_file)
    assert outcome.code == 0 and contents(out).keys() >= {"config.json", "model.safetensors"}
    assert not list(out.glob("*.partial"))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"seed": 1}, r"the argument seed 0, found 1, expected the same"),
        ({"group_size": 32}, r"the argument group_size 128, found 32"),
        ({"dtype": "bfloat16"}, r"the machine's calibration dtype 'float32', found 'bfloat16'"),
        ({"calibration": "other"}, r"the calibration text's tokens '\w+', found '\w+'"),
        ({"model": "model.safetensors"}, r"the model's model.safetensors '\w+', found '\w+'"),
        ({"model": "tokenizer_config.json"}, r"the model's tokenizer_config.json '\w+', found '\w+'"),
    ],
    ids=["seed", "group", "dtype", "text", "model", "companion"],
)
def test_another_run_does_not_go_on(
    model: Path, text_file: Path, tmp_path: Path, change: dict[str, Any], expected: str
) -> None:
    """The difference is named, and the unfinished run stays as it is."""
    out = tmp_path / "out"
    unfinished(model, out, text_file)
    before = contents(staging_of(out))
    source, text = model, str(text_file)
    options = QUICK | {name: value for name, value in change.items() if name in ("seed", "group_size", "dtype")}
    if "calibration" in change:
        (tmp_path / "other.txt").write_text(text_file.read_text() * 2)
        text = str(tmp_path / "other.txt")
    if "model" in change:
        source = tmp_path / "model"
        source.mkdir()
        for file in model.iterdir():
            (source / file.name).write_bytes(file.read_bytes())
        if change["model"] == "model.safetensors":
            tensors = load_file(source / "model.safetensors")
            tensors["model.norm.weight"][0] += 1
            save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
        else:
            with (source / change["model"]).open("a") as file:
                file.write("\n")
    with pytest.raises(UnfinishedError, match=expected):
        duotone.quantize(source, out, calibration=(text,), resume=True, **options)
    assert contents(staging_of(out)) == before


def test_without_being_asked_it_does_not_go_on(model: Path, text_file: Path, tmp_path: Path) -> None:
    """A sentence that says what to do, exit code 2, and nothing touched."""
    out = tmp_path / "out"
    unfinished(model, out, text_file)
    before = contents(staging_of(out))
    outcome = invoke("quantize", model, out, "--method", "rtn")
    assert outcome.code == 2 and "found an unfinished run" in outcome.err and "--resume" in outcome.err
    assert contents(staging_of(out)) == before


def test_damage_is_found(model: Path, text_file: Path, tmp_path: Path) -> None:
    """A byte of a shard that is not what was written; a record or a state that is none."""
    out = tmp_path / "out"
    unfinished(model, out, text_file)
    staging = staging_of(out)
    shard, state, record = staging / "model.safetensors.partial", next(staging.glob(".journal-*")), staging / RECORD
    changed = "is not what the unfinished run wrote"
    for place, at, expected in (
        (shard, 60_000, changed),
        (shard, 20, changed),
        (state, -1, changed),
        (record, 90, "no record"),
    ):
        good = place.read_bytes()
        at %= len(good)
        place.write_bytes(good[:at] + bytes([good[at] ^ 255]) + good[at + 1 :])
        with pytest.raises(UnfinishedError, match=expected):
            duotone.quantize(model, out, calibration=(str(text_file),), resume=True, **QUICK)
        place.write_bytes(good)
    assert duotone.quantize(model, out, calibration=(str(text_file),), resume=True, **QUICK).resumed_at == 2


def test_two_runs_do_not_share_an_output(model: Path, tmp_path: Path) -> None:
    """The second is refused while the first is at work, and the first ends well."""
    out = tmp_path / "out"
    with output_folder(out) as staging:
        for resume in (False, True):
            with pytest.raises(DuotoneError, match="another process is writing to it"), output_folder(out, resume):
                pytest.fail("two at work")
        assert invoke("quantize", model, out, "--method", "rtn").code == 2
        (staging / "file").write_text("x")
    assert (out / "file").read_text() == "x"


def test_what_is_not_ours_is_left_alone(model: Path, text_file: Path, tmp_path: Path) -> None:
    """A link or a full folder in the staging's place; files that came into the output meanwhile; two places for one output."""
    precious, out = tmp_path / "precious", tmp_path / "out"
    precious.mkdir()
    (precious / "thesis").write_text("mine")
    for make in (lambda: staging_of(out).symlink_to(precious), lambda: precious.rename(staging_of(out))):
        make()
        with pytest.raises(DuotoneError, match="is in the way"):
            duotone.quantize(model, out, method="rtn", resume=True, device="cpu")
        if staging_of(out).is_symlink():
            staging_of(out).unlink()
    assert (staging_of(out) / "thesis").read_text() == "mine"
    staging_of(out).rename(precious)
    out.mkdir()
    with pytest.raises(DuotoneError, match=r"found config.json, which was not there"), output_folder(out) as staging:
        (staging / "config.json").write_text("ours")
        (out / "config.json").write_text("mine")
    assert contents(out) == {"config.json": b"mine"}
    unfinished(model, tmp_path / "new", text_file)
    (tmp_path / "new").mkdir()
    with pytest.raises(UnfinishedError, match="made for a folder that was not there"):
        duotone.quantize(model, tmp_path / "new", calibration=(str(text_file),), resume=True, **QUICK)


def test_digests_of_large_files_look_into_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The size and samples of a large file are part of its digest; both ends are among the samples."""
    monkeypatch.setattr("duotone.checkpoint.journal._WHOLE_BYTES", 1000)
    monkeypatch.setattr("duotone.checkpoint.journal._SAMPLE_BYTES", 10)
    path, data = tmp_path / "file", bytearray(5000)
    path.write_bytes(data)
    seen = {digest(path)}
    for at in (0, 4999):
        data[at] = 1
        path.write_bytes(data)
        seen.add(digest(path))
    path.write_bytes(data + b"\0")
    assert len(seen | {digest(path)}) == 4


def test_offloaded_states_change_no_byte(model: Path, text_file: Path, tmp_path: Path) -> None:
    """In memory, on a disk, and on a disk with a run that was stopped in between: one result, and the folder is empty again."""
    options = QUICK | {"calibration": (str(text_file),)}
    duotone.quantize(model, tmp_path / "plain", **options)
    spill = tmp_path / "spill"
    duotone.quantize(model, tmp_path / "spilled", offload=spill, **options)
    with pytest.raises(Stopped):
        duotone.quantize(model, tmp_path / "stopped", offload=spill, progress=stopped_after(2), save_every=0, **options)
    report = duotone.quantize(model, tmp_path / "stopped", offload=spill, resume=True, **options)
    assert report.resumed_at is not None and not list(spill.iterdir())
    expected = contents(tmp_path / "plain")
    assert contents(tmp_path / "spilled") == expected and contents(tmp_path / "stopped") == expected
