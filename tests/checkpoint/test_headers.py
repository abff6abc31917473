"""The safetensors container, against the safetensors library both ways, and against files that lie."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from duotone.checkpoint.headers import DTYPE_BITS, TORCH_NAMES, TensorSpec, encode_header, read_header
from duotone.errors import DuotoneError

THOROUGH = settings(max_examples=250, deadline=None, derandomize=True)
TORCH_DTYPES = {name: dtype for dtype, name in TORCH_NAMES.items()}

names = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12).filter(lambda name: name != "__metadata__")
shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)
plans = st.dictionaries(names, st.builds(TensorSpec, st.sampled_from(sorted(TORCH_DTYPES)), shapes), min_size=1, max_size=7)


def random_bytes(specs: dict[str, TensorSpec], seed: int = 0) -> dict[str, torch.Tensor]:
    """Tensors of random bits (NaN patterns included), except that a bool is 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for name, spec in specs.items():
        bits = torch.randint(0, 2 if spec.dtype == "BOOL" else 256, (spec.nbytes,), generator=generator).to(torch.uint8)
        tensors[name] = bits.view(TORCH_DTYPES[spec.dtype]).reshape(spec.shape)
    return tensors


def bits_of(tensor: torch.Tensor) -> bytes:
    """A tensor's bytes."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def raw_file(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    """A file with this header (bytes as they are, anything else as JSON), header length and data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(dtype: Any = "F32", shape: Any = (1,), offsets: Any = (0, 4)) -> dict[str, Any]:
    """One header entry; a plain float32 by default."""
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for files that hypothesis writes again and again."""
    return tmp_path_factory.mktemp("headers")


@settings(max_examples=100, deadline=None, derandomize=True)
@given(specs=plans)
def test_the_library_reads_what_we_write(scratch: Path, specs: dict[str, TensorSpec]) -> None:
    """Any names, dtypes and shapes: the library opens the file, and every tensor comes back bit for bit."""
    tensors = random_bytes(specs)
    header, offsets = encode_header(specs)
    file = bytearray(header + bytes(sum(spec.nbytes for spec in specs.values())))
    for name, tensor in tensors.items():
        file[offsets[name] : offsets[name] + specs[name].nbytes] = bits_of(tensor)
    path = scratch / "ours.safetensors"
    path.write_bytes(file)
    with safe_open(path, framework="pt") as opened:
        assert set(opened.keys()) == set(specs)
        for name, tensor in tensors.items():
            found = opened.get_tensor(name)
            assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
            assert bits_of(found) == bits_of(tensor)
        assert opened.metadata() == {"format": "pt"}
    expected = {name: TensorSpec(spec.dtype, spec.shape, path.name) for name, spec in specs.items()}
    assert read_header(path) == expected


@THOROUGH
@given(specs=plans)
def test_tensors_are_aligned(specs: dict[str, TensorSpec]) -> None:
    """Every tensor starts at a multiple of its element's bytes, the data at a multiple of 8, and nothing overlaps."""
    header, offsets = encode_header(specs)
    assert len(header) % 8 == 0
    for name, offset in offsets.items():
        assert offset % (DTYPE_BITS[specs[name].dtype] // 8) == 0, name
    position = len(header)
    for start, nbytes in sorted((offsets[name], spec.nbytes) for name, spec in specs.items()):
        assert start == position
        position += nbytes


@settings(max_examples=100, deadline=None, derandomize=True)
@given(specs=plans)
def test_we_read_what_the_library_writes(scratch: Path, specs: dict[str, TensorSpec]) -> None:
    """Every name, dtype and shape of a file saved by the library, and the file it lies in."""
    path = scratch / "theirs.safetensors"
    save_file(random_bytes(specs), path, metadata={"format": "pt"})
    found = read_header(path)
    assert {name: (spec.dtype, spec.shape) for name, spec in found.items()} == {
        name: (spec.dtype, spec.shape) for name, spec in specs.items()
    }
    assert {spec.file for spec in found.values()} == {path.name}


def test_same_layout_as_the_library(tmp_path: Path) -> None:
    """For plain names our bytes are the library's bytes: same order, same padding."""
    specs = {
        "b": TensorSpec("BF16", (3,)),
        "a": TensorSpec("U8", (5,)),
        "c": TensorSpec("I64", (2,)),
        "d": TensorSpec("BF16", (1,)),
    }
    save_file(random_bytes(specs), tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    header, _ = encode_header(specs)
    assert (tmp_path / "theirs.safetensors").read_bytes()[: len(header)] == header


@pytest.mark.parametrize(
    ("spec", "nbytes", "is_float"),
    [
        (TensorSpec("BF16", (3, 5)), 30, True),
        (TensorSpec("F64", ()), 8, True),
        (TensorSpec("F16", (0, 7)), 0, True),
        (TensorSpec("I32", (2, 2, 2)), 32, False),
        (TensorSpec("F8_E4M3", (9,)), 9, False),
    ],
)
def test_spec(spec: TensorSpec, nbytes: int, is_float: bool) -> None:
    """Bytes from dtype and shape; FP8 is no dtype that a weight to be quantized comes in."""
    assert (spec.nbytes, spec.is_float) == (nbytes, is_float)


DEEP = b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}"

MALFORMED: dict[str, Callable[[Path], Path]] = {
    "empty file": lambda p: raw_file(p, b"", length=0),
    "prefix of five bytes": lambda p: (p.write_bytes(b"\2\0\0\0\0"), p)[1],
    "header longer than the file": lambda p: raw_file(p, {}, length=1000),
    "header length with all bits": lambda p: raw_file(p, {}, length=2**64 - 1),
    "header length with the sign bit": lambda p: raw_file(p, {}, length=2**63),
    "header is not JSON": lambda p: raw_file(p, b"hello world"),
    "header is not UTF-8": lambda p: raw_file(p, b'{"\xff\xfe":1}'),
    "header is a list": lambda p: raw_file(p, []),
    "header is nested too deeply": lambda p: raw_file(p, DEEP),
    "entry is a number": lambda p: raw_file(p, {"a": 3}),
    "entry is a string": lambda p: raw_file(p, {"a": "F32"}),
    "entry is null": lambda p: raw_file(p, {"a": None}),
    "entry without dtype": lambda p: raw_file(p, {"a": {"shape": [1], "data_offsets": [0, 4]}}, b"1234"),
    "entry without shape": lambda p: raw_file(p, {"a": {"dtype": "F32", "data_offsets": [0, 4]}}, b"1234"),
    "entry without offsets": lambda p: raw_file(p, {"a": {"dtype": "F32", "shape": [1]}}, b"1234"),
    "dtype unknown": lambda p: raw_file(p, {"a": entry(dtype="F33")}, b"1234"),
    "dtype is a number": lambda p: raw_file(p, {"a": entry(dtype=32)}, b"1234"),
    "dtype is null": lambda p: raw_file(p, {"a": entry(dtype=None)}, b"1234"),
    "dtype is a list": lambda p: raw_file(p, {"a": entry(dtype=["F32"])}, b"1234"),
    "dtype is an object": lambda p: raw_file(p, {"a": entry(dtype={"F32": 1})}, b"1234"),
    "shape is a number": lambda p: raw_file(p, {"a": entry(shape=1)}, b"1234"),
    "shape is a string": lambda p: raw_file(p, {"a": entry(shape="1")}, b"1234"),
    "shape is an object": lambda p: raw_file(p, {"a": entry(shape={"1": 1})}, b"1234"),
    "shape holds true": lambda p: raw_file(p, {"a": entry(shape=[True])}, b"1234"),
    "shape holds a fraction": lambda p: raw_file(p, {"a": entry(shape=[1.0])}, b"1234"),
    "shape holds a list": lambda p: raw_file(p, {"a": entry(shape=[[1]])}, b"1234"),
    "shape is negative": lambda p: raw_file(p, {"a": entry(shape=[-1])}, b"1234"),
    "shape is negative twice": lambda p: raw_file(p, {"a": entry(shape=[-1, -1])}, b"1234"),
    "shape is huge": lambda p: raw_file(p, {"a": entry(shape=[10**4000, 10**4000])}, b"1234"),
    "shape has many huge dimensions": lambda p: raw_file(p, {"a": entry(shape=[2**62] * 300)}, b"1234"),
    "shape and offsets are huge": lambda p: raw_file(p, {"a": entry("U8", [10**4000], [0, 10**4000])}, b"1234"),
    "offsets are three": lambda p: raw_file(p, {"a": entry(offsets=[0, 2, 4])}, b"1234"),
    "offsets are one": lambda p: raw_file(p, {"a": entry(offsets=[4])}, b"1234"),
    "offsets are a string": lambda p: raw_file(p, {"a": entry(offsets="04")}, b"1234"),
    "offsets are negative": lambda p: raw_file(p, {"a": entry(offsets=[-4, 0])}, b"1234"),
    "offsets hold false": lambda p: raw_file(p, {"a": entry(offsets=[False, 4])}, b"1234"),
    "offsets run backwards": lambda p: raw_file(p, {"a": entry(offsets=[4, 0])}, b"1234"),
    "too few bytes for the shape": lambda p: raw_file(p, {"a": entry(shape=[2])}, b"1234"),
    "too many bytes for the shape": lambda p: raw_file(p, {"a": entry(offsets=[0, 8])}, b"12345678"),
    "wrong dtype for the bytes": lambda p: raw_file(p, {"a": entry(dtype="F64")}, b"1234"),
    "data truncated": lambda p: raw_file(p, {"a": entry()}, b"123"),
    "data longer than the header says": lambda p: raw_file(p, {"a": entry()}, b"12345"),
    "data without tensors": lambda p: raw_file(p, {}, b"1234"),
    "a hole before": lambda p: raw_file(p, {"a": entry(offsets=[4, 8])}, b"12345678"),
    "a hole between": lambda p: raw_file(p, {"a": entry(), "b": entry(offsets=[8, 12])}, bytes(12)),
    "an overlap": lambda p: raw_file(p, {"a": entry(), "b": entry(offsets=[2, 6])}, bytes(6)),
    "the same bytes twice": lambda p: raw_file(p, {"a": entry(), "b": entry()}, bytes(4)),
    "the same name twice": lambda p: raw_file(
        p,
        b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"a":{"dtype":"U8","shape":[4],"data_offsets":[4,8]}}',
        bytes(8),
    ),
}


@pytest.mark.parametrize("make", MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed_headers_are_refused(make: Callable[[Path], Path], tmp_path: Path) -> None:
    """Each lie is one DuotoneError, one line, that names the file."""
    path = make(tmp_path / "bad.safetensors")
    with pytest.raises(DuotoneError) as caught:
        read_header(path)
    message = str(caught.value)
    assert str(path) in message
    assert len(message.splitlines()) == 1


def test_header_over_the_format_limit(tmp_path: Path) -> None:
    """A header above 100 MB is refused by its length, though the (sparse) file is long enough to hold it."""
    path = raw_file(tmp_path / "bad.safetensors", b"{}", length=100_000_001)
    with path.open("r+b") as file:
        file.truncate(100_000_100)
    with pytest.raises(DuotoneError, match="header length 100000001"):
        read_header(path)


def test_missing_file(tmp_path: Path) -> None:
    """A file that is not there, or is a folder, is named too."""
    for path in (tmp_path / "absent.safetensors", tmp_path):
        with pytest.raises(DuotoneError) as caught:
            read_header(path)
        assert str(path) in str(caught.value)


@pytest.fixture(scope="module")
def valid(scratch: Path) -> bytes:
    """A small valid file: three dtypes, a scalar, an empty tensor."""
    specs = {
        "model.a.weight": TensorSpec("BF16", (2, 3)),
        "b": TensorSpec("F32", ()),
        "c": TensorSpec("I64", (2,)),
        "empty": TensorSpec("U8", (0, 4)),
    }
    save_file(random_bytes(specs), scratch / "valid.safetensors", metadata={"format": "pt"})
    return (scratch / "valid.safetensors").read_bytes()


def check_honest(path: Path) -> None:
    """read_header refuses the file by name, or gives specs that cover its data exactly; the library, if it opens it, agrees."""
    try:
        found = read_header(path)
    except DuotoneError as error:
        assert str(path) in str(error)
        return
    length = struct.unpack("<Q", path.read_bytes()[:8])[0]
    assert sum(spec.nbytes for spec in found.values()) == path.stat().st_size - 8 - length
    try:
        with safe_open(path, framework="pt") as opened:
            shapes_there = {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    except SafetensorError:
        return
    assert {name: spec.shape for name, spec in found.items()} == shapes_there


@THOROUGH
@given(data=st.data())
def test_any_mutation_is_refused_or_harmless(scratch: Path, valid: bytes, data: st.DataObject) -> None:
    """A few bytes changed, cut or added anywhere: a DuotoneError that names the file, or a header that fits the file."""
    content = bytearray(valid)
    header_end = 8 + struct.unpack("<Q", valid[:8])[0]
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, header_end + 8))] = data.draw(
            st.one_of(st.integers(0, 255), st.sampled_from(b'0129-.[]{}",:eEtn'))
        )
    cut = data.draw(st.one_of(st.just(len(content)), st.integers(0, len(content))))
    path = scratch / "mutated.safetensors"
    path.write_bytes(bytes(content[:cut]) + data.draw(st.binary(max_size=4)))
    check_honest(path)


leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 8),
    st.integers(),
    st.floats(),
    st.text(max_size=3),
    st.sampled_from(sorted(DTYPE_BITS)),
)
values = st.recursive(
    leaves, lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=3))
)
entries = st.one_of(
    values,
    st.fixed_dictionaries(
        {
            "dtype": st.one_of(st.sampled_from(sorted(DTYPE_BITS)), values),
            "shape": st.one_of(st.lists(st.integers(0, 3), max_size=3), values),
            "data_offsets": st.one_of(st.lists(st.integers(0, 9), min_size=2, max_size=2), values),
        }
    ),
)


@THOROUGH
@given(header=st.one_of(st.dictionaries(st.text(max_size=3), entries, max_size=3), values), data=st.binary(max_size=12))
def test_any_header_is_refused_or_fits(scratch: Path, header: Any, data: bytes) -> None:
    """Any JSON at all as a header: a DuotoneError that names the file, or a header that fits the file."""
    check_honest(raw_file(scratch / "any.safetensors", header, data))
