"""duotone.json: what the checkpoint is, how it was made, and the scales other files cannot hold.

No times and no paths: the same run gives the same bytes.
"""

import math
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from duotone.checkpoint.compressed_tensors import SideScales
from duotone.checkpoint.headers import TORCH_NAMES
from duotone.checkpoint.source import read_json
from duotone.errors import DuotoneError

SIDECAR = "duotone.json"
#: What one run took, where and by whom: the only file of a checkpoint that another run does not write byte for byte.
RUN_RECORD = "duotone-run.json"
#: The figures that `duotone eval --card` measured.
EVALUATION_RECORD = "duotone-evaluation.json"
FORMAT_VERSION = 1
#: What a sample of calibration may consist of, and how many numbers at most: a stranger's file says so.
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in TORCH_NAMES}
_MOST = 2**26


def read_sidecar(folder: Path) -> dict[str, Any] | None:
    """The sidecar of a checkpoint, or None when it was not made by Duotone. Raises DuotoneError for a newer format."""
    if not (folder / SIDECAR).is_file():
        return None
    return checked_sidecar(read_json(folder / SIDECAR), str(folder / SIDECAR))


def checked_sidecar(sidecar: dict[str, Any], where: str) -> dict[str, Any]:
    """The sidecar itself, however it was read. Raises DuotoneError, naming where, for a newer format."""
    version = sidecar.get("format_version")
    if version != FORMAT_VERSION:
        raise DuotoneError(f"{where}: found format_version {version!r}, expected {FORMAT_VERSION}: update duotone")
    layers = sidecar.get("layers", {})
    if not isinstance(layers, dict) or not all(isinstance(entry, dict) for entry in cast("dict[str, Any]", layers).values()):
        raise DuotoneError(f"{where}: found layers that are no objects, expected one object for each layer")
    return sidecar


def read_record(folder: Path, name: str) -> dict[str, Any] | None:
    """RUN_RECORD or EVALUATION_RECORD of a checkpoint, None where there is none. Raises DuotoneError for a newer format."""
    if not (folder / name).is_file():
        return None
    record = read_json(folder / name)
    if record.get("format_version") != FORMAT_VERSION:
        version = record.get("format_version")
        raise DuotoneError(f"{folder / name}: found format_version {version!r}, expected {FORMAT_VERSION}: update duotone")
    return record


def recorded_inputs(folder: Path) -> dict[str, Tensor] | None:
    """Zeros in the shape of a sample of the tensors that a checkpoint was calibrated on, None where there were none.

    Raises DuotoneError for what are no shapes.
    """
    inputs: Any = (read_sidecar(folder) or {}).get("inputs")
    if inputs is None:
        return None
    try:
        named: dict[str, Any] = {name: (_DTYPES[dtype], [int(n) for n in sizes]) for name, (dtype, *sizes) in inputs.items()}
        if any(min(sizes) < 1 for _, sizes in named.values()) or sum(math.prod(sizes) for _, sizes in named.values()) > _MOST:
            raise ValueError
        return {name: torch.zeros(sizes, dtype=dtype) for name, (dtype, sizes) in named.items()}
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError):
        raise DuotoneError(f"{SIDECAR}: found inputs {str(inputs)[:80]}, expected a dtype and sizes for each") from None


def layer_scales(sidecar: dict[str, Any] | None, layer: str) -> SideScales | None:
    """A layer's outer and activation scale, None when the sidecar holds none. Raises DuotoneError for what is no scale."""
    layers = cast("dict[str, Any]", (sidecar or {}).get("layers", {}))
    entry = layers.get(layer, {})
    if "outer_scale" not in entry:
        return None
    try:
        scales = SideScales(float(entry["outer_scale"]), float(entry["input_scale"]))
    except (KeyError, TypeError, ValueError, OverflowError):
        raise DuotoneError(f"{SIDECAR}: the scales of {layer} are {entry}, expected two numbers") from None
    if not (0 < scales.outer_scale < float("inf") and 0 < scales.input_scale < float("inf")):
        raise DuotoneError(f"{SIDECAR}: the scales of {layer} are {entry}, expected two positive numbers")
    return scales
