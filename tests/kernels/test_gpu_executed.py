"""The tests of the Triton programs once more, on what the compiler makes of them for a GPU: its PTX, run on the CPU (`ptx.py`).

In a process of its own, since Triton either interprets or compiles.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs the package triton (the dev extra brings it on Linux)")

ROOT = Path(__file__).resolve().parents[2]
FILES = [f"tests/kernels/{name}.py" for name in (
    "test_gpu", "test_gpu_rows", "test_gpu_fp8", "test_gpu_grouped", "test_gpu_grouped_fp8", "test_gpu_solver",
)]  # fmt: skip
#: By default: products of each kind, weights, activations, a cache; experts that split K; a norm before them;
#: both of the solver's loops.
SOME = (
    "test_products or on_exact_sums or weights_bit_for_bit and 64 or cache_bit_for_bit and 48 or splits_of_k "
    "or trial_finds_nothing or linear_that_norms and 1100"
)


def passed(architecture: int, *chosen: str) -> int:
    """How many tests passed, of which none failed."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    environment |= {"TRITON_ARCH": str(architecture), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.kernels.on_ptx", "-p", "no:cacheprovider", *FILES, *chosen]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=1200, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    return int(done.stdout.rpartition(" passed")[0].split()[-1])


def test_hopper_runs_some_of_them() -> None:
    assert passed(90, "-k", SOME) >= 25


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [89, 90])
def test_ada_and_hopper_run_all_of_them(architecture: int) -> None:
    assert passed(architecture) >= 190
