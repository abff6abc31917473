"""The cost model of docs/scale.md counts what floors.py counts for a checkpoint, and what a run's report says of itself."""

import json
import sys
from pathlib import Path

import pytest
import torch

from duotone.checkpoint.source import open_source
from duotone.floors import Ceiling, Work, measured_ceiling, phase_work
from duotone.plan import make_plan
from duotone.settings import QuantizeConfig

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))

import scale  # noqa: E402 - a tool, not a package
import scale_gpu  # noqa: E402

MODEL = ROOT / "assets" / "duotone-10m"


@pytest.mark.parametrize("ranks", [1, 4])
def test_the_cost_model_counts_what_a_plan_counts(ranks: int) -> None:
    """The bundled model by its shapes and by its plan: the same operations in every phase, shared by the ranks or not."""
    plan, tokens = make_plan(open_source(MODEL), QuantizeConfig()), 4096
    config = json.loads((MODEL / "config.json").read_text())
    keys = config["num_key_value_heads"] * config["head_dim"]
    sizes = (config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"], keys, config["vocab_size"])
    shape = scale.dense("bundled", *sizes)
    assert shape.weights == plan.weights
    machine = scale.Machine("of ones", 1.0, 1.0, 1.0, 1.0, 1.0)
    found, work = (
        scale.cost(shape, ranks, machine, tokens).seconds,
        phase_work(
            plan,
            tokens,
            0,
            torch.bfloat16,
            torch.device("cpu"),  # no attention
        ),
    )
    assert found["forward"] * ranks == pytest.approx(work["forward"].narrow)
    assert found["hessian"] * ranks == pytest.approx(work["hessian"].narrow)
    assert found["factorize"] == pytest.approx(work["factorize"].wide)
    assert found["solve"] * ranks == pytest.approx(work["solve"].wide + work["solve"].narrow)
    assert (found["network"] > 0) == (ranks > 1)


def test_experts_share_the_tokens_and_not_the_factorizations() -> None:
    """Eight experts of which a token takes one: the forward of one, eight times its factorization."""
    dense = scale.dense("dense", 256, 512, 3, 64, 1000)
    mixture = scale.mixture("mixture", 256, 512, 3, 64, 1000, experts=8, taken=1)
    one, many = (scale.cost(shape, 1, scale.H100) for shape in (dense, mixture))
    assert many.seconds["forward"] == pytest.approx(one.seconds["forward"])
    attention = scale.Shape("attention", dense.groups[:2], 3, 256, 1000)
    alone = scale.cost(attention, 1, scale.H100)
    for phase in ("factorize", "solve"):
        mlp = one.seconds[phase] - alone.seconds[phase]
        assert many.seconds[phase] - alone.seconds[phase] == pytest.approx(8 * mlp)


def test_a_ceiling_is_measured_and_turns_work_into_seconds(tmp_path: Path) -> None:
    """Speeds of this machine are positive, leave no file behind, and work takes as long as its parts one after the other."""
    ceiling = measured_ceiling(tmp_path, size=128)
    assert min(ceiling.narrow, ceiling.wide, ceiling.disk) > 0 and not list(tmp_path.iterdir())
    assert Ceiling(2.0, 4.0, 8.0).seconds(Work(narrow=2.0, wide=8.0, nbytes=4.0)) == 3.5


def test_one_gpu_multiplies_what_the_cost_model_counts() -> None:
    """By phase, the same arithmetic where it is whole matrices'; caches hold the state of narrow rows only."""
    shape, gpu = scale.dense("llama", 4096, 14336, 2, 1024, 1000), scale_gpu.H200
    found = scale_gpu.phases(shape, gpu, tokens=8192, window=0)
    meant = scale.cost(shape, 1, scale.Machine("same", gpu.narrow, gpu.wide, 1.0, 1.0, 1.0), tokens=8192).seconds
    assert found["forward"].arithmetic == pytest.approx(meant["forward"])
    assert found["moments"].arithmetic == pytest.approx(meant["hessian"])
    searched = sum(phase.arithmetic for name, phase in found.items() if name in {"local search", "scales", "column loops"})
    assert 0 < found["factors, products"].arithmetic - meant["factorize"] < meant["solve"] < searched + meant["solve"]
    assert all(phase.seconds > 0 for phase in found.values())
    wide = scale_gpu.phases(scale.dense("wide", 4096, 65536, 2, 1024, 1000), gpu)["local search"]
    assert wide.memory / wide.arithmetic > 2 * found["local search"].memory / found["local search"].arithmetic
