"""What each part is worth, in KL: the published recipe taken apart, and ours.

    python bench/ablation.py MODEL --calibration TEXT... --text TEXT... [--group-size 128] [--paper]
    python bench/ablation.py ENCODER --calibration TEXT... --piqa FOLDER --seq-len 16 --samples 2048

Appends one row a variant to bench/records/ablation.jsonl. The rows that no option of `duotone quantize` reaches (other
activations, a part of the recipe left out) are made here by replacing that part, in this process only.
"""

import argparse
import contextlib
import dataclasses
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from duotone.bench import append_records, provenance
from duotone.calibrate.data import draw_windows
from duotone.checkpoint.hub import locate_model
from duotone.checkpoint.reader import WeightReader, packed_layers
from duotone.checkpoint.source import open_source
from duotone.contract import quantize_activations, static_activation_scale
from duotone.evaluation import evaluate_windows
from duotone.formats import E4M3FN
from duotone.kernels import native
from duotone.models.skeleton import find_linears
from duotone.models.tokenizer import load_tokenizer
from duotone.pipeline import quantize
from duotone.questions import load_piqa_goals
from duotone.qweight import QuantizedWeight, expand_groups
from duotone.runtime.linear import QuantizedLinear
from duotone.runtime.load import load
from duotone.scheme import GAUDI, HOPPER
from duotone.settings import QuantizeConfig
from duotone.solver import couple, drift, local_search, methods, scales, statistics, sweep
from duotone.tasks import embedding_fidelity

RECORDS = Path(__file__).resolve().parent / "records" / "ablation.jsonl"
CPU = torch.device("cpu")
#: A change that holds while a variant is quantized.
Change = Callable[[], contextlib.AbstractContextManager[Any]]


def dpq_without(**fields: Any) -> Change:
    """dpq with other facts: order, sequential, drift."""
    return lambda: mock.patch.dict(methods.METHODS, dpq=dataclasses.replace(methods.METHODS["dpq"], **fields))


def _no_stream(weight: Tensor, statistics: Any) -> Tensor:
    return drift.corrected_target(weight, dataclasses.replace(statistics, stream_target=None))


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
    "dpq, GAR, refreshed scales": ({"order": "gar", "refresh_scales": True}, contextlib.nullcontext),
    "dpq, min-pivot order": ({"order": "min-pivot"}, contextlib.nullcontext),
    "dpq, natural order": ({"order": "none"}, contextlib.nullcontext),
    "dpq without stream drift": ({}, lambda: mock.patch.object(methods, "corrected_target", _no_stream)),
    "dpq without drift": ({}, dpq_without(drift=False)),
    "dpq without drift and sequence": ({}, dpq_without(drift=False, sequential=False)),
    "dpq without refitted scales": ({}, lambda: mock.patch.object(methods, "REFITS", 0)),
    "dpq without local search": ({}, lambda: mock.patch.object(methods, "local_search", lambda *given: given[-1])),
    "dpq, 4 times the local search": ({}, lambda: mock.patch.object(local_search, "LEAST_VISITS", 2**20)),
    "dpq, calibrated in BF16": ({"dtype": "bfloat16"}, contextlib.nullcontext),
    "dpq, drift damping 0.01": ({}, lambda: mock.patch.object(statistics, "DRIFT_DAMPING", 0.01)),
    "dpq, drift damping 0.2": ({}, lambda: mock.patch.object(statistics, "DRIFT_DAMPING", 0.2)),
    "dpq, rotated": ({"rotate": True}, contextlib.nullcontext),
    "dpq, equalized 0.5": ({"equalize": 0.5}, contextlib.nullcontext),
    "dpq, effort high": ({"effort": "high"}, contextlib.nullcontext),
    "dpq, effort high, 1 path": ({"effort": "high"}, lambda: mock.patch.object(couple, "BEAM_WIDTH", 1)),
    "dpq, effort high, 16 paths": ({"effort": "high"}, lambda: mock.patch.object(couple, "BEAM_WIDTH", 16)),
    "dpq, effort high, parts of 128 rows": ({"effort": "high"}, lambda: mock.patch.object(couple, "MAX_ROWS", 128)),
}
#: Only for the hopper target: the parts of our own recipe.
OURS = tuple(name for name in VARIANTS if name.startswith(("dpq ", "dpq,")) and name != "dpq, asymmetric")


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


def replaced(
    model: nn.Module, weights: dict[str, Tensor], act: Callable[[], Callable[[Tensor], Tensor]], biases: nn.Module | None = None
) -> list[Any]:
    """Put FloatLinears with these weights in a model, with its own biases or another model's; returns their activations."""
    placed = []
    for name, weight in weights.items():
        parent, _, leaf = name.rpartition(".")
        module: Any = (biases or model).get_submodule(name)
        placed.append(act())
        setattr(model.get_submodule(parent), leaf, FloatLinear(weight, module.bias, placed[-1]))
    return placed


class Ablation:
    """One model, its texts, and the rows about it."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.folder, self.arguments = locate_model(arguments.model), arguments
        self.reference = load(self.folder, torch.float32, "cpu")
        self.tokenizer = load_tokenizer(self.folder)
        self.sentences = load_piqa_goals(arguments.piqa)[: arguments.items] if arguments.piqa else []
        self.windows = None
        if not self.sentences:
            self.windows = draw_windows(self.tokenizer, arguments.text, arguments.seq_len, arguments.eval_samples, seed=0)
        self.tokens = draw_windows(
            self.tokenizer, arguments.calibration, arguments.seq_len, arguments.samples, arguments.seed
        ).tokens
        self.nominal: dict[str, Tensor] = {}

    def rows(self) -> Iterator[tuple[str, str, dict[str, Any]]]:
        """(variant, target, figures)."""
        original = {name: module.weight.data for name, module in find_linears(self.reference).items() if name != "lm_head"}
        ceilings = (
            ("W16A8: BF16 weights, FP8 activations", original),
            ("W8A8: FP8 weights and activations", {name: fp8_channel(weight) for name, weight in original.items()}),
        )
        for name, weights in () if self.arguments.only else ceilings:
            model = load(self.folder, torch.float32, "cpu")
            replaced(model, weights, lambda: per_token)
            yield name, "hopper", self.judge(model)
        for target in ("hopper", "gaudi"):
            for name, (options, change) in VARIANTS.items():
                if self.arguments.only and name not in self.arguments.only:
                    continue
                if name not in OURS or (target == "hopper" and not self.arguments.paper):
                    with change():
                        model = self.quantized(options | {"target": target})
                    yield name, target, self.judge(model)
                    if name in ("+ act-order", "+ both (dpq-paper)", "dpq"):
                        yield from self.other_activations(name, target, model)

    def other_activations(self, name: str, target: str, model: Any) -> Iterator[tuple[str, str, dict[str, Any]]]:
        """The same weights with BF16 activations, and with the other target's: static where they are dynamic.

        Of GPTQ also what it aims at: INT4 times its scale, never rounded to FP8.
        """
        if name == "+ act-order" and target == "hopper":
            whole = load(self.folder, torch.float32, "cpu")
            replaced(whole, self.nominal, lambda: untouched)
            yield "W4A16: GPTQ with act-order, not rounded to FP8", target, self.judge(whole)
        layers = {path: module for path, module in model.named_modules() if isinstance(module, QuantizedLinear)}
        weights = {path: module.dequantize() for path, module in layers.items()}
        other = Static if target == "hopper" else (lambda: per_token)
        for label, act in (("BF16 activations", lambda: untouched), ("the other activations", other)):
            changed = load(self.folder, torch.float32, "cpu")
            # The method may have moved biases to take up what its weights err on average.
            static = [one for one in replaced(changed, weights, act, model) if isinstance(one, Static)]
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
            seed=given.seed, device="cpu", **{"dtype": "float32", **options},
        )  # fmt: skip
        with tempfile.TemporaryDirectory() as scratch:
            quantize(given.model, Path(scratch) / "out", config)
            source = open_source(Path(scratch) / "out")
            reader = WeightReader(source)
            self.nominal = {layer: _single_level(reader.read(layer)) for layer in packed_layers(source)}
            return load(Path(scratch) / "out", torch.float32, "cpu")

    def judge(self, model: Any) -> dict[str, Any]:
        """Figures against the original: the KL, or an encoder's embedding error."""
        if self.windows is None:
            found = embedding_fidelity(model, self.reference, self.tokenizer, self.sentences, CPU)
            return {"kl": None, "embedding_error": found.relative_error, "stderr": found.relative_error_stderr}
        figures = asdict(evaluate_windows(model, self.windows, self.reference, CPU))
        return {key: figures[key] for key in FIGURES}


#: Of an evaluation, what a row holds.
FIGURES = ("tokens", "kl", "kl_stderr", "perplexity", "reference_perplexity", "top1_agreement")


def _single_level(weight: QuantizedWeight) -> Tensor:
    """INT4 times the one scale of its group, in float32."""
    scheme, (_, columns) = weight.scheme, weight.shape
    level_NK = torch.tensor(scheme.levels)[weight.codes.long()]
    if weight.zero_point is not None:
        level_NK = level_NK - expand_groups(weight.zero_point, scheme.group_size, columns)
    return level_NK * expand_groups(weight.group_scale * weight.outer_scale[:, None], scheme.group_size, columns)


def main() -> None:
    """Measure every variant of one model."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--text", nargs="+", default=[])
    parser.add_argument("--piqa", help="folder of PIQA: its goals are an encoder's sentences")
    parser.add_argument("--items", type=int, default=500)
    parser.add_argument("--paper", action="store_true", help="only the published recipe's parts and dpq")
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), help="only these variants, and what is made of them")
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
            "text": [_name(text) for text in arguments.text] or ["piqa goals"],
        } | found  # fmt: skip
        append_records(arguments.records, [row])
        print(f"{row['model']} {target} {name}: {found['kl'] or found['embedding_error']:.5f}", flush=True)


def _name(text: str) -> str:
    return Path(text.partition("#")[0]).name


if __name__ == "__main__":
    main()
