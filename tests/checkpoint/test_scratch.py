"""Tensors kept on disk in the middle of a run: read as they were written, gone when asked, one sentence on a full disk."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from duotone.checkpoint.scratch import Scratch
from duotone.errors import DuotoneError

NAME = "model.layers.0.self_attn.q_proj"


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    shapes=st.lists(st.lists(st.integers(0, 5), min_size=0, max_size=3), min_size=0, max_size=13),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.uint8]),
)
def test_any_list_comes_back(tmp_path_factory: pytest.TempPathFactory, shapes: list[list[int]], dtype: torch.dtype) -> None:
    """In its order, more than ten of them too; scalars and empty tensors; bit for bit."""
    scratch = Scratch(tmp_path_factory.mktemp("scratch") / "folder")
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randint(0, 99, shape, generator=generator).to(dtype) for shape in shapes]
    scratch.write(NAME, tensors)
    found = scratch.read(NAME)
    assert len(found) == len(tensors)
    for tensor, written in zip(found, tensors, strict=True):
        assert tensor.dtype == written.dtype
        assert torch.equal(tensor, written)


def test_every_name_has_its_own(tmp_path: Path) -> None:
    """Names that differ in their last part only; one written anew holds what came last; reading leaves it there."""
    scratch = Scratch(tmp_path / "folder")
    for i, name in enumerate(("a.b", "a.c", "a")):
        scratch.write(name, [torch.full((2, 2), float(i)), torch.full((3,), 0.5)])
    scratch.write("a.c", [torch.ones(1)])
    for _ in range(2):
        assert [part.tolist() for part in scratch.read("a.b")] == [[[0.0, 0.0], [0.0, 0.0]], [0.5, 0.5, 0.5]]
        assert [part.tolist() for part in scratch.read("a.c")] == [[1.0]]
        assert scratch.read("a")[0][0, 0] == 2
    assert len(list((tmp_path / "folder").iterdir())) == 3


def test_remove(tmp_path: Path) -> None:
    """The folder is gone with all that is in it, and nothing else is."""
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    scratch = Scratch(tmp_path / "folder")
    scratch.write(NAME, [torch.ones(3)])
    kept = scratch.read(NAME)
    scratch.remove()
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    assert kept[0].tolist() == [1, 1, 1]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT], ids=["disk", "quota"])
def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """One sentence with the place, what is needed, what is free."""
    scratch = Scratch(tmp_path / "folder")

    def fail(*_: Any) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(DuotoneError, match=r"folder: the disk is full: needs 2\.4 MB, found [\d.]+ MB free"):
        scratch.write(NAME, [torch.zeros(500_000), torch.zeros(100_000)])


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    """One that is there already belongs to somebody; below a file there is none."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("x")
    for folder in (tmp_path / "mine", tmp_path / "file" / "below"):
        with pytest.raises(DuotoneError, match=f"{folder.name}: cannot be written"):
            Scratch(folder)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
