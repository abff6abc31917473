"""Where to compute."""

import torch

from duotone.errors import DuotoneError


def resolve_device(device: str) -> torch.device:
    """`auto`, `cpu`, `cuda` or `cuda:1` as a torch device. Raises DuotoneError when it is not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
    except RuntimeError:
        raise DuotoneError(f"--device: found {device!r}, expected auto, cpu, cuda or cuda:N") from None
    if place.type == "cuda" and not torch.cuda.is_available():
        raise DuotoneError("--device: cuda was asked for, found no CUDA device; use --device cpu")
    return place
