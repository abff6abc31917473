"""Where to compute and in which arithmetic: what is chosen, and what is refused."""

import platform

import pytest
import torch

from duotone import device
from duotone.device import calibration_dtype, has_bf16_units, is_x86, resolve_dtype
from duotone.errors import DuotoneError
from duotone.settings import QuantizeConfig

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
LARGE = 2**36 + 1


@pytest.fixture(autouse=True)
def _fast_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """An x86 processor that multiplies BF16, unless a test says otherwise."""
    monkeypatch.setattr(device, "is_x86", lambda: True)
    monkeypatch.setattr(device, "has_bf16_units", lambda: True)


def test_auto_is_bfloat16_where_that_is_fast() -> None:
    """An accelerator, whatever there is to multiply and with gradients too; a CPU with units for it and much to multiply."""
    assert calibration_dtype("auto", CUDA, 1, gradients=True) == torch.bfloat16
    assert calibration_dtype("auto", CPU, LARGE, gradients=False) == torch.bfloat16


@pytest.mark.parametrize("lacking", ["units", "x86", "work", "no gradients"])
def test_auto_is_float32_where_one_thing_is_lacking(lacking: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of the four conditions of a CPU alone."""
    if lacking in ("units", "x86"):
        monkeypatch.setattr(device, {"units": "has_bf16_units", "x86": "is_x86"}[lacking], lambda: False)
    work = LARGE - 1 if lacking == "work" else LARGE
    assert calibration_dtype("auto", CPU, work, gradients=lacking == "no gradients") == torch.float32


@pytest.mark.parametrize("place", [CPU, CUDA], ids=str)
@pytest.mark.parametrize("gradients", [False, True])
def test_what_is_asked_for_is_taken(place: torch.device, gradients: bool) -> None:
    """Whatever the machine and the work."""
    for work in (1, LARGE):
        assert calibration_dtype("float32", place, work, gradients) == torch.float32
        assert calibration_dtype("bfloat16", place, work, gradients) == torch.bfloat16


@pytest.mark.parametrize("name", ["float16", "BF16", "", "Auto"])
def test_other_types_are_refused(name: str) -> None:
    """The message shows what was found and what exists, before any work."""
    with pytest.raises(DuotoneError, match=rf"^--dtype: found '{name}', expected one of auto, float32, bfloat16$"):
        QuantizeConfig(dtype=name)
    with pytest.raises(DuotoneError, match=rf"^--dtype: found '{name}', expected one of float32, bfloat16$"):
        calibration_dtype(name, CPU, 1, gradients=False)
    with pytest.raises(DuotoneError, match=rf"^--dtype: found '{name}'"):
        resolve_dtype(name)


def test_units_for_bfloat16_are_those_of_either_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    """AVX-512 with BF16, or AMX; the architecture by either of its names."""
    for avx512, amx in ((False, False), (True, False), (False, True), (True, True)):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda there=avx512: there)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda there=amx: there)
        assert has_bf16_units() == (avx512 or amx)
    for machine, expected in (("x86_64", True), ("AMD64", True), ("aarch64", False), ("arm64", False)):
        monkeypatch.setattr(platform, "machine", lambda name=machine: name)
        assert is_x86() == expected
