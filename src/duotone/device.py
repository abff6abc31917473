"""Where to compute, and with which random numbers."""

import torch

from duotone.errors import DuotoneError


def resolve_device(device: str) -> torch.device:
    """`auto`, `cpu`, `cuda` or `cuda:1` as a torch device. Raises DuotoneError when it is not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
    except RuntimeError:
        place = None
    if place is None or place.type not in {"cpu", "cuda"}:
        raise DuotoneError(f"--device: found {device!r}, expected auto, cpu, cuda or cuda:N")
    if place.type == "cuda" and not torch.cuda.is_available():
        raise DuotoneError("--device: cuda was asked for, found no CUDA device; use --device cpu")
    return place


def resolve_dtype(name: str) -> torch.dtype:
    """`float32` or `bfloat16` as a torch dtype. Raises DuotoneError for another."""
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if name not in dtypes:
        raise DuotoneError(f"--dtype: found {name!r}, expected one of {', '.join(dtypes)}")
    return dtypes[name]


def check_seed(seed: int) -> None:
    """Raise DuotoneError for a seed that torch's generators do not take."""
    if not 0 <= seed < 2**63:
        raise DuotoneError(f"--seed: found {seed}, expected an integer from 0 to 2^63 - 1")
