"""The paths for instructions that this machine may lack, run through SIMDe, which says the same in others.

Needs SIMDe's headers (Debian: libsimde-dev) and g++; skipped by name without them. The path with VBMI uses what SIMDe does not
know: it is tested where a CPU has it (test_cpu.py).
"""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SIMDE = Path("/usr/include/simde/x86/avx512.h")
#: Behind the true header: SIMDe's names instead of the compiler's. One of them it gets wrong.
STAND_IN = """#include <immintrin.h>
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#undef _mm512_madd_epi16
#define _mm512_madd_epi16 simde_mm512_madd_epi16"""


@pytest.mark.skipif(not SIMDE.exists() or shutil.which("g++") is None, reason="SIMDe's headers or g++ are not installed")
def test_paths_give_the_bits_of_the_portable_one(tmp_path: Path) -> None:
    """AVX2, AVX-512 and AVX-512 with VNNI: any shape, group and number of tokens, with and without cut-off parts."""
    sources = [ROOT / f"csrc/linear_{name}.cpp" for name in ("portable", "avx2", "words")]
    sources.append(ROOT / "tests/kernels/emulated/paths.cpp")
    for name in ("linear_avx512", "linear_avx512vnni"):
        text = (ROOT / f"csrc/{name}.cpp").read_text(encoding="utf-8").replace("#include <immintrin.h>", STAND_IN)
        text = re.sub(r'GCC target\(".*"\)', 'GCC target("avx2,fma")', text)
        sources.append(tmp_path / f"{name}.cpp")
        sources[-1].write_text(text, encoding="utf-8")
    command = ["g++", "-std=c++20", "-O2", "-ffp-contract=off", f"-I{ROOT / 'csrc'}", *sources, "-o", tmp_path / "paths"]
    subprocess.run(command, check=True)
    done = subprocess.run([tmp_path / "paths"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert done.stdout == "300 problems, 0 differ\n"
