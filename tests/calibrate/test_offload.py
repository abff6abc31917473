"""Hidden states on a disk: the same numbers, no file left behind, one sentence when there is no room."""

import errno
import os
from pathlib import Path

import pytest
import torch

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
