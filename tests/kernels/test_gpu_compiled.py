"""What the compiler makes of the Triton programs, for GPUs that need not be there: the instructions that speed depends on.

This is no measurement: nothing here says how fast anything runs.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="needs the package triton (the dev extra brings it on Linux)")

ROOT = Path(__file__).resolve().parents[2]
PRODUCTS = {
    "sm_89": {"mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32"},
    "sm_90": {f"wgmma.mma_async.sync.aligned.m64n{tokens}k32.f32.e4m3.e4m3" for tokens in (16, 32, 64)},
    "sm_100": {"tcgen05.mma.cta_group::1.kind::f8f6f4"},
}
#: Three programs of 4 warps fit a multiprocessor's 65536 registers then, one at least its shared memory of 99 KiB (Ada).
MOST_REGISTERS, MOST_SHARED = 168, 99 * 1024
#: Instructions that Hopper has 16 lanes for, not 32.
INTEGERS = ("PRMT", "LOP3", "SHF", "IADD3", "LEA", "ISETP", "SEL", "PLOP3", "VIADD")


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Of each program for each architecture. Compiled in another process: here Triton may be set to interpret."""
    return told_by("tests.kernels.compiled", tmp_path_factory.mktemp("triton"))


def told_by(module: str, folder: Path) -> Any:
    """What a module that compiles prints."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    command = [sys.executable, "-m", module]
    environment |= {"TRITON_CACHE_DIR": str(folder)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_fp8_products(facts: dict[str, dict[str, Any]]) -> None:
    """The units' FP8 products everywhere, with the tokens as the short side; no fallback to FP16's, no conversions to it."""
    found: dict[str, set[str]] = {}
    for name, fact in facts.items():
        if "multiply" in name:
            assert len(fact["products"]) == 1, name
            found.setdefault(name.split()[0], set()).update(fact["products"])
            assert not fact["instructions"]["HMMA"] and not fact["instructions"]["F2FP"], name
    assert found == PRODUCTS


def test_nothing_is_spilled(facts: dict[str, dict[str, Any]]) -> None:
    """No local memory, and no more registers and shared memory than leave room for other programs."""
    for name, fact in facts.items():
        spilled = fact["local_in_ptx"], fact["stack"], fact["instructions"]["LDL"], fact["instructions"]["STL"]
        assert spilled == (0, 0, 0, 0), f"{name} spills: {spilled}"
        assert fact["registers"] <= MOST_REGISTERS, f"{name}: {fact['registers']} registers"
        assert fact["shared"] <= MOST_SHARED, f"{name}: {fact['shared']} bytes of shared memory"


def test_the_solver_fuses_nothing(facts: dict[str, dict[str, Any]]) -> None:
    """A product and a sum are rounded each, as a CPU does it; divisions are exact ones, which use fused steps inside."""
    found = {name: fact["fused"] for name, fact in facts.items() if "solver" in name}
    assert len(found) == 6 and not any(found.values()), found


def test_everything_is_read_ahead(facts: dict[str, dict[str, Any]]) -> None:
    """Codes, index, tables and activations are copied to shared memory while older ones are multiplied: no load is awaited."""
    for name, fact in facts.items():
        if "multiply" in name:
            assert fact["loads_in_loop"] == 0 and fact["instructions"]["LDGSTS"] > 0, name


def test_a_lookup_gets_four_neighbors(facts: dict[str, dict[str, Any]]) -> None:
    """What `kernels._look_up` asks of the compiler: the 4 elements of an instance are neighbors along K, in order."""
    seen = 0
    for name, fact in facts.items():
        for layout in fact["lookups"]:
            along_k = re.search(r"kWidth = (\d+)", layout) or re.search(
                r"sizePerThread = \[1, (\d+)\].*order = \[1, 0\]", layout
            )
            neighbors = int(along_k[1] or along_k[2]) >= 4 if along_k else "register = [[0, 1], [0, 2]" in layout
            assert neighbors, f"{name}: {layout}"
            seen += 1
    assert seen >= 8


def test_the_loop_costs_what_it_should(facts: dict[str, dict[str, Any]]) -> None:
    """A prmt decodes 4 of 8 magnitudes with signs, 3 decode 4 of 16 values; what else there is in the loop stays small.

    Hopper starts half an integer instruction a cycle and scheduler, one of others: of both no more than lets codes come as fast
    as memory gives them, which for 4.8 TB/s, 132 multiprocessors and 1.755 GHz is 395 cycles a chunk of 128 rows.
    """
    for name, lookups, integers, all_of_them in (("16", 96, 1.4, 2.5), ("16 signed", 32, 0.9, 2.0), ("32", 96, 1.4, 2.6)):
        loop, a_pair = facts[f"sm_90 multiply {name}"]["loop"], 2 * 128
        assert loop["PRMT"] == 2 * lookups and loop["QGMMA"] == 16 and loop["BAR"] <= 5
        counted = sum(loop.get(each, 0) for each in INTEGERS)  # two cycles each, of two chunks
        assert counted <= integers * a_pair and counted < 395 and sum(loop.values()) <= all_of_them * a_pair


def test_sums_are_taken_out_of_units_that_keep_few_bits(facts: dict[str, dict[str, Any]]) -> None:
    """An addition for each of a thread's sums and chunk on Ada and Hopper."""
    seen = 0
    for name, fact in facts.items():
        architecture, kind, *what = name.split()
        if kind.startswith("multiply") and architecture != "sm_100":
            tokens, chunks = int(what[0]), 1 if {"unpaired", "64", "fp8"} & set(what) else 2
            assert fact["loop"]["FADD"] >= chunks * max(16, tokens) * 128 // (256 if tokens == 64 else 128), name
            seen += 1
    assert seen >= 14


def test_a_split_arrives_after_its_sums(facts: dict[str, dict[str, Any]]) -> None:
    """All threads' stores come before the barrier, it before the addition that all of the GPU goes by, reads after that."""
    found = {name: fact["arrives"] for name, fact in facts.items() if fact["arrives"] is not None}
    assert {"sm_89 multiply 16", "sm_90 multiply 16", "sm_100 multiply 16", "sm_90 multiply_grouped 16 split"} <= found.keys()
    assert set(found.values()) == {"stores, barrier, atom.global.gpu.acq_rel.add.u32, barrier, reads"}


def test_rows_are_read_and_written_in_words_of_128_bits(facts: dict[str, dict[str, Any]]) -> None:
    """All but scales and positions; one warp for the 256 bytes of a single token takes narrower ones."""
    wide, one, position = {"ld.global.v4.b32", "st.global.v4.b32"}, {"ld.global.b32"}, {"ld.global.b64"}
    meant = {"norm": wide | {"st.global.b32"}, "write_cache": wide | one | position, "read_cache": wide | one}
    seen = 0
    for name, fact in facts.items():
        kind = name.split()[1]
        if kind in meant and name != "sm_90 write_cache 1":
            scale = one if name == "sm_90 norm 16384" else set()
            assert set(fact["accesses"]) == meant[kind] | scale, name
            # Four programs of 8 warps share a multiprocessor; the longest row, of 16 warps, has one at least for itself.
            assert fact["registers"] <= (96 if name == "sm_90 norm 16384" else 64) and fact["shared"] <= 4096, name
            assert fact["inexact"] == 0, "quotients and roots are rounded once, sums and products each by itself"
            assert fact["stops"] == (kind == "write_cache"), "at a position outside of the cache"
            seen += 1
    assert seen == 10
    assert set(facts["sm_90 write_cache 1"]["accesses"]) == {"ld.global.v2.b32", "st.global.b32"} | one | position
    assert wide <= set(facts["sm_90 quantize_rows"]["accesses"])


@pytest.mark.slow
def test_what_is_launched_compiles(tmp_path: Path) -> None:
    """Every program with all that launches hand over, in grids and shared memory that a Hopper GPU has."""
    launched = told_by("tests.kernels.launched", tmp_path)
    programs = {"multiply", "write_values", "quantize_rows", "norm_and_quantize_rows", "write_cache", "read_cache"}
    programs |= {"find_blocks", "multiply_grouped", "sweep", "open_columns", "local_search", "scale_error"}
    assert {launch["name"] for launch in launched} == programs
    for launch in launched:
        across, down, deep = launch["grid"]
        assert 0 < across < 2**31 and 0 < down < 2**16 and 0 < deep < 2**16, launch
        assert launch["shared"] <= 227 * 1024, launch
