"""The optional compiled extension; everything else is in pyproject.toml.

Only torch's headers are needed, not torch itself: `pip install --no-build-isolation .` sees those of the environment. Where
they or a compiler are missing, the package installs without the extension, and torch does the same work, slower.
"""

import importlib.util
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

#: No fused multiply-add and no reassociation: every instruction set gives the same codes (csrc/solver_kernels.h).
FLAGS = ["-std=c++20", "-O3", "-g0", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"]


def extensions() -> list[Extension]:
    """duotone._C, or nothing where it cannot be built."""
    torch = importlib.util.find_spec("torch")
    if torch is None or torch.origin is None:
        return without("torch is not in the building environment (pip install --no-build-isolation takes the installed one)")
    folder = Path(torch.origin).parent
    if not (folder / "include/torch/csrc/stable/library.h").exists():
        return without("the installed torch has no stable C++ interface, expected 2.10 or newer")
    if sys.platform == "win32":
        return without("not supported on Windows")
    extension = Extension(
        "duotone._C",
        sorted(str(path) for path in Path("csrc").glob("*.cpp")),
        depends=sorted(str(path) for path in Path("csrc").glob("*.h")),
        # torch's headers are not ours to mend: -isystem keeps their warnings to themselves.
        extra_compile_args=[*FLAGS, "-isystem", str(folder / "include")],
        library_dirs=[str(folder / "lib")],
        libraries=["torch_cpu"],
        py_limited_api=True,
        optional=True,
    )
    return [extension]


def without(reason: str) -> list[Extension]:
    """Say in one line why there is no extension."""
    print(f"duotone: installing without the compiled extension: {reason}", file=sys.stderr)
    return []


class BuildExtension(build_ext):
    """Leaves no older library behind when a build fails: its ops may have other arguments than the Python code expects."""

    def build_extension(self, ext: Extension) -> None:
        for older in Path("src/duotone").glob("_C.*.so"):
            older.unlink()
        try:
            super().build_extension(ext)
        except Exception:  # setuptools warns and goes on, the extension being optional
            without("the compiler failed")
            raise


# The library has no Python symbols, so one wheel serves every Python from 3.11 on.
setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildExtension},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
