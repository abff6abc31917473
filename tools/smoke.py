"""An installed wheel, used: the compiled extension is in it, and a model is quantized, loaded and heard. Run by `make dist`.

Usage: python smoke.py MODEL, from a folder and an environment that know nothing of the source tree.
"""

import sys
import tempfile
from pathlib import Path

import duotone
from duotone.kernels import native
from duotone.runtime.generate import generate
from duotone.version import VERSION


def main(model: Path) -> None:
    """Quantize, run, and say so. Raises AssertionError where the wheel lacks something."""
    installed = Path(duotone.__file__)
    assert "site-packages" in installed.parts, f"{installed}: expected the installed package, not a source tree"
    assert native.unavailable() is None, native.unavailable()
    with tempfile.TemporaryDirectory() as scratch:
        report = duotone.quantize(model, Path(scratch) / "out", method="rtn")
        assert report.bits_per_weight < 5
        text = generate(Path(scratch) / "out", "To install the package, ", max_new_tokens=8).text
    sys.stdout.write(f"duotone {VERSION}, installed from its wheel, says: {text!r}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
