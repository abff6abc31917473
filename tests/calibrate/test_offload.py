"""Hidden states on a disk: the same numbers, no file left behind, one sentence when there is no room."""

import errno
import os
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from duotone.calibrate import offload as module
from duotone.calibrate.offload import STATES_SHARE, HostMemory, Offload, choose_keeper
from duotone.errors import DuotoneError


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_kept_state_is_the_state_and_its_file_has_no_name(tmp_path: Path, dtype: torch.dtype) -> None:
    """Equal to the last bit, writable, independent of the original; the folder, made on demand, stays empty."""
    folder = tmp_path / "made" / "here"
    offload, state = Offload(folder), torch.randn(3, 5, 7).to(dtype)
    expected = state.clone()
    kept, other = offload.keep(state), offload.keep(state + 1)
    state.zero_()
    assert kept.dtype == dtype and torch.equal(kept, expected) and torch.equal(other, expected + 1)
    kept += 1
    assert torch.equal(kept, other) and not list(folder.iterdir())


def test_a_full_disk_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Room is asked for before anything is mapped: a mapping that finds the disk full would end the process."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(DuotoneError, match=f"--offload {tmp_path}: No space left on device, expected room for 40 bytes"):
        Offload(tmp_path).keep(torch.zeros(10))
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    """Before any work: the path and the reason."""
    (tmp_path / "file").write_text("")
    with pytest.raises(DuotoneError, match=r"--offload .*file/below: Not a directory, expected a folder"):
        Offload(tmp_path / "file" / "below")


def test_where_states_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the user says; else in the device's memory, or in the host's where they would take too much of a GPU's."""
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 0)
    monkeypatch.setattr(module, "free_bytes", lambda device: 1000 if device == cuda else pytest.fail("asked of a CPU"))
    assert choose_keeper(None, cpu, 10**15) == (None, "memory")
    assert choose_keeper(None, cuda, int(1000 * STATES_SHARE)) == (None, "the GPU's memory")
    keeper, where = choose_keeper(None, cuda, int(1000 * STATES_SHARE) + 1)
    assert isinstance(keeper, HostMemory) and where == "pinned host memory"
    for device in (cpu, cuda):
        keeper, where = choose_keeper(tmp_path, device, 10**15)
        assert isinstance(keeper, Offload) and where == "files on a disk"


class Slabs:
    """In the place of pinned memory; tells how much there is of it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sizes: list[int] = []
        self._held = list[weakref.ref[np.ndarray]]()
        monkeypatch.setattr(module, "pinned", self._taken)

    def _taken(self, nbytes: int) -> Tensor:
        self.sizes.append(nbytes)
        memory = np.zeros(nbytes, dtype=np.uint8)
        self._held.append(weakref.ref(memory))
        return torch.from_numpy(memory)

    @property
    def nbytes(self) -> int:
        return sum(memory.nbytes for held in self._held if (memory := held()) is not None)


def states(count: int, seed: int) -> Iterator[Tensor]:
    """Of odd sizes and several kinds, some with channels last."""
    generator = torch.Generator().manual_seed(seed)
    for i in range(count):
        state = torch.randn(2, 3, 5 + i % 3, 41, generator=generator).to((torch.bfloat16, torch.float32)[i % 5 == 0])
        yield state.to(memory_format=torch.channels_last) if i % 2 else state


def test_pinned_states_share_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies, in the order of memory that they had; few slabs, each a power of two, hardly larger than what is in them."""
    slabs, keeper = Slabs(monkeypatch), HostMemory()
    kept = [keeper.keep(state) for state in states(100, 0)]
    for found, meant in zip(kept, states(100, 0), strict=True):
        assert torch.equal(found, meant) and (found.dtype, found.stride()) == (meant.dtype, meant.stride())
        assert found.data_ptr() % 16 == 0
        found.zero_()
    assert len(slabs.sizes) <= 100 / 8 and all(size.bit_count() == 1 for size in slabs.sizes)
    room = sum(-(-state.nbytes // 512) * 512 for state in kept)
    assert slabs.nbytes == sum(slabs.sizes) <= 1.2 * room


def test_slabs_are_free_when_their_states_are_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """From block to block: no more of them than two sets of states need."""
    slabs, keeper = Slabs(monkeypatch), HostMemory()
    kept = [keeper.keep(state) for state in states(60, 0)]
    one = slabs.nbytes
    for block in range(1, 6):
        kept = [keeper.keep(state) for state in states(60, block)]
        assert slabs.nbytes <= 1.3 * one
    assert all(torch.equal(found, meant) for found, meant in zip(kept, states(60, 5), strict=True))


def test_slabs_have_room_for_any_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """For one that is larger than a slab may be, and for one of nothing."""
    monkeypatch.setattr(module, "_SLAB_BYTES", 2048)
    slabs, keeper = Slabs(monkeypatch), HostMemory()
    for state in (torch.ones(1000), torch.ones(100), torch.empty(0), torch.ones(()), torch.ones(100)):
        assert torch.equal(keeper.keep(state), state)
    assert slabs.sizes == [4096, 2048]
