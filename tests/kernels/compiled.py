"""Compiles the Triton programs for GPUs that need not be there, and prints what the machine code is made of: a JSON object.

In a process of its own, since Triton either interprets or compiles: run by test_gpu_compiled.py.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from duotone.kernels.gpu import grouped_kernels, kernels, launch, row_kernels, solver, solver_kernels

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
#: What `launch` hands over, BF16 as its bits; a size has its own name.
POINTERS = {
    "x": "*i16", "x8": "*fp8e4nv", "codes": "*i32", "words": "*i16", "index": "*i32", "table": "*i32", "scales": "*fp32",
    "outer_scale": "*fp32", "bias": "*i16", "y": "*i16", "partial": "*fp32", "values": "*fp8e4nv", "static_scale": "*fp32",
    "arrived": "*i32", "order": "*i32", "starts": "*i32", "blocks": "*i32", "fp8_max": "fp32", "smallest_scale": "fp32",
}  # fmt: skip
#: Of the solver's programs: everything but these is float32.
SOLVER_POINTERS = {"codes": "*u8", "moves": "*i32", "group": "*i32"}
SOLVER_NUMBERS = {"N", "B", "K", "coupling_row", "steps", "groups", "candidates", "group_size"}
#: What `rows` hands over under other names or in other types.
ROWS = {
    "x8": "*u8", "weight": "*i16", "k": "*i16", "v": "*i16", "keys": "*u8", "values": "*u8", "k_scale": "*fp32",
    "v_scale": "*fp32", "positions": "*i64", "count": "fp32", "epsilon": "fp32",
}  # fmt: skip
#: Of these, launches find that 16 divides them; and of strides.
ALIGNED = {"N", "K", "rows", "padded", "part_rows", "coupling_row", "k_size", "v_size"}
CPU = torch.device("cpu")
INSTRUCTIONS = ("LDL", "STL", "PRMT", "LDGSTS", "HMMA", "F2FP")
ROW_PROGRAMS = row_kernels.norm_and_quantize_rows, row_kernels.write_cache, row_kernels.read_cache
ENDING = {"HAS_BIAS": True, "IS_BF16": True, "IS_FP16": False}


def compiled(program: Any, arch: int, constants: dict[str, Any], warps: int = 4, stages: int = 3) -> dict[str, Any]:
    """Facts of a program for an architecture, 90 for Hopper: instructions, registers, what was spilled, and its text."""
    types = POINTERS | (ROWS if program in (row_kernels.quantize_rows, *ROW_PROGRAMS) else {})
    if constants.get("IS_FP8"):
        types |= dict.fromkeys(("codes", "words", "index", "table"), "*fp8e4nv")
    if program.fn.__module__ == solver_kernels.__name__:
        types = {name: "*fp32" for name in program.arg_names if name not in SOLVER_NUMBERS} | SOLVER_POINTERS
        types |= {"hessian": "*i16"} if constants.get("IS_BF16") else {}
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in program.arg_names}
    fits = lambda name: name in ALIGNED or name[-2:] in {"_b", "_h", "_t"}  # noqa: E731
    aligned = [i for i, (name, kind) in enumerate(signature.items()) if kind.startswith("*") or (kind == "i32" and fits(name))]
    source = ASTSource(program, signature, constants, {(i,): [["tt.divisibility", 16]] for i in aligned})
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": False}
    options |= {"debug": "HAS_POSITIONS" in constants, "sanitize_overflow": False}
    built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(built.asm["cubin"])
        code = subprocess.run([TOOLS / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True).stdout
        used = [TOOLS / "cuobjdump", "-res-usage", file.name]
        usage = subprocess.run(used, capture_output=True, text=True, check=True).stdout
    return {
        "products": sorted(set(re.findall(r"(?:wgmma\.mma_async|mma\.sync|tcgen05\.mma)\S*", built.asm["ptx"]))),
        "instructions": {name: len(re.findall(rf"\b{name}\b", code)) for name in INSTRUCTIONS},
        "loop": main_loop(code),
        "arrives": arrives(built.asm["ptx"]),
        "accesses": sorted(set(re.findall(r"(?:ld|st)\.global\S*", built.asm["ptx"]))),
        "stops": "__assertfail" in built.asm["ptx"],
        "inexact": len(re.findall(r"\.approx|\.ftz|\bfma\.|\.full\.", built.asm["ptx"])),
        "local_in_ptx": len(re.findall(r"\b(?:ld|st)\.local", built.asm["ptx"])),
        "registers": int(re.findall(r"REG:(\d+)", usage)[-1]),
        "stack": int(re.findall(r"STACK:(\d+)", usage)[-1]) + int(re.findall(r"LOCAL:(\d+)", usage)[-1]),
        "shared": built.metadata.shared,
        "fused": len(re.findall(r"\bfma\.rn", built.asm["ptx"])),
        "lookups": lookups(built.asm["ttgir"]),
        "loads_in_loop": loads_in_loop(built.asm["ttgir"]),
    }


def main_loop(code: str) -> dict[str, int]:
    """How often each instruction stands in the loop that multiplies most, and in nothing around it."""
    places: dict[str, int] = {}
    found: list[str] = []
    chosen: list[str] = []
    for line in code.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            places[label[1]] = len(found)
        if text := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?\s*(\w+)(.*);", line):
            found.append(text[1])
            back = re.search(r"`\((\.L_x_\d+)\)", text[2]) if text[1] == "BRA" else None
            loop = found[places[back[1]] :] if back and back[1] in places else []
            chosen = max(chosen, loop, key=lambda each: (sum(name.endswith("MMA") for name in each), -len(each)))
    return dict(Counter(chosen))


def arrives(text: str) -> str | None:
    """What stands around the only atomic addition of a program, in order; None: it has none."""
    before, name, after = text.partition("atom.")
    if not name:
        return None
    kind = name + after.split()[0]
    steps = {"st.global": "stores", "bar.sync": "barrier", "ld.global.cg": "reads", "cp.async.cg": "reads"}
    words = re.compile("|".join(map(re.escape, steps)))
    first = [steps[word] for word in words.findall(before.rpartition("st.global")[2])]
    later = [steps[word] for word in words.findall(after)]
    return ", ".join(["stores", *dict.fromkeys(first), kind, *list(dict.fromkeys(later))[:2]])


def lookups(text: str) -> list[str]:
    """The layouts in which 4-bit codes are looked up, their definitions in place of their names."""
    named = dict(re.findall(r"^(#\w+) = (.*)$", text, re.M))
    found = re.findall(r"elementwise_inline_asm.*: tensor<\d+x\d+xi16, ([^>]*(?:>)?)>,", text)
    return sorted({named.get(layout, layout) for layout in found})


def loads_in_loop(text: str) -> int:
    """Loads that the loop waits for: those that are not copied ahead into shared memory."""
    _, _, loop = text.partition("scf.for")
    return len(re.findall(r"= tt\.load", loop.partition("scf.yield")[0]))


def steps(arch: int, tile: launch.Tile, is_paired: bool = True) -> dict[str, bool]:
    """As `launch.steps` on a device of the architecture."""
    return {"PAIRS": launch.steps(2 if is_paired else 1, tile.tokens, CPU)["PAIRS"], "PROMOTES": arch < 100}


def product(
    arch: int, tokens: int, is_signed: bool = False, group_size: int = 128, is_split: bool = True, is_paired: bool = True
) -> dict[str, Any]:
    """`multiply` as `launch` lays it out for so many tokens; chunks are an even number where `is_paired`."""
    tile = launch.tile_for(tokens)
    constants = {"GROUP": group_size, "TO_A_WORD": 4, "SIGNED": is_signed, "USES_PTX": True, "BLOCK_N": tile.rows}
    constants |= {"BLOCK_M": tile.tokens, "IS_SPLIT": is_split} | steps(arch, tile, is_paired) | ENDING
    constants |= {"M": 1} if tokens == 1 else {}
    return compiled(kernels.multiply, arch, constants, tile.warps, tile.stages)


def row_programs() -> dict[str, dict[str, Any]]:
    """The programs of `row_kernels` as `rows` lays them out, for heads of 128 and rows of up to 16384."""
    normed, bf16 = {"BLOCK": 4096, "IS_STATIC": False, "COUNTS": True}, {"IS_BF16": True, "IS_FP16": False}
    tile, kept = {"BLOCK_T": 16, "BLOCK_D": 128}, {"HAS_POSITIONS": True, "IS_BF16": True}
    norm, write, read = ROW_PROGRAMS
    facts = {
        "sm_90 norm 16384": compiled(norm, 90, {"BLOCK": 16384, "IS_STATIC": True, "COUNTS": False} | bf16, 16),
        "sm_90 write_cache 1": compiled(write, 90, tile | kept | {"BLOCK_T": 1}, 1),
    }
    for arch in (89, 90, 100):
        facts[f"sm_{arch} norm 4096"] = compiled(norm, arch, normed | bf16, 8)
        facts[f"sm_{arch} write_cache 16"] = compiled(write, arch, tile | kept)
        facts[f"sm_{arch} read_cache"] = compiled(read, arch, tile | bf16)
    return facts


def grouped(arch: int, tokens: int, is_split: bool = False, is_fp8: bool = False) -> dict[str, Any]:
    """`multiply_grouped` as `grouped` lays it out for so many tokens an expert."""
    tile = launch.tile_for(tokens)
    constants = {"GROUP": 128, "TO_A_WORD": 4, "SIGNED": False, "USES_PTX": True, "BLOCK_N": tile.rows}
    constants |= {"BLOCK_M": tile.tokens, "IS_SPLIT": is_split, "IS_FP8": is_fp8} | steps(arch, tile) | ENDING
    return compiled(grouped_kernels.multiply_grouped, arch, constants, tile.warps, tile.stages // (1 + is_fp8))


def main() -> None:
    """Hopper in full, Ada and Blackwell once."""
    whole = {"BLOCK": 16384, "IS_WHOLE": True, "COUNTS": True, "IS_BF16": True, "IS_STATIC": False}
    facts = {
        "sm_90 multiply 1": product(90, 1, is_split=False),  # Triton compiles for 1 anew
        "sm_90 multiply 16": product(90, 16),
        "sm_90 multiply 16 signed": product(90, 16, is_signed=True),
        "sm_90 multiply 32": product(90, 32, is_split=False),
        "sm_90 multiply 64": product(90, 64, is_split=False),
        "sm_90 multiply 16 unpaired": product(90, 16, is_paired=False),
        "sm_90 multiply 16 g64": product(90, 16, group_size=64),
        "sm_90 multiply 16 g32": product(90, 16, group_size=32),
        "sm_90 write_values": compiled(
            kernels.write_values, 90, {"GROUP": 128, "TO_A_WORD": 4, "SIGNED": False, "USES_PTX": True}
        ),
        "sm_90 quantize_rows": compiled(row_kernels.quantize_rows, 90, whole, 32),
        "sm_90 quantize_rows of longer rows": compiled(row_kernels.quantize_rows, 90, whole | {"IS_WHOLE": False}, 32),
        "sm_90 multiply_grouped 16": grouped(90, 16),
        "sm_90 multiply_grouped 16 split": grouped(90, 16, is_split=True),
        "sm_90 multiply_grouped 64": grouped(90, 64),
        "sm_90 find_blocks": compiled(grouped_kernels.find_blocks, 90, {"EXPERTS": 256, "BLOCK_M": 16}),
        "sm_89 multiply_grouped 16": grouped(89, 16),
        "sm_100 multiply_grouped 16": grouped(100, 16),
        **{f"sm_{arch} multiply_grouped 16 fp8": grouped(arch, 16, is_fp8=True) for arch in (89, 90, 100)},
        "sm_90 multiply_grouped 64 fp8": grouped(90, 64, is_fp8=True),
        "sm_89 multiply 16": product(89, 16),
        "sm_100 multiply 16": product(100, 16),
        **row_programs(),
    }
    table = {"HAS_ZERO": True, "LOWEST": -8.0, "FP8_MAX": 448.0}
    sizes = {
        "sweep": {"RULE": 0, "ROWS": solver._ROWS, "COLUMNS": solver._COLUMNS},
        "open_columns": {"BLOCK": solver._LANES},
        "local_search": {"TENURE": 12, "IS_BF16": True, "BLOCK": solver.lanes_for(4096)},
        "local_search of narrow rows": {"TENURE": 12, "IS_BF16": False, "BLOCK": solver.lanes_for(1000)},
        "local_search of wide rows": {"TENURE": 12, "IS_BF16": True, "BLOCK": solver.lanes_for(14336)},
        "scale_error": {"HAS_WEIGHT": True, "ROWS": solver._LANES // 128, "WIDTH": 128},
    }
    for name, size in sizes.items():
        program, warps = name.split()[0], 4 if "BLOCK" not in size else solver.warps_for(size["BLOCK"])
        facts[f"sm_90 solver {name}"] = compiled(getattr(solver_kernels, program), 90, table | size, warps)
    json.dump(facts, sys.stdout)


if __name__ == "__main__":
    main()
