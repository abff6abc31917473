"""The safetensors container: 8 bytes of header length, a JSON header, then the tensors' bytes.

Read here without touching the data, so that a folder can be judged from its headers, and planned byte by byte for writing.
Format: the safetensors README (header at most 100 MB, offsets contiguous, no holes).
"""

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from duotone.errors import DuotoneError

#: Bits per element of the dtypes a shard may hold.
DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64,
}  # fmt: skip
TORCH_NAMES = {
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.float64: "F64",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fn: "F8_E4M3",
}
_MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True)
class TensorSpec:
    """One tensor as its header describes it. dtype: the safetensors name, such as BF16. file: the shard's plain name."""

    dtype: str
    shape: tuple[int, ...]
    file: str = ""

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's data."""
        return math.prod(self.shape) * DTYPE_BITS[self.dtype] // 8

    @property
    def is_float(self) -> bool:
        """Is it one of the floating dtypes a weight comes in?"""
        return self.dtype in {"BF16", "F16", "F32", "F64"}


def read_header(path: Path) -> dict[str, TensorSpec]:
    """Every tensor of one safetensors file, from its header alone.

    Raises DuotoneError naming the file when it is truncated, longer than its header says, or malformed in any way.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
            if not 2 <= length <= min(_MAX_HEADER_BYTES, size - 8):
                raise DuotoneError(f"{path}: is truncated or no safetensors file ({size} bytes, header length {length})")
            header = json.loads(file.read(length).decode("utf-8"))
    except OSError as error:
        raise DuotoneError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise DuotoneError(f"{path}: the safetensors header is not valid JSON ({error})") from None
    if not isinstance(header, dict):
        raise DuotoneError(f"{path}: the safetensors header is a {type(header).__name__}, expected an object")
    entries = cast("dict[str, Any]", header)
    entries.pop("__metadata__", None)
    spans: list[tuple[int, int]] = []
    tensors: dict[str, TensorSpec] = {}
    for name, entry in entries.items():
        tensors[name], span = _read_entry(path, name, entry)
        spans.append(span)
    _check_contiguous(path, spans, size - 8 - length)
    return tensors


def _read_entry(path: Path, name: str, entry: Any) -> tuple[TensorSpec, tuple[int, int]]:
    """One tensor of the header, its bytes checked against its dtype and shape."""
    try:
        dtype, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
        whole = [*shape, start, stop]
        # Lengths beyond 63 bits are no lengths, and Python would take minutes to print their product.
        well_formed = isinstance(dtype, str) and isinstance(shape, list)
        well_formed = well_formed and all(type(value) is int and 0 <= value < 2**63 for value in whole)
        well_formed = well_formed and math.prod(cast("list[int]", shape)) < 2**63
    except (KeyError, TypeError, ValueError):
        raise DuotoneError(f"{path}: the header entry of {name!r} is malformed") from None
    if not well_formed or dtype not in DTYPE_BITS:
        raise DuotoneError(f"{path}: the header entry of {name!r} has a dtype or shape that no tensor has")
    spec = TensorSpec(dtype, tuple(cast("list[int]", shape)), path.name)
    if stop - start != spec.nbytes:
        raise DuotoneError(f"{path}: {name!r} has {stop - start} bytes, expected {spec.nbytes} for {dtype} {list(spec.shape)}")
    return spec, (start, stop)


def _check_contiguous(path: Path, spans: list[tuple[int, int]], data_bytes: int) -> None:
    position = 0
    for start, stop in sorted(spans):
        if start != position:
            raise DuotoneError(f"{path}: tensor data overlap or leave a hole at byte {min(start, position)}")
        position = stop
    if position != data_bytes:
        raise DuotoneError(
            f"{path}: found {data_bytes} bytes of tensor data, expected {position}: the file is truncated or damaged"
        )


def encode_header(tensors: dict[str, TensorSpec]) -> tuple[bytes, dict[str, int]]:
    """Header bytes of a file holding these tensors, and each tensor's absolute byte offset in it.

    Wide dtypes come first, then names, as the safetensors library sorts them: every tensor is aligned to its own dtype.
    """
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position, starts = 0, dict[str, int]()
    for name in sorted(tensors, key=lambda name: (-DTYPE_BITS[tensors[name].dtype], name)):
        spec = tensors[name]
        entries[name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [position, position + spec.nbytes],
        }
        starts[name] = position
        position += spec.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    data_start = 8 + len(text)
    return struct.pack("<Q", len(text)) + text, {name: data_start + start for name, start in starts.items()}
