"""What each part of DPQ is worth: output error of every linear of a model under variations of the recipe, unquantized prefix.

Usage: python bench/layer_error.py MODEL --calibration TEXT [--samples N]. Appends to bench/records/layer_error.jsonl.
"""

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import torch

from duotone.bench import append_records, provenance
from duotone.calibrate.data import draw_windows, token_batches
from duotone.calibrate.stream import start_stream
from duotone.checkpoint.source import open_source
from duotone.models.skeleton import find_linears
from duotone.models.tokenizer import load_tokenizer
from duotone.phases import Phases
from duotone.plan import make_plan
from duotone.runtime.load import load
from duotone.scheme import GAUDI, HOPPER, Scheme
from duotone.settings import QuantizeConfig
from duotone.solver import methods
from duotone.solver.methods import Problem, SolverOptions, shared_factor
from duotone.solver.scales import fit_scales
from duotone.solver.search import search_scales
from duotone.solver.statistics import Statistics

RECORDS = Path(__file__).resolve().parent / "records" / "layer_error.jsonl"


def variant(search: bool, nearest: bool) -> Callable[[Problem], float | None]:
    """A recipe between dpq-paper and dpq, without local search: scales fitted or searched, round-then-round or nearest."""

    def run(problem: Problem) -> float | None:
        scales = (search_scales if search else fit_scales)(problem.weight, problem.scheme)
        return methods.finish("variant", problem, methods.compensate(problem, scales, nearest), scales)[1].output_error

    return run


RECIPES: dict[str, Callable[[Problem], float | None]] = {
    "gptq, then FP8": lambda problem: methods.gptq(problem)[1].output_error,
    "dpq-paper": lambda problem: methods.dpq_paper(problem)[1].output_error,
    "scales fitted on the weights": variant(search=False, nearest=False),
    "and the nearest FP8 value": variant(search=False, nearest=True),
    "and searched scales": variant(search=True, nearest=True),
    "and refitted scales, local search (dpq)": lambda problem: methods.dpq(problem)[1].output_error,
}


def layer_statistics(folder: Path, texts: list[str], samples: int, seq_len: int) -> list[tuple[str, torch.Tensor, Statistics]]:
    """Name, weight and input statistics of every linear that `quantize` would take."""
    plan = make_plan(open_source(folder), QuantizeConfig())
    model = load(folder, torch.float32, "cpu")
    windows = draw_windows(load_tokenizer(folder), texts, seq_len, samples, seed=0)
    linears = find_linears(model)
    stream = start_stream(
        model, [model.get_submodule(block.path) for block in plan.blocks], token_batches(windows.tokens), Phases()
    )
    found = []
    for index, block in enumerate(plan.blocks):
        module = model.get_submodule(block.path)
        with stream.enter(index, module, block.stops, {}) as observer:
            for group in block.shared_inputs:
                statistics = observer.observe(group[0])
                assert statistics is not None
                found += [(name, linears[name].weight.data, statistics) for name in group]
            stream.leave(observer)
    return found


def main() -> None:
    """Measure every recipe, order and target, and append one row each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", action="append", required=True)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=256)
    arguments = parser.parse_args()
    layers = layer_statistics(arguments.model, arguments.calibration, arguments.samples, arguments.seq_len)
    for target in (HOPPER, GAUDI):
        for order in ("gar", "act"):
            for recipe, run in RECIPES.items():
                scheme, options = Scheme(target), SolverOptions(order)
                problems = (Problem(n, w, s, shared_factor(s, scheme, options, n), scheme, options) for n, w, s in layers)
                errors = [run(problem) or 0.0 for problem in problems]
                row = provenance(0) | {
                    "model": arguments.model.name,
                    "calibration": {"text": [Path(text).name for text in arguments.calibration], "windows": arguments.samples},
                    "target": target.name,
                    "order": order,
                    "recipe": recipe,
                    "linears": len(errors),
                    "geometric_mean_output_error": math.exp(sum(math.log(error) for error in errors) / len(errors)),
                    "mean_output_error": sum(errors) / len(errors),
                }
                append_records(RECORDS, [row])
                print(f"{target.name:7} {order:4} {recipe:32} {row['geometric_mean_output_error']:.5f}")


if __name__ == "__main__":
    main()
