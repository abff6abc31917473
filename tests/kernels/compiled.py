"""Compiles the Triton programs for GPUs that need not be there, and prints what the machine code is made of: a JSON object.

In a process of its own, since Triton either interprets or compiles: run by test_gpu_compiled.py.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from duotone.kernels.gpu import grouped_kernels, kernels, launch

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
#: What `launch` hands over, BF16 as its bits; a size has its own name.
POINTERS = {
    "x": "*i16", "x8": "*fp8e4nv", "codes": "*i32", "words": "*i16", "index": "*i32", "table": "*i32", "scales": "*fp32",
    "outer_scale": "*fp32", "bias": "*i16", "y": "*i16", "partial": "*fp32", "values": "*fp8e4nv", "static_scale": "*fp32",
    "order": "*i32", "starts": "*i32", "blocks": "*i32", "fp8_max": "fp32", "smallest_scale": "fp32",
}  # fmt: skip
#: Of these, launches find that 16 divides them.
ALIGNED = {"N", "K", "rows", "padded", "part_rows"}
INSTRUCTIONS = ("LDL", "STL", "PRMT", "LDGSTS", "HMMA", "F2FP")
ENDING = {"HAS_BIAS": True, "IS_BF16": True, "IS_FP16": False}


def compiled(program: Any, arch: int, constants: dict[str, Any], warps: int = 4, stages: int = 3) -> dict[str, Any]:
    """Facts of a program for an architecture, 90 for Hopper: instructions, registers, what was spilled, and its text."""
    types = POINTERS | ({"x8": "*u8"} if program is kernels.quantize_rows else {})
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in program.arg_names}
    aligned = [i for i, (name, kind) in enumerate(signature.items()) if kind.startswith("*") or name in ALIGNED]
    source = ASTSource(program, signature, constants, {(i,): [["tt.divisibility", 16]] for i in aligned})
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": False}
    built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(built.asm["cubin"])
        code = subprocess.run([TOOLS / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True).stdout
        used = [TOOLS / "cuobjdump", "-res-usage", file.name]
        usage = subprocess.run(used, capture_output=True, text=True, check=True).stdout
    return {
        "products": sorted(set(re.findall(r"(?:wgmma\.mma_async|mma\.sync|tcgen05\.mma)\S*", built.asm["ptx"]))),
        "instructions": {
            name: len(re.findall(rf"\b{name}\b", code)) for name in ("LDL", "STL", "PRMT", "LDGSTS", "HMMA", "F2FP")
        },
        "local_in_ptx": len(re.findall(r"\b(?:ld|st)\.local", built.asm["ptx"])),
        "registers": int(re.findall(r"REG:(\d+)", usage)[-1]),
        "stack": int(re.findall(r"STACK:(\d+)", usage)[-1]) + int(re.findall(r"LOCAL:(\d+)", usage)[-1]),
        "shared": built.metadata.shared,
        "lookups": lookups(built.asm["ttgir"]),
        "loads_in_loop": loads_in_loop(built.asm["ttgir"]),
    }


def lookups(text: str) -> list[str]:
    """The layouts in which 4-bit codes are looked up, their definitions in place of their names."""
    named = dict(re.findall(r"^(#\w+) = (.*)$", text, re.M))
    found = re.findall(r"elementwise_inline_asm.*: tensor<\d+x\d+xi16, ([^>]*(?:>)?)>,", text)
    return sorted({named.get(layout, layout) for layout in found})


def loads_in_loop(text: str) -> int:
    """Loads that the loop waits for: those that are not copied ahead into shared memory."""
    _, _, loop = text.partition("scf.for")
    return len(re.findall(r"= tt\.load", loop.partition("scf.yield")[0]))


def product(arch: int, tokens: int, is_signed: bool = False, group_size: int = 128, is_split: bool = True) -> dict[str, Any]:
    """`multiply` as `launch` lays it out for so many tokens."""
    tile = launch.tile_for(tokens)
    constants = {"GROUP": group_size, "TO_A_WORD": 4, "SIGNED": is_signed, "USES_PTX": True, "BLOCK_N": tile.rows}
    constants |= {"BLOCK_M": tile.tokens, "IS_SPLIT": is_split} | ENDING | ({"M": 1} if tokens == 1 else {})
    return compiled(kernels.multiply, arch, constants, tile.warps, tile.stages)


def grouped(arch: int, tokens: int) -> dict[str, Any]:
    """`multiply_grouped` as `grouped` lays it out for so many tokens an expert."""
    tile = launch.tile_for(tokens)
    constants = {"GROUP": 128, "TO_A_WORD": 4, "SIGNED": False, "USES_PTX": True, "BLOCK_N": tile.rows}
    constants |= {"BLOCK_M": tile.tokens} | ENDING
    return compiled(grouped_kernels.multiply_grouped, arch, constants, tile.warps, tile.stages)


def main() -> None:
    """Hopper in full, Ada and Blackwell once."""
    facts = {
        "sm_90 multiply 1": product(90, 1, is_split=False),  # Triton compiles for 1 anew
        "sm_90 multiply 16": product(90, 16),
        "sm_90 multiply 16 signed": product(90, 16, is_signed=True),
        "sm_90 multiply 32": product(90, 32, is_split=False),
        "sm_90 multiply 64": product(90, 64, is_split=False),
        "sm_90 multiply 16 g32": product(90, 16, group_size=32),
        "sm_90 write_values": compiled(
            kernels.write_values, 90, {"GROUP": 128, "TO_A_WORD": 4, "SIGNED": False, "USES_PTX": True}
        ),
        "sm_90 quantize_rows": compiled(kernels.quantize_rows, 90, {"BLOCK": 4096, "IS_BF16": True, "IS_STATIC": False}, 8),
        "sm_90 add_up": compiled(kernels.add_up, 90, {"BLOCK": launch._BLOCK} | ENDING),
        "sm_90 multiply_grouped 16": grouped(90, 16),
        "sm_90 multiply_grouped 64": grouped(90, 64),
        "sm_90 find_blocks": compiled(grouped_kernels.find_blocks, 90, {"EXPERTS": 256, "BLOCK_M": 16}),
        "sm_89 multiply_grouped 16": grouped(89, 16),
        "sm_100 multiply_grouped 16": grouped(100, 16),
        "sm_89 multiply 16": product(89, 16),
        "sm_100 multiply 16": product(100, 16),
    }
    json.dump(facts, sys.stdout)


if __name__ == "__main__":
    main()
