# Shapes: N out_features, K in_features.
"""Does each tool read what `duotone export` writes in its layout, and to the weights that `export` says?

    python bench/peers/readers.py CHECKPOINT [CHECKPOINT ...] [--reader gptqmodel inc modelopt llamacpp] [--llamacpp PYTHON]

Exports into a scratch folder, runs read_layout.py in each tool's environment (setup.sh; PYTHON has llama-cpp-python and gguf),
compares, and appends a row for each checkpoint and reader to bench/records/readers.jsonl: how many linears are equal, bit for
bit, to `Layout.values`, or how far logits are from those of the same weights in transformers.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from read_layout import TOKENS

from duotone.bench import append_records, provenance
from duotone.checkpoint.layouts import LAYOUTS
from duotone.checkpoint.reader import WeightReader, packed_layers
from duotone.checkpoint.source import open_source
from duotone.converting import Calibration, Conversion, export_checkpoint
from duotone.formats import E4M3FN
from duotone.scheme import GAUDI

HERE = Path(__file__).resolve().parent
RECORDS = HERE.parent / "records" / "readers.jsonl"
#: Where static activation scales come from when a checkpoint has none: no weight depends on it.
TEXT = HERE.parents[1] / "assets" / "duotone-10m" / "calibration.txt"
#: reader -> the layout that it reads
LAYOUT_OF = {"gptqmodel": "gptq", "inc": "gaudi-inc", "modelopt": "modelopt", "llamacpp": "gguf"}


def main() -> None:
    """A row for each checkpoint and reader."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("checkpoint", type=Path, nargs="+")
    parser.add_argument("--reader", nargs="+", choices=LAYOUT_OF, default=list(LAYOUT_OF))
    parser.add_argument("--llamacpp", type=Path, help="a Python with llama-cpp-python and gguf")
    arguments = parser.parse_args()
    for checkpoint in arguments.checkpoint:
        for reader in arguments.reader:
            python = arguments.llamacpp if reader == "llamacpp" else HERE / ".venvs" / reader / "bin" / "python"
            if python is None:
                sys.exit("readers.py: the reader llamacpp needs --llamacpp PYTHON")
            row = provenance(0) | judged(checkpoint, reader, python)
            append_records(RECORDS, [row])
            print({name: row[name] for name in ("model", "layout", "reader", "version", "layers", "equal", "refused")})


def judged(checkpoint: Path, reader: str, python: Path) -> dict[str, Any]:
    """What a reader made of a checkpoint in its layout."""
    layout, source = LAYOUT_OF[reader], open_source(checkpoint)
    target = WeightReader(source).scheme.target
    calibration = Calibration((str(TEXT),), 8, 128) if target.dynamic_activations else None
    found: dict[str, Any] = {"model": checkpoint.name, "target": target.name, "layout": layout, "reader": reader}
    with tempfile.TemporaryDirectory() as scratch:
        folder, out = Path(scratch) / "exported", Path(scratch) / "read.npz"
        report = export_checkpoint(checkpoint, folder, layout, allow_lossy=True, calibration=calibration)
        worst = min(report.layers, key=lambda one: -one.weight_error)
        found |= {"exactness": worst.exactness, "weight_error": worst.weight_error**0.5, "layers": len(report.layers)}
        command = [python, HERE / "read_layout.py", reader, folder, out]
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=scratch)
        if not out.exists():
            reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
            return found | {"version": None, "equal": 0, "distance": None, "refused": reason}
        read = dict(np.load(out))
        found |= {"version": str(read.pop("version")), "refused": None}
        if reader == "llamacpp":
            return found | {"equal": None, "distance": _logits_apart(checkpoint, Path(scratch) / "w4a16", read["logits"])}
        return found | _weights_apart(folder, report, source, reader, read)


def _weights_apart(folder: Path, report: Conversion, source: Any, reader: str, read: dict[str, Any]) -> dict[str, Any]:
    """How many linears are what `export` says that the layout's runtimes multiply, and the largest relative distance."""
    scheme, exported, equal, distance = WeightReader(source).scheme, open_source(folder), 0, 0.0
    kind = LAYOUTS[report.layout]
    for one in report.layers:
        names = kind.specs(one.layer, (8, 128), scheme)
        expected = kind.values(one.layer, exported.load(names), scheme)
        theirs = _as_it_runs(reader, read, one.layer)
        if reader == "gptqmodel":  # it multiplies in the model's dtype
            expected = expected.to(torch.bfloat16).float()
        equal += bool(torch.equal(theirs, expected))
        distance = max(distance, float((theirs - expected).norm() / expected.norm()))
    assert len(report.layers) == len(packed_layers(source))
    return {"equal": equal, "distance": distance}


def _as_it_runs(reader: str, read: dict[str, Any], layer: str) -> torch.Tensor:
    """What the reader gave, with the FP8 cast that its accelerator makes in between."""
    weight = torch.from_numpy(read[layer])
    if reader == "gptqmodel":
        return weight
    outer = torch.from_numpy(read[f"{layer}.outer"])
    if reader == "inc":
        return GAUDI.fp8.round(weight) * outer
    return E4M3FN.round(weight / outer) * outer


def _logits_apart(checkpoint: Path, scratch: Path, logits: Any) -> float:
    """Relative distance from transformers with the same 4-bit weights and no rounding of activations."""
    from transformers import AutoModelForCausalLM

    export_checkpoint(checkpoint, scratch, "w4a16")
    model = AutoModelForCausalLM.from_pretrained(scratch, dtype=torch.float32)
    with torch.no_grad():
        reference = model(torch.tensor([TOKENS])).logits[0].numpy()
    return float(np.linalg.norm(logits - reference) / np.linalg.norm(reference))


if __name__ == "__main__":
    main()
