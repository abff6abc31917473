"""Writing a checkpoint: the plan of shards, tensors in any order, and a folder that appears whole or not at all."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from duotone.checkpoint.headers import TensorSpec
from duotone.checkpoint.source import open_source
from duotone.checkpoint.staging import output_folder
from duotone.checkpoint.writer import CheckpointWriter, plan_shards, reporting_full_disk, write_json
from duotone.errors import DuotoneError

INDEX = "model.safetensors.index.json"
TENSORS = {
    "model.embed.weight": torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16),
    "model.0.weight_packed": torch.arange(-8, 8, dtype=torch.int32).reshape(4, 4),
    "model.0.weight_shape": torch.tensor([4, 32]),
    "model.0.weight_scale": torch.rand(4, 1).to(torch.bfloat16),
    "model.0.flag": torch.tensor(True),
    "model.0.bytes": torch.arange(5, dtype=torch.uint8),
    "model.0.empty": torch.empty(0, 3),
    "model.norm.weight": torch.rand(4, dtype=torch.float16),
}
DTYPES = {torch.bfloat16: "BF16", torch.int32: "I32", torch.int64: "I64", torch.bool: "BOOL", torch.uint8: "U8"}
DTYPES |= {torch.float32: "F32", torch.float16: "F16"}
SPECS = {name: TensorSpec(DTYPES[tensor.dtype], tuple(tensor.shape)) for name, tensor in TENSORS.items()}


class Interruption(BaseException):
    """Stands for Ctrl-C: no Exception."""


@given(sizes=st.lists(st.integers(0, 40), min_size=1, max_size=12), limit=st.integers(1, 60))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_plan_shards(sizes: list[int], limit: int) -> None:
    """Order is kept, nothing is lost, only a single tensor exceeds the limit, and no shard ends earlier than it must."""
    specs = {f"t{i}": TensorSpec("U8", (size,)) for i, size in enumerate(sizes)}
    shards = list(plan_shards(specs, limit).values())
    assert [name for shard in shards for name in shard] == list(specs)
    totals = [sum(spec.nbytes for spec in shard.values()) for shard in shards]
    for shard, total in zip(shards, totals, strict=True):
        assert shard
        assert total <= limit or sum(spec.nbytes > 0 for spec in shard.values()) == 1
    for total, following in zip(totals[:-1], shards[1:], strict=True):
        assert total + next(iter(following.values())).nbytes > limit


def test_shard_names() -> None:
    """One shard has the plain name, several are numbered as transformers numbers them."""
    specs = {f"t{i}": TensorSpec("U8", (10,)) for i in range(3)}
    assert list(plan_shards(specs, 30)) == ["model.safetensors"]
    assert plan_shards(specs, 20) == {
        "model-00001-of-00002.safetensors": {"t0": specs["t0"], "t1": specs["t1"]},
        "model-00002-of-00002.safetensors": {"t2": specs["t2"]},
    }


@settings(max_examples=40, deadline=None, derandomize=True)
@given(order=st.permutations(list(TENSORS)), limit=st.sampled_from([1, 20, 50, 10_000]), at_once=st.integers(1, 4))
def test_any_order_gives_the_same_bytes(
    tmp_path_factory: pytest.TempPathFactory, order: list[str], limit: int, at_once: int
) -> None:
    """Tensors written in any order, one or several at a time: every file has the same bytes as in the planned order."""
    folders = [tmp_path_factory.mktemp("writer") for _ in range(2)]
    for folder, names, step in ((folders[0], list(TENSORS), len(TENSORS)), (folders[1], order, at_once)):
        writer = CheckpointWriter(folder, SPECS, limit)
        for start in range(0, len(names), step):
            writer.write({name: TENSORS[name] for name in names[start : start + step]})
        assert writer.finish() == sum(spec.nbytes for spec in SPECS.values())
    written, expected = ({file.name: file.read_bytes() for file in folder.iterdir()} for folder in (folders[1], folders[0]))
    assert written == expected


def test_one_file(tmp_path: Path) -> None:
    """What fits in one shard is one model.safetensors, without an index, bit for bit as given."""
    writer = CheckpointWriter(tmp_path, SPECS)
    writer.write(TENSORS)
    assert writer.finish() == sum(spec.nbytes for spec in SPECS.values())
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]
    loaded = load_file(tmp_path / "model.safetensors")
    assert set(loaded) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor), name


def test_sharded_output_is_read_through_its_index(tmp_path: Path) -> None:
    """The index names for every tensor the shard that holds it, and the total; our own reader agrees."""
    writer = CheckpointWriter(tmp_path, SPECS, max_bytes=40)
    writer.write(TENSORS)
    total = writer.finish()
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == total == sum(spec.nbytes for spec in SPECS.values())
    assert set(index["weight_map"]) == set(TENSORS)
    shards = set(index["weight_map"].values())
    assert len(shards) > 2
    assert {file.name for file in tmp_path.iterdir()} == shards | {INDEX}
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / file, framework="pt") as shard:
            assert torch.equal(shard.get_tensor(name), TENSORS[name])
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    loaded = open_source(tmp_path).load(TENSORS)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in TENSORS.items())


def test_transposed_and_gradient_tensors(tmp_path: Path) -> None:
    """A view that is not contiguous, and a parameter that wants a gradient, are written by value."""
    given = {"a": torch.arange(6.0).reshape(2, 3).T, "b": torch.nn.Parameter(torch.ones(3))}
    writer = CheckpointWriter(tmp_path, {"a": TensorSpec("F32", (3, 2)), "b": TensorSpec("F32", (3,))})
    writer.write(given)
    writer.finish()
    loaded = load_file(tmp_path / "model.safetensors")
    assert torch.equal(loaded["a"], given["a"])
    assert torch.equal(loaded["b"], given["b"])


def test_a_shard_appears_when_it_is_complete(tmp_path: Path) -> None:
    """Until its last tensor is there a shard has another name; other shards do not wait for it."""
    specs = {f"t{i}": TensorSpec("F32", (2,)) for i in range(4)}
    writer = CheckpointWriter(tmp_path, specs, max_bytes=16)
    first, second = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))

    def present() -> set[str]:
        return {file.name for file in tmp_path.iterdir()}

    assert present() == {f"{first}.partial", f"{second}.partial"}
    writer.write({"t2": torch.zeros(2)})
    assert present() == {f"{first}.partial", f"{second}.partial"}
    writer.write({"t3": torch.zeros(2), "t0": torch.zeros(2)})
    assert present() == {f"{first}.partial", second}
    writer.write({"t1": torch.zeros(2)})
    assert present() == {first, second}
    writer.finish()
    assert present() == {first, second, INDEX}


def test_disk_is_reserved_at_the_start(tmp_path: Path) -> None:
    """Before the first tensor, the file has its full size and its blocks: a full disk is found before any work."""
    CheckpointWriter(tmp_path, {"t": TensorSpec("U8", (1_000_000,))})
    status = (tmp_path / "model.safetensors.partial").stat()
    assert status.st_size > 1_000_000
    assert status.st_blocks * 512 >= 1_000_000


WRONG = {
    "dtype": {"t0": torch.zeros(2, dtype=torch.float16)},
    "dtype of the same width": {"t0": torch.zeros(2, dtype=torch.int32)},
    "dtype no file has": {"t0": torch.zeros(2, dtype=torch.complex64)},
    "shape": {"t0": torch.zeros(3)},
    "shape of the same size": {"t0": torch.zeros(1, 2)},
    "not planned": {"other": torch.zeros(2)},
}


@pytest.mark.parametrize("tensors", WRONG.values(), ids=WRONG.keys())
def test_wrong_tensor(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """A tensor that was not planned, or differs from its plan, is a ValueError that names it."""
    writer = CheckpointWriter(tmp_path, {"t0": TensorSpec("F32", (2,)), "t1": TensorSpec("F32", (2,))})
    with pytest.raises(ValueError, match=next(iter(tensors))):
        writer.write(tensors)


def test_written_twice(tmp_path: Path) -> None:
    """A tensor written a second time is a ValueError that names it: one of the two would be lost."""
    writer = CheckpointWriter(tmp_path, {"t0": TensorSpec("F32", (2,)), "t1": TensorSpec("F32", (2,))})
    writer.write({"t0": torch.zeros(2)})
    with pytest.raises(ValueError, match="t0"):
        writer.write({"t0": torch.ones(2)})


@pytest.mark.parametrize("limit", [8, 10_000], ids=["sharded", "one file"])
def test_unfinished(tmp_path: Path, limit: int) -> None:
    """finish() with a tensor missing is a ValueError that names it, and writes no index."""
    writer = CheckpointWriter(tmp_path, {"t0": TensorSpec("F32", (2,)), "t1": TensorSpec("F32", (2,))}, limit)
    writer.write({"t0": torch.zeros(2)})
    with pytest.raises(ValueError, match="t1: planned but never written"):
        writer.finish()
    assert not (tmp_path / INDEX).exists()


@pytest.mark.parametrize("before", ["absent", "empty"])
def test_output_folder_appears(tmp_path: Path, before: str) -> None:
    """The work's files are in the folder when the block ends, not before, and nothing else is beside it."""
    out = tmp_path / "deep" / "out"
    if before == "empty":
        out.mkdir(parents=True)
    with output_folder(out) as staging:
        (staging / "file").write_text("x")
        assert not (out / "file").exists()
    assert [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*"))] == ["deep", "deep/out", "deep/out/file"]
    assert (out / "file").read_text() == "x"


@pytest.mark.parametrize("before", ["absent", "empty"])
@pytest.mark.parametrize("failure", [ValueError, Interruption])
def test_output_folder_vanishes_after_a_failure(tmp_path: Path, before: str, failure: type[BaseException]) -> None:
    """An exception of any kind passes through and leaves the parent as it was."""
    out = tmp_path / "out"
    if before == "empty":
        out.mkdir()
    with pytest.raises(failure), output_folder(out) as staging:
        (staging / "file").write_text("x")
        raise failure
    assert [path.name for path in tmp_path.iterdir()] == (["out"] if before == "empty" else [])
    assert not out.exists() or not list(out.iterdir())


def test_output_folder_refuses_a_used_one(tmp_path: Path) -> None:
    """A folder with anything in it, hidden files too, or a file, is refused and stays as it is."""
    used = tmp_path / "used"
    used.mkdir()
    (used / ".hidden").write_text("mine")
    file = tmp_path / "file"
    file.write_text("mine")
    for out, expected in ((used, "is not empty"), (file, "is a file"), (file / "below", "cannot be written")):
        with pytest.raises(DuotoneError, match=expected) as caught, output_folder(out):
            pytest.fail("the work began")
        assert str(out) in str(caught.value) or str(file) in str(caught.value)
    assert sorted(path.name for path in tmp_path.rglob("*")) == [".hidden", "file", "used"]
    assert file.read_text() == (used / ".hidden").read_text() == "mine"


def assert_refused_or_whole(out: Path) -> None:
    """output_folder refuses `out` before the work, or `out` holds the work after it: never work that is lost at the end."""
    context = output_folder(out)
    try:
        staging = context.__enter__()
    except DuotoneError:
        return
    (staging / "file").write_text("x")
    context.__exit__(None, None, None)
    assert (out / "file").read_text() == "x"


def test_output_folder_is_the_current_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`.` inside a new folder: the work is not lost when it is done."""
    (tmp_path / "new").mkdir()
    monkeypatch.chdir(tmp_path / "new")
    assert_refused_or_whole(Path())


@pytest.mark.parametrize("target", ["empty", "absent"])
def test_output_folder_is_a_link(tmp_path: Path, target: str) -> None:
    """A link to an empty folder on a larger disk, or to nothing: the work is not lost when it is done."""
    if target == "empty":
        (tmp_path / "empty").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / target)
    assert_refused_or_whole(tmp_path / "out")


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (errno.ENOSPC, "the disk is full: needs 1.5 MB, found"),
        (errno.EDQUOT, "the disk is full: needs 1.5 MB, found"),
        (errno.EFBIG, "needs 1.5 MB"),
        (errno.EROFS, "cannot be written (Read-only file system)"),
        (errno.EACCES, "cannot be written (Permission denied)"),
    ],
    ids=lambda value: errno.errorcode.get(value, ""),
)
def test_reporting_full_disk(tmp_path: Path, number: int, expected: str) -> None:
    """A full disk says how much is needed and free, any other failure gives the system's reason; both name the place."""
    with pytest.raises(DuotoneError) as caught, reporting_full_disk(tmp_path / "not" / "yet", 1_500_000):
        raise OSError(number, os.strerror(number))
    assert expected in str(caught.value)
    assert str(tmp_path / "not" / "yet") in str(caught.value)


def test_write_json(tmp_path: Path) -> None:
    """Keys in the given order and a newline at the end: the same run gives the same bytes."""
    write_json(tmp_path / "x.json", {"b": 1, "a": [True, None]})
    assert (tmp_path / "x.json").read_text() == '{\n  "b": 1,\n  "a": [\n    true,\n    null\n  ]\n}\n'
