"""What each part is worth, in KL: the published recipe taken apart, and ours.

    python bench/ablation.py MODEL --calibration TEXT... --text TEXT... [--group-size 128]

Appends one row a variant to bench/records/ablation.jsonl. The rows that no option of `duotone quantize` reaches (other
activations, a part of the recipe left out) are made here by replacing that part, in this process only.
"""

import argparse
import contextlib
import dataclasses
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from duotone.bench import append_records, provenance
from duotone.calibrate.data import draw_windows
from duotone.checkpoint.hub import locate_model
from duotone.contract import quantize_activations, static_activation_scale
from duotone.evaluation import Evaluation, evaluate_windows
from duotone.formats import E4M3FN
from duotone.kernels import native
from duotone.models.skeleton import find_linears
from duotone.models.tokenizer import load_tokenizer
from duotone.pipeline import quantize
from duotone.plan import QuantizeConfig
from duotone.runtime.linear import QuantizedLinear
from duotone.runtime.load import load
from duotone.scheme import GAUDI, HOPPER
from duotone.solver import couple, drift, methods, scales, sweep

RECORDS = Path(__file__).resolve().parent / "records" / "ablation.jsonl"
CPU = torch.device("cpu")
#: A change that holds while a variant is quantized.
Change = Callable[[], contextlib.AbstractContextManager[Any]]


def dpq_without(**fields: Any) -> Change:
    """dpq with other facts: order, sequential, drift."""
    return lambda: mock.patch.dict(methods.METHODS, dpq=dataclasses.replace(methods.METHODS["dpq"], **fields))


def _no_stream(weight: Tensor, statistics: Any) -> Tensor:
    return drift.corrected_target(weight, dataclasses.replace(statistics, stream_drift=None))


@contextlib.contextmanager
def sign_symmetric() -> Iterator[None]:
    """Levels -7..7: code 0 is never chosen. In torch, whose rounding can be replaced; the compiled one knows 16 levels."""

    def code(w: Tensor, step: Tensor, zero_point: Tensor | None, scheme: Any) -> Tensor:
        return scales.nearest_code(w, step, zero_point, scheme).clamp(min=1)

    def entry(w_N: Tensor, column: Any, scheme: Any) -> tuple[Tensor, Tensor]:
        code_N, value_N = scales.nearest_entry(w_N, column, scheme)
        lowest_N = column.value(torch.ones_like(code_N), scheme)
        return code_N.clamp(min=1), torch.where(code_N < 1, lowest_N, value_N)

    with (
        mock.patch.object(native, "available", lambda: False),
        mock.patch.object(sweep, "nearest_code", code),
        mock.patch.object(sweep, "nearest_entry", entry),
    ):
        yield


#: name -> (options of `duotone quantize`, change)
VARIANTS: dict[str, tuple[dict[str, Any], Change]] = {
    "naive: GPTQ, then FP8": ({"method": "gptq", "order": "none"}, contextlib.nullcontext),
    "+ GAR": ({"method": "gptq", "order": "gar"}, contextlib.nullcontext),
    "+ act-order": ({"method": "gptq", "order": "act"}, contextlib.nullcontext),
    "+ FP8-aware": ({"method": "dpq-paper", "order": "none"}, contextlib.nullcontext),
    "+ both (dpq-paper)": ({"method": "dpq-paper", "order": "gar"}, contextlib.nullcontext),
    "dpq-paper, asymmetric": ({"method": "dpq-paper", "symmetric": False}, contextlib.nullcontext),
    "dpq": ({}, contextlib.nullcontext),
    "dpq, asymmetric": ({"symmetric": False}, contextlib.nullcontext),
    "dpq, levels -7..7": ({}, lambda: sign_symmetric()),
    "dpq, GAR": ({"order": "gar"}, contextlib.nullcontext),
    "dpq, natural order": ({"order": "none"}, contextlib.nullcontext),
    "dpq without stream drift": ({}, lambda: mock.patch.object(methods, "corrected_target", _no_stream)),
    "dpq without drift": ({}, dpq_without(drift=False)),
    "dpq without drift and sequence": ({}, dpq_without(drift=False, sequential=False)),
    "dpq without slid scales": ({}, lambda: mock.patch.object(methods, "SCALE_SLIDES", ())),
    "dpq with 1 descent": ({}, lambda: mock.patch.object(methods, "DESCENT_PASSES", 0)),
    "dpq with 12 descents": ({}, lambda: mock.patch.object(methods, "DESCENT_PASSES", 12)),
    "dpq, drift damping 0.01": ({}, lambda: mock.patch.object(drift, "DRIFT_DAMPING", 0.01)),
    "dpq, drift damping 0.2": ({}, lambda: mock.patch.object(drift, "DRIFT_DAMPING", 0.2)),
    "dpq, effort high": ({"effort": "high"}, contextlib.nullcontext),
    "dpq, effort high, 1 path": ({"effort": "high"}, lambda: mock.patch.object(couple, "BEAM_WIDTH", 1)),
    "dpq, effort high, 16 paths": ({"effort": "high"}, lambda: mock.patch.object(couple, "BEAM_WIDTH", 16)),
    "dpq, effort high, parts of 128 rows": ({"effort": "high"}, lambda: mock.patch.object(couple, "MAX_ROWS", 128)),
}
#: Only for the hopper target: the parts of our own recipe.
OURS = tuple(name for name in VARIANTS if name.startswith(("dpq ", "dpq,")))


class FloatLinear(nn.Module):
    """A linear with any weight and any activation rounding."""

    def __init__(self, weight: Tensor, bias: Tensor | None, activations: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.weight, self.bias, self.activations = weight, bias, activations

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N]."""
        return nn.functional.linear(self.activations(x), self.weight, self.bias)


def per_token(x: Tensor) -> Tensor:
    """FP8 with one scale a token, as on hopper."""
    x8, scale = quantize_activations(x, HOPPER)
    return x8 * scale


def untouched(x: Tensor) -> Tensor:
    """BF16 or float32 activations."""
    return x


class Static:
    """FP8 with one power of two a linear, taken from the largest input that calibration brings."""

    def __init__(self) -> None:
        self.absmax, self.measuring = torch.zeros(()), True

    def __call__(self, x: Tensor) -> Tensor:
        """Measures first, rounds afterwards."""
        if self.measuring:
            self.absmax = torch.maximum(self.absmax, x.abs().amax())
            return x
        x8, scale = quantize_activations(x, GAUDI, static_activation_scale(self.absmax, GAUDI))
        return x8 * scale


def fp8_channel(weight: Tensor) -> Tensor:
    """W8: E4M3 with one scale a row."""
    scale = weight.abs().amax(-1, keepdim=True).clamp(min=1e-12) / E4M3FN.max
    return E4M3FN.round(weight / scale) * scale


def replaced(model: nn.Module, weights: dict[str, Tensor], act: Callable[[], Callable[[Tensor], Tensor]]) -> list[Any]:
    """Put FloatLinears with these weights in a model; returns their activations."""
    placed = []
    for name, weight in weights.items():
        parent, _, leaf = name.rpartition(".")
        module: Any = model.get_submodule(name)
        placed.append(act())
        setattr(model.get_submodule(parent), leaf, FloatLinear(weight, module.bias, placed[-1]))
    return placed


class Ablation:
    """One model, its texts, and the rows about it."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.folder, self.arguments = locate_model(arguments.model), arguments
        self.reference = load(self.folder, torch.float32, "cpu")
        tokenizer = load_tokenizer(self.folder)
        self.windows = draw_windows(tokenizer, arguments.text, arguments.seq_len, arguments.eval_samples, seed=0)
        self.tokens = draw_windows(
            tokenizer, arguments.calibration, arguments.seq_len, arguments.samples, arguments.seed
        ).tokens

    def rows(self) -> Iterator[tuple[str, str, Evaluation]]:
        """(variant, target, figures)."""
        original = {name: module.weight.data for name, module in find_linears(self.reference).items() if name != "lm_head"}
        for name, weights in (
            ("W16A8: BF16 weights, FP8 activations", original),
            ("W8A8: FP8 weights and activations", {name: fp8_channel(weight) for name, weight in original.items()}),
        ):
            model = load(self.folder, torch.float32, "cpu")
            replaced(model, weights, lambda: per_token)
            yield name, "hopper", self.judge(model)
        for target in ("hopper", "gaudi"):
            for name, (options, change) in VARIANTS.items():
                if target == "hopper" or name not in OURS:
                    with change():
                        model = self.quantized(options | {"target": target})
                    yield name, target, self.judge(model)
                    if name in ("+ act-order", "+ both (dpq-paper)", "dpq"):
                        yield from self.other_activations(name, target, model)

    def other_activations(self, name: str, target: str, model: Any) -> Iterator[tuple[str, str, Evaluation]]:
        """The same weights with BF16 activations, and with the other target's: static where they are dynamic."""
        layers = {path: module for path, module in model.named_modules() if isinstance(module, QuantizedLinear)}
        weights = {path: _weight(module) for path, module in layers.items()}
        other = Static if target == "hopper" else (lambda: per_token)
        for label, act in (("BF16 activations", lambda: untouched), ("the other activations", other)):
            changed = load(self.folder, torch.float32, "cpu")
            static = [one for one in replaced(changed, weights, act) if isinstance(one, Static)]
            if static:
                with torch.no_grad():
                    for batch in self.tokens.split(16):
                        changed(input_ids=batch)
            for one in static:
                one.measuring = False
            yield f"{name}, {label}", target, self.judge(changed)

    def quantized(self, options: dict[str, Any]) -> Any:
        """A model quantized in this process, so that changes reach it."""
        given = self.arguments
        config = QuantizeConfig(
            calibration=tuple(given.calibration), group_size=given.group_size, samples=given.samples, seq_len=given.seq_len,
            seed=given.seed, device="cpu", **options,
        )  # fmt: skip
        with tempfile.TemporaryDirectory() as scratch:
            quantize(given.model, Path(scratch) / "out", config)
            return load(Path(scratch) / "out", torch.float32, "cpu")

    def judge(self, model: Any) -> Evaluation:
        """Figures against the original."""
        return evaluate_windows(model, self.windows, self.reference, CPU)


def _weight(module: Any) -> Tensor:
    packed = module._packed  # the reference backend keeps FP8 values and outer scale
    return packed.values.float() * packed.outer_scale[:, None]


def main() -> None:
    """Measure every variant of one model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--text", nargs="+", required=True)
    parser.add_argument("--calibration", nargs="+", required=True)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--eval-samples", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--records", type=Path, default=RECORDS)
    arguments = parser.parse_args()
    ablation = Ablation(arguments)
    for name, target, found in ablation.rows():
        row = provenance(arguments.seed) | {
            "model": Path(arguments.model).name,
            "variant": name,
            "target": target,
            "group_size": arguments.group_size,
            "calibration": {"text": [_name(text) for text in arguments.calibration], "tokens": ablation.tokens.numel()},
            "text": [_name(text) for text in arguments.text],
            "tokens": found.tokens,
            "kl": found.kl,
            "kl_stderr": found.kl_stderr,
            "perplexity": found.perplexity,
            "reference_perplexity": found.reference_perplexity,
            "top1_agreement": found.top1_agreement,
        }
        append_records(arguments.records, [row])
        print(f"{row['model']} {target} {name}: {found.kl:.5f}", flush=True)


def _name(text: str) -> str:
    return Path(text.partition("#")[0]).name


if __name__ == "__main__":
    main()
