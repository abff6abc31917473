"""Measurements that append rows to bench/records/*.jsonl (columns: ARCHITECTURE.md section 4)."""

import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from duotone.calibrate.data import TokenWindows, draw_windows
from duotone.checkpoint.hub import locate_model
from duotone.contract import quantize_activations
from duotone.device import processor_name
from duotone.errors import DuotoneError
from duotone.evaluation import Evaluation, evaluate_windows
from duotone.models.tokenizer import load_tokenizer
from duotone.runtime.linear import QuantizedLinear
from duotone.runtime.load import load
from duotone.scheme import TARGETS
from duotone.version import VERSION


@dataclass(frozen=True)
class AccuracyBench:
    """One accuracy comparison: a model, the text it is calibrated on, the text it is judged on."""

    model: str
    text: tuple[str, ...]
    calibration: tuple[str, ...]
    methods: tuple[str, ...] = ("rtn", "gptq", "dpq-paper", "dpq")
    targets: tuple[str, ...] = ("hopper", "gaudi")
    group_size: int = 128
    samples: int = 128
    seq_len: int = 256
    eval_samples: int | None = 128
    seed: int = 0
    effort: str = "default"


def accuracy_rows(bench: AccuracyBench) -> Iterator[dict[str, Any]]:
    """Quantize with every method and target, each in a process of its own (its peak memory is its own), and measure."""
    folder = locate_model(bench.model)
    reference = load(folder, torch.float32, "cpu")
    windows = draw_windows(load_tokenizer(folder), bench.text, bench.seq_len, bench.eval_samples, seed=0)
    for target in bench.targets:
        floor: float | None = None
        for method in bench.methods:
            with tempfile.TemporaryDirectory() as scratch:
                out = Path(scratch) / "out"
                report = quantize_in_a_process(bench, method, target, out)
                model = load(out, torch.float32, "cpu")
            if floor is None or not TARGETS[target].dynamic_activations:  # static scales differ from method to method
                floor = activation_floor(folder, model, windows, reference)
            yield _accuracy_row(bench, report, evaluate_windows(model, windows, reference, torch.device("cpu")), floor)


def provenance(seed: int) -> dict[str, Any]:
    """The columns every record has: where, when and with what it was measured."""
    return {
        "commit": _commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "machine": f"{platform.machine()} {processor_name()}",
        "threads": torch.get_num_threads(),
        "versions": {"duotone": VERSION, "python": platform.python_version()}
        | {name: version(name) for name in ("torch", "transformers")},
        "seed": seed,
    }


def append_records(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Append rows to a records file, one JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def quantize_in_a_process(bench: AccuracyBench, method: str, target: str, out: Path) -> dict[str, Any]:
    """`duotone quantize` as a user runs it; its report. Raises DuotoneError with what the command said."""
    command = [sys.executable, "-m", "duotone", "quantize", bench.model, str(out), "--json", "--method", method]
    command += ["--target", target, "--group-size", str(bench.group_size), "--samples", str(bench.samples)]
    command += ["--seq-len", str(bench.seq_len), "--seed", str(bench.seed), "--device", "cpu", "--effort", bench.effort]
    for text in bench.calibration:
        command += ["--calibration", text]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise DuotoneError(f"{method} on {target}: {done.stderr.strip().removeprefix('duotone: ') or 'ended without a word'}")
    return json.loads(done.stdout)


def quantize_time_row(bench: AccuracyBench, number: int) -> dict[str, Any]:
    """One run of `dpq`, timed: seconds by phase beside the least that this machine would take for each."""
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as scratch:
        report = quantize_in_a_process(bench, "dpq", "hopper", Path(scratch) / "out")
    return provenance(bench.seed) | {
        "model": Path(bench.model).name,
        "tool": "duotone",
        "method": "dpq",
        "group_size": bench.group_size,
        "round": number,
        "tokens": report["calibration"]["tokens"],
        "load_before": load,
        "seconds": sum(report["seconds"].values()),
        "phases": report["seconds"],
        "floors": report["floor_seconds"],
        "dtype": report["calibration"]["dtype"],
        "peak_bytes": report["peak_bytes"],
        "refused": None,
    }


def activation_floor(folder: Path, model: PreTrainedModel, windows: TokenWindows, reference: PreTrainedModel) -> float:
    """KL of the original weights under the FP8 activations of the quantized model: what no weight format can get below."""
    original = load(folder, torch.float32, "cpu")
    with _activations_only(original, model):
        return evaluate_windows(original, windows, reference, torch.device("cpu")).kl or 0.0


def _accuracy_row(bench: AccuracyBench, report: dict[str, Any], evaluation: Evaluation, floor: float) -> dict[str, Any]:
    result = asdict(evaluation)
    config = report["config"]
    calibration = report["calibration"]
    return provenance(bench.seed) | {
        "model": Path(bench.model).name,
        "text": [_text_name(text) for text in bench.text],
        "tokens": result["tokens"],
        "tool": "duotone",
        "method": config["method"],
        "effort": config["effort"],
        "target": config["target"],
        "scheme": "w4a8" if config["symmetric"] else "w4a8 asymmetric",
        "group_size": config["group_size"],
        "calibration": calibration and {"text": calibration["text"], "tokens": calibration["tokens"], "seed": bench.seed},
        "arithmetic": "contract",
        "bits_per_weight": report["bits_per_weight"],
        "quantized_macs_share": report["quantized_macs_share"],
        "kl": result["kl"],
        "kl_stderr": result["kl_stderr"],
        "kl_activation_floor": floor,
        "perplexity": result["perplexity"],
        "reference_perplexity": result["reference_perplexity"],
        "bits_per_byte": result["bits_per_byte"],
        "top1_agreement": result["top1_agreement"],
        "tasks": {},
        "quantize_seconds": sum(report["seconds"].values()),
        "peak_bytes": report["peak_bytes"],
        "refused": None,
    }


@contextmanager
def _activations_only(original: nn.Module, quantized: nn.Module) -> Iterator[None]:
    """Give the original's linears the FP8 activations of the quantized model's."""

    def hook(layer: QuantizedLinear) -> Any:
        target, static = layer.scheme.target, layer.input_scale

        def requantize(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            x8, scale = quantize_activations(inputs[0], target, static)
            return ((x8 * scale).to(inputs[0].dtype), *inputs[1:])

        return requantize

    handles = [
        original.get_submodule(name).register_forward_pre_hook(hook(module))
        for name, module in quantized.named_modules()
        if isinstance(module, QuantizedLinear)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _text_name(source: str) -> str:
    return Path(source.partition("#")[0]).name


def _commit() -> str:
    """The commit of the source tree this package runs from, `+` when it has uncommitted changes; `installed` outside one."""
    tree = Path(__file__).resolve().parents[2]
    if not (tree / ".git").exists():
        return "installed"
    head = subprocess.run(
        ["git", "-C", str(tree), "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=False
    )
    changed = subprocess.run(
        ["git", "-C", str(tree), "status", "--porcelain", "--untracked-files=no", "src"],
        capture_output=True,
        text=True,
        check=False,
    )
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")
