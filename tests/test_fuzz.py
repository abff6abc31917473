"""Strangers' files by the thousand: every reader answers with what it read or with one DuotoneError, soon, and writes nothing.

A case is a valid file or config with a few random mutations, from a seed that the failure names. 300 cases a reader by default;
`-m slow` runs 100,000 in all.
"""

import copy
import json
import random
import resource
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from duotone.checkpoint.compressed_tensors import from_tensors, layout_of, quantization_config, scheme_from_config
from duotone.checkpoint.headers import read_header
from duotone.checkpoint.layouts.foreign import FOREIGN
from duotone.checkpoint.sidecar import layer_scales, read_sidecar
from duotone.checkpoint.source import open_source
from duotone.errors import DuotoneError
from duotone.scheme import HOPPER, Scheme

#: A value where another is expected; the long ones are what a length or a name may be in a file made to hurt.
ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 7, 8, 1.5, float("nan"), float("inf"), 2**31, 2**63, 2**64, -(2**63), 10**400, "", "a", "BF16",
    "F4", "../x", "/etc/passwd", "a\0b", "\ud800", "x" * 5000, [], {}, [[]], [0], [0, 8], [8, 0], [-8, 0], [2**40, 2**40],
    [1] * 3000, {"dtype": "F32"}, [None], "é\n", "__metadata__", "compressed", "pack-quantized", 4, 128,
)  # fmt: skip


def mutated(value: Any, rng: random.Random) -> Any:
    """A deep copy with one to four places changed: replaced, removed, repeated, nested or swapped."""
    value = copy.deepcopy(value)
    for _ in range(rng.randint(1, 4)):
        place = value
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place))) if isinstance(place, list) else []
            if not keys:
                break
            key = rng.choice(keys)
            inner = place[key]
            if isinstance(inner, dict | list) and inner and rng.random() < 0.8:
                place = inner
                continue
            _change(place, key, rng)
            break
    return value


def _change(place: Any, key: Any, rng: random.Random) -> None:
    kind = rng.randrange(6)
    if kind == 0:
        del place[key]
    elif kind == 1 and isinstance(place, dict):
        place[str(rng.choice(ODD))] = place.pop(key)
    elif kind == 2 and isinstance(place, list):
        place.insert(key, rng.choice(ODD))
    elif kind == 3 and isinstance(place[key], int) and not isinstance(place[key], bool):
        place[key] += rng.choice((-1, 1, 8, -8, 2**32))
    else:
        place[key] = copy.deepcopy(rng.choice(ODD))


def as_json(value: Any) -> bytes:
    """Also what is no JSON to a strict reader: NaN, lone surrogates, numbers of 400 digits."""
    return json.dumps(value).encode("utf-8", "surrogatepass")


def a_header() -> dict[str, Any]:
    return {
        "__metadata__": {"format": "pt"},
        "a.weight": {"dtype": "BF16", "shape": [4, 8], "data_offsets": [0, 64]},
        "b.weight_packed": {"dtype": "I32", "shape": [2, 4], "data_offsets": [64, 96]},
        "c": {"dtype": "F32", "shape": [], "data_offsets": [96, 100]},
    }


def a_file(rng: random.Random) -> bytes:
    """A safetensors file of 100 bytes of data, damaged."""
    header, data = as_json(a_header()), bytes(range(100))
    kind = rng.randrange(9)
    if kind < 4:
        header = as_json(mutated(a_header(), rng))
    elif kind == 4:  # the same name twice
        header = header[:-1] + b',"c":{"dtype":"F32","shape":[],"data_offsets":[96,100]}}'
    elif kind == 5:
        header = rng.choice((b"[", b'{"a":')) * rng.choice((10, 1000, 60000))
    elif kind == 6:
        header = bytes(rng.choice(header) if rng.random() < 0.95 else rng.randrange(256) for _ in header)
    elif kind == 7:
        at = rng.randrange(len(header))
        header = header[:at] + bytes([rng.randrange(256)]) + header[at + 1 :]
    length = (
        len(header) if rng.random() < 0.8 else rng.choice((0, 1, 2, len(header) - 1, len(header) + 1, 2**31, 2**63, 2**64 - 1))
    )
    whole = struct.pack("<Q", length) + header + data
    cut = rng.random()
    return whole if cut < 0.7 else whole[: rng.randrange(len(whole) + 1)] if cut < 0.9 else whole + b"\0" * rng.randrange(1, 9)


def headers(folder: Path) -> Callable[[random.Random], None]:
    """One file: its header, then through the library that reads the data."""
    path = folder / "model.safetensors"
    (folder / "config.json").write_text('{"model_type": "llama"}')

    def case(rng: random.Random) -> None:
        path.write_bytes(a_file(rng))
        found = read_header(path)
        assert all(spec.nbytes >= 0 for spec in found.values())
        loaded = open_source(folder).load(found)
        assert {name: tuple(tensor.shape) for name, tensor in loaded.items()} == {
            name: spec.shape for name, spec in found.items()
        }

    return case


def indexes(folder: Path) -> Callable[[random.Random], None]:
    """An index that may name shards anywhere."""
    (folder / "config.json").write_text('{"model_type": "llama"}')
    header = as_json(a_header())
    (folder / "m.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(100))
    good = {"metadata": {}, "weight_map": dict.fromkeys(("a.weight", "b.weight_packed", "c"), "m.safetensors")}

    def case(rng: random.Random) -> None:
        (folder / "model.safetensors.index.json").write_bytes(as_json(mutated(good, rng)))
        source = open_source(folder)
        assert all(spec.file == "m.safetensors" for spec in source.tensors.values())

    return case


def configs(folder: Path) -> Callable[[random.Random], None]:
    """A quantization_config, ours or another tool's."""
    del folder
    good = (
        quantization_config(Scheme(), ["lm_head"]),
        {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True},
        {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": False},
        {"quant_method": "modelopt", "quant_algo": "W4A8_AWQ", "group_size": 128},
    )

    def case(rng: random.Random) -> None:
        config = mutated(rng.choice(good), rng)
        for read in (layout_of, scheme_from_config):
            try:
                read(config)
            except DuotoneError:
                continue

    return case


def sidecars(folder: Path) -> Callable[[random.Random], None]:
    """duotone.json."""
    good = {"format_version": 1, "layers": {"a": {"outer_scale": 0.5, "input_scale": 2.0}, "b": {}}}

    def case(rng: random.Random) -> None:
        (folder / "duotone.json").write_bytes(as_json(mutated(good, rng)))
        layer_scales(read_sidecar(folder), "a")

    return case


#: Valid tensors of a linear [16, 32] in groups of 32, by layout.
PARTS: dict[str, dict[str, Tensor]] = {
    "compressed-tensors": {
        "weight_packed": torch.zeros(16, 4, dtype=torch.int32), "weight_scale": torch.ones(16, 1).bfloat16(),
        "weight_shape": torch.tensor([16, 32]),
    },
    "int-quantized": {"weight_scale": torch.ones(16, 1), "weight": torch.zeros(16, 32, dtype=torch.int8)},
    "gptq": {
        "qweight": torch.zeros(4, 16, dtype=torch.int32), "scales": torch.ones(1, 16).half(),
        "qzeros": torch.full((1, 2), 0x77777777, dtype=torch.int32), "g_idx": torch.zeros(32, dtype=torch.int32),
    },
    "awq": {
        "qweight": torch.zeros(32, 2, dtype=torch.int32), "scales": torch.ones(1, 16).half(),
        "qzeros": torch.full((1, 2), -0x77777778, dtype=torch.int32),
    },
}  # fmt: skip
SHAPES = ((), (0,), (1,), (2,), (16,), (32,), (0, 4), (16, 0), (16, 1), (1, 16), (16, 4), (4, 16), (2, 16, 4), (3, 5), (16, 32))
DTYPES = (torch.int32, torch.int64, torch.int8, torch.uint8, torch.bool, torch.float32, torch.float16, torch.bfloat16)


def tensors(folder: Path) -> Callable[[random.Random], None]:
    """A linear's tensors: missing, of other dtypes and shapes, not finite, negative."""
    del folder
    grouped = {"config_groups": {"group_0": {"weights": {"group_size": 32, "symmetric": True}}}, "group_size": 32}
    generator = torch.Generator().manual_seed(0)

    def case(rng: random.Random) -> None:
        layout = rng.choice(sorted(PARTS))
        parts = dict(PARTS[layout])
        for _ in range(rng.randint(1, 2)):
            name, shape = rng.choice(sorted(parts)), rng.choice(SHAPES)
            values = (
                torch.randint(-9, 40, shape, generator=generator)
                if rng.random() < 0.8
                else torch.full(shape, rng.choice((-1, 2**30)))
            )
            parts[name] = values.to(rng.choice((*DTYPES, parts[name].dtype, parts[name].dtype)))
            if parts[name].is_floating_point() and rng.random() < 0.3:
                parts[name] = parts[name] * rng.choice((float("nan"), float("inf"), -1.0, 0.0))
        if rng.random() < 0.5:
            found = FOREIGN[layout].read("a", parts, grouped)
            assert int(found.codes.max()) <= 15 and bool(torch.isfinite(found.scale).all())
        else:
            named = {f"a.{name}": tensor for name, tensor in parts.items() if rng.random() < 0.95}
            from_tensors("a", named, Scheme(HOPPER, 32, rng.random() < 0.7))

    return case


READERS = {"headers": headers, "indexes": indexes, "configs": configs, "sidecars": sidecars, "tensors": tensors}


def run(kind: str, cases: int, folder: Path) -> Iterator[float]:
    """Seconds of each case."""
    case = READERS[kind](folder)
    for seed in range(cases):
        start = time.perf_counter()
        try:
            case(random.Random(f"{kind} {seed}"))
        except DuotoneError as error:
            assert (str(error) and str(error).isprintable()) or "\n" not in str(error)[:40]
        except BaseException as error:
            raise AssertionError(f"{kind}, seed {seed}: {type(error).__name__}: {error}") from error
        yield time.perf_counter() - start


@pytest.mark.parametrize("kind", READERS)
def test_damaged_files_end_in_a_sentence(kind: str, tmp_path: Path) -> None:
    """Or are read, where the damage hurts nobody."""
    (tmp_path / "in").mkdir()
    assert max(run(kind, 300, tmp_path / "in")) < 5
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.slow
def test_a_hundred_thousand_damaged_files(tmp_path: Path) -> None:
    """None crashes, hangs or takes much memory, and nothing is written beside them."""
    (tmp_path / "in").mkdir()
    before, longest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 0.0
    for kind in READERS:
        longest = max(longest, *run(kind, 100_000 // len(READERS), tmp_path / "in"))
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(f"longest case {longest:.2f} s, memory grew by {grown:.0f} MB")
    assert longest < 10 and grown < 500
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
