"""Reading a model folder that is not what it says it is."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from duotone.checkpoint.source import open_source, read_json
from duotone.errors import DuotoneError

INDEX = "model.safetensors.index.json"
TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([1, 2]), "c": torch.ones(4, dtype=torch.bfloat16)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A valid folder with one file, below a folder that holds a readable file of the same kind."""
    path = tmp_path / "outer" / "model"
    path.mkdir(parents=True)
    (path / "config.json").write_text('{"model_type": "llama"}')
    save_file(TENSORS, path / "model.safetensors")
    save_file({"a": torch.zeros(2, 3)}, tmp_path / "x.safetensors")
    return path


@pytest.fixture
def sharded(folder: Path) -> Path:
    """The same tensors in two shards with an index."""
    (folder / "model.safetensors").unlink()
    save_file({"a": TENSORS["a"]}, folder / "one.safetensors")
    save_file({"b": TENSORS["b"], "c": TENSORS["c"]}, folder / "two.safetensors")
    write_index(folder, {"a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors"})
    return folder


def write_index(folder: Path, weight_map: object) -> None:
    """An index with this weight_map."""
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def refusal(folder: Path) -> str:
    """The sentence of open_source's DuotoneError."""
    with pytest.raises(DuotoneError) as caught:
        open_source(folder)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


@pytest.mark.parametrize("kind", ["folder", "sharded"])
def test_opens(kind: str, request: pytest.FixtureRequest) -> None:
    """One file or several: every tensor's dtype, shape and file from the headers, and its values on demand."""
    source = open_source(request.getfixturevalue(kind))
    assert source.config == {"model_type": "llama"}
    assert {name: (spec.dtype, spec.shape) for name, spec in source.tensors.items()} == {
        "a": ("F32", (2, 3)),
        "b": ("I64", (2,)),
        "c": ("BF16", (4,)),
    }
    assert source.weight_bytes == 24 + 16 + 8
    loaded = source.load(["c", "a"])
    assert set(loaded) == {"a", "c"}
    for name, tensor in loaded.items():
        assert tensor.dtype == TENSORS[name].dtype
        assert torch.equal(tensor, TENSORS[name])


def test_index_wins_over_unlisted_tensors(sharded: Path) -> None:
    """A tensor that a shard holds and the index does not name is not part of the model."""
    write_index(sharded, {"a": "one.safetensors", "b": "two.safetensors"})
    assert set(open_source(sharded).tensors) == {"a", "b"}


def test_load_names_an_unknown_tensor(folder: Path) -> None:
    """A tensor that is not there is named, with the folder."""
    with pytest.raises(DuotoneError, match="found no tensor 'z'") as caught:
        open_source(folder).load(["a", "z"])
    assert str(folder) in str(caught.value)


def test_load_names_a_file_damaged_since(folder: Path) -> None:
    """A file that was cut after its header was read is a sentence, not a crash."""
    source = open_source(folder)
    os.truncate(folder / "model.safetensors", 40)
    with pytest.raises(DuotoneError, match="cannot be read as safetensors") as caught:
        source.load(["a"])
    assert str(folder / "model.safetensors") in str(caught.value)


CONFIGS = {
    "missing": (None, "found no such file"),
    "empty": (b"", "is not valid JSON"),
    "not JSON": (b"model_type: llama", "is not valid JSON"),
    "not UTF-8": (b'{"model_type": "\xff"}', "is not valid JSON"),
    "nested too deeply": (b"[" * 200_000, "is not valid JSON"),
    "number too long": (b'{"model_type": ' + b"1" * 5000 + b"}", "is not valid JSON"),
    "a list": (b'["llama"]', "expected an object"),
    "a string": (b'"llama"', "expected an object"),
    "no model_type": (b'{"hidden_size": 128}', "found no 'model_type'"),
    "model_type null": (b'{"model_type": null}', "found no 'model_type'"),
    "model_type a list": (b'{"model_type": ["llama"]}', "found no 'model_type'"),
}


@pytest.mark.parametrize(("content", "expected"), CONFIGS.values(), ids=CONFIGS.keys())
def test_bad_config(folder: Path, content: bytes | None, expected: str) -> None:
    """A config.json that cannot be used is named with what is wrong."""
    config = folder / "config.json"
    config.unlink()
    if content is not None:
        config.write_bytes(content)
    message = refusal(folder)
    assert str(config) in message
    assert expected in message


def test_config_is_a_folder(folder: Path) -> None:
    """A folder called config.json is no config."""
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()
    assert str(folder / "config.json") in refusal(folder)


def test_read_json_refuses_a_huge_file(tmp_path: Path) -> None:
    """A file (sparse here) far larger than any config is not read into memory."""
    path = tmp_path / "config.json"
    with path.open("wb") as file:
        file.truncate(2**30)
    with pytest.raises(DuotoneError, match="found 1073741824 bytes") as caught:
        read_json(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("what", ["absent", "file"])
def test_not_a_folder(tmp_path: Path, what: str) -> None:
    """A path that is no folder is named, with what is expected there."""
    path = tmp_path / what
    if what == "file":
        path.write_text("weights")
    message = refusal(path)
    assert str(path) in message
    assert "expected a model folder" in message


ESCAPING = [
    "../../x",
    "../../x.safetensors",
    "../x.safetensors",
    "sub/x.safetensors",
    "./one.safetensors",
    "..",
    ".",
    "",
    "one.safetensors/",
]
FOREIGN = ["C:\\x.safetensors", "..\\x.safetensors", "x\0.safetensors", "\0", "one.safetensors\0"]
NOT_TENSORS = ["config.json", "pytorch_model.bin", "one.safetensors.bin", "model.pt"]


@pytest.mark.parametrize(
    "value", [*ESCAPING, *FOREIGN, *NOT_TENSORS, None, 3, True, ["one.safetensors"], {"one.safetensors": 1}], ids=repr
)
def test_index_with_a_bad_path(sharded: Path, value: object) -> None:
    """A shard path that leads elsewhere, or to no safetensors file, is refused with the index named; nothing is opened."""
    write_index(sharded, {"a": value, "b": "two.safetensors"})
    message = refusal(sharded)
    assert str(sharded / INDEX) in message
    assert "expected a" in message


def test_index_with_an_absolute_path(sharded: Path) -> None:
    """An absolute path is refused, even to a file that exists and holds the tensor."""
    outside = sharded.parent.parent / "x.safetensors"
    assert outside.is_file()
    write_index(sharded, {"a": str(outside), "b": "two.safetensors"})
    message = refusal(sharded)
    assert str(sharded / INDEX) in message
    assert "expected a plain file name" in message


@pytest.mark.parametrize("weight_map", [None, {}, [], "one.safetensors", 3], ids=repr)
def test_index_without_a_table(sharded: Path, weight_map: object) -> None:
    """An index whose weight_map is missing or no table is named."""
    write_index(sharded, weight_map)
    message = refusal(sharded)
    assert str(sharded / INDEX) in message
    assert "weight_map" in message


def test_missing_shard(sharded: Path) -> None:
    """The shard that is not there is named, and the index that wants it."""
    (sharded / "two.safetensors").unlink()
    message = refusal(sharded)
    assert str(sharded / "two.safetensors") in message
    assert INDEX in message


def test_index_names_a_tensor_the_shard_lacks(sharded: Path) -> None:
    """Both the tensor and its supposed shard are named."""
    write_index(sharded, {"a": "one.safetensors", "b": "one.safetensors"})
    message = refusal(sharded)
    for part in (str(sharded / INDEX), "'b'", "'one.safetensors'"):
        assert part in message


def test_broken_shard(sharded: Path) -> None:
    """A truncated shard is named, not the folder alone."""
    os.truncate(sharded / "two.safetensors", 30)
    assert str(sharded / "two.safetensors") in refusal(sharded)


def _only_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _nothing(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize(
    ("empty", "hint"), [(_only_pickle, "found pytorch_model.bin, convert it to safetensors"), (_nothing, "")]
)
def test_no_safetensors(folder: Path, empty: Callable[[Path], None], hint: str) -> None:
    """A folder without safetensors is refused; one with a pickle is told to convert it, and the pickle is never opened."""
    empty(folder)
    message = refusal(folder)
    assert str(folder) in message
    assert "found neither model.safetensors nor" in message
    assert hint in message
