"""Which linears 4 bits hurt, and the choice of precisions from that, against all choices tried one by one."""

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import duotone
from duotone.checkpoint.source import open_source
from duotone.cli_quantize import nbytes_of
from duotone.errors import DuotoneError
from duotone.evaluation import evaluate
from duotone.goals import PRECISIONS, Goal, choose, curve, gains
from duotone.plan import make_plan
from duotone.sensitivity import Sensitivity, Unit, measure_sensitivity, units_of
from duotone.settings import QuantizeConfig
from tests.test_cli import invoke

ModelMaker = Callable[..., Path]
QUICK: dict[str, Any] = {"samples": 8, "seq_len": 64, "device": "cpu", "group_size": 64}


def of_numbers(kl: float, numbers: list[tuple[int, float, float]]) -> Sensitivity:
    """Units of a size, and KL with each alone in 4 bits and in FP8."""
    units = tuple(
        Unit((f"l{i}",), {"w4a8": size, "w8a8": 2 * size, "bf16": 4 * size}, {"w4a8": four, "w8a8": eight}, 0.0)
        for i, (size, four, eight) in enumerate(numbers)
    )
    return Sensitivity("m", "dpq", "hopper", 128, kl, None, 1000, 2 * sum(n for n, *_ in numbers), units, ("t",), 4, 64)


@settings(max_examples=60, deadline=None)
@given(
    kl=st.floats(0.001, 1),
    numbers=st.lists(st.tuples(st.integers(10, 500), st.floats(0.01, 1.1), st.floats(0.01, 1.1)), min_size=1, max_size=6),
    share=st.floats(0.0, 1.0),
)
def test_no_other_choice_is_better(kl: float, numbers: list[tuple[int, float, float]], share: float) -> None:
    """Of all choices within the bytes none is nearer, and of all near enough none is smaller."""
    found = of_numbers(kl, [(size, kl * four, kl * eight) for size, four, eight in numbers])
    gain, sizes = gains(found), [[unit.nbytes[name] for name in PRECISIONS] for unit in found.units]
    every = list(itertools.product(range(3), repeat=len(numbers)))
    nbytes = [1000 + sum(row[i] for row, i in zip(sizes, picks, strict=True)) for picks in every]
    left = [kl - sum(float(row[i]) for row, i in zip(gain, picks, strict=True)) for picks in every]
    limit = int(min(nbytes) + share * (max(nbytes) - min(nbytes)))
    chosen = choose(found, Goal(max_bytes=limit))
    assert chosen.nbytes <= limit
    assert chosen.kl == pytest.approx(max(0.0, min(k for k, b in zip(left, nbytes, strict=True) if b <= limit)), abs=1e-6 * kl)
    target = max(share * kl, min(left) + 1e-6 * kl, 1e-9)
    near = choose(found, Goal(target_kl=target))
    assert near.kl <= target * (1 + 1e-6) + 1e-9
    assert near.nbytes <= min(b for k, b in zip(left, nbytes, strict=True) if k <= target)


def test_gains_end_where_they_must() -> None:
    """No less for more bits, none below nothing, and BF16 everywhere is the original at the most."""
    found = of_numbers(0.1, [(10, 0.08, 0.12), (10, 0.05, 0.01), (10, 0.02, 0.01)])
    gain = gains(found)
    assert (gain[:, 1:] >= gain[:, :-1]).all() and (gain >= 0).all()
    assert gain[:, -1].sum() == pytest.approx(0.1)
    points = curve(found)
    assert points[0].precisions == ("w4a8",) * 3 and len(set(points)) == len(points)
    assert all(a.kl >= b.kl and a.nbytes < b.nbytes for a, b in itertools.pairwise(points))


def test_goals_that_cannot_be() -> None:
    """Too few bytes, no target, none of both, numbers that are none."""
    found = of_numbers(0.1, [(10, 0.05, 0.02)])
    with pytest.raises(DuotoneError, match="at least 1010, with 4 bits everywhere"):
        choose(found, Goal(max_bytes=1009))
    for wrong in ({"max_bytes": None}, {"max_bytes": 1, "target_kl": 1.0}, {"target_kl": -1.0}):
        with pytest.raises(DuotoneError):
            Goal(**wrong)
    assert [nbytes_of(text) for text in ("1000", "1.5MB", "2 GiB", "3kb")] == [1000, 1_500_000, 2 * 2**30, 3000]
    for text in ("much", "5 parsecs", "", "nanGB"):
        with pytest.raises(DuotoneError, match="--max-bytes"):
            nbytes_of(text)


@pytest.fixture(scope="module")
def model(tiny_model: ModelMaker) -> Path:
    return tiny_model("qwen2", num_hidden_layers=2)


@pytest.fixture(scope="module")
def found(model: Path, text_file: Path) -> Sensitivity:
    """Of a tiny model with biases, rounded to nearest."""
    config = QuantizeConfig(method="rtn", calibration=(str(text_file),), **QUICK)
    return measure_sensitivity(model, config, seq_len=64, samples=6)


def test_measured_as_checkpoints_would_be(found: Sensitivity, model: Path, text_file: Path, tmp_path: Path) -> None:
    """Each unit's KL is that of a checkpoint made so by rules: with it alone in 4 bits or FP8, or with all but it."""
    assert [unit.layers[0].rpartition(".")[2] for unit in found.units[:4]] == ["q_proj", "o_proj", "gate_proj", "down_proj"]
    unit = found.units[2]
    others = tuple(f"{layer}=bf16" for other in found.units if other is not unit for layer in other.layers)
    for number, (rules, expected) in enumerate(
        [
            ((), found.kl),
            (others, unit.alone["w4a8"]),
            ((*others, *(f"{layer}=w8a8" for layer in unit.layers)), unit.alone["w8a8"]),
            (tuple(f"{layer}=bf16" for layer in unit.layers), unit.kept),
        ]
    ):
        out = tmp_path / str(number)
        duotone.quantize(model, out, method="rtn", rules=rules, **QUICK)
        measured = evaluate(out, [str(text_file)], reference=model, seq_len=64, samples=6, device="cpu")
        assert measured.kl == pytest.approx(expected, rel=2e-3)
    written = sum(spec.nbytes for spec in open_source(tmp_path / "0").tensors.values())
    assert written == found.fixed_bytes + sum(unit.nbytes["w4a8"] for unit in found.units)


def test_experts_of_a_bank_are_one_unit(tiny_model: ModelMaker) -> None:
    """As runtimes have them, whatever their number; a linear that a rule has settled is in none."""
    config = QuantizeConfig(method="rtn", rules=("re:.*o_proj=w8a8", "re:.*1.self_attn.q_proj=w4a8"), **QUICK)
    units = units_of(make_plan(open_source(tiny_model("mixtral", num_local_experts=4)), config))
    sizes = {layers[0].split("layers.0.")[1].split(".")[0]: len(layers) for layers in units if "layers.0." in layers[0]}
    assert sizes == {"self_attn": 3, "mlp": 12}
    settled = [len(layers) for layers in units if "layers.1.self_attn" in layers[0]]
    assert settled == [2]  # k and v: a precision that the user has chosen, 4 bits too, is not chosen again


def test_transforms_are_refused(model: Path) -> None:
    """Their linears do not fit the original."""
    with pytest.raises(DuotoneError, match="expected neither"):
        measure_sensitivity(model, QuantizeConfig(rotate=True, **QUICK))


def test_from_the_command_line(found: Sensitivity, model: Path, text_file: Path, tmp_path: Path) -> None:
    """Measure, draw, then quantize into a number of bytes and to a distance; what comes out is what was promised."""
    shared = ("--calibration", text_file, "--method", "rtn", "--group-size", "64", "--device", "cpu", "--seq-len", "64")
    told = invoke(
        "sensitivity", model, *shared, "--windows", "6", "--out", tmp_path / "f.json", "--plot", tmp_path / "f.svg", "--json"
    ).json()
    again = Sensitivity.from_json(json.loads((tmp_path / "f.json").read_text()), "f.json")
    assert again == replace(found, model=str(model)) and told["kl"] == found.kl
    assert (tmp_path / "f.svg").read_text().count("<circle") == len(told["curve"])
    goal = told["curve"][len(told["curve"]) // 2]
    more = (*shared, "--sensitivity", tmp_path / "f.json", "--windows", "6", "--samples", "8")
    reached = invoke("quantize", model, tmp_path / "small", *more, "--max-bytes", goal["nbytes"], "--json").json()
    written = sum(spec.nbytes for spec in open_source(tmp_path / "small").tensors.values())
    assert written == reached["choice"]["nbytes"] <= goal["nbytes"]
    assert reached["measured"]["kl"] < found.kl and len(set(reached["choice"]["precisions"])) > 1
    target = 0.5 * found.kl
    near = invoke("quantize", model, tmp_path / "near", *more, "--target-kl", target, "--json").json()
    measured = evaluate(tmp_path / "near", [str(text_file)], reference=model, seq_len=64, samples=6, device="cpu")
    assert measured.kl is not None and measured.kl == pytest.approx(near["measured"]["kl"]) and measured.kl <= target
    logits = duotone.load(tmp_path / "near", torch.float32, "cpu")(torch.arange(8)[None]).logits
    assert bool(torch.isfinite(logits).all())
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".duotone-")]
    for wrong, sentence in (
        (("--max-bytes", "10"), "expected at least"),
        (("--max-bytes", "9MB", "--target-kl", "1"), "expected either"),
        (("--max-bytes", "9MB", "--resume"), "found --resume"),
        (("--max-bytes", "9MB", "--group-size", "32"), "groups of 64"),
        (("--max-bytes", "9MB", "--ignore", "re:.*down_proj"), "holds other groups of linears"),
        ((), "--sensitivity: found neither --max-bytes nor --target-kl"),
    ):
        ended = invoke("quantize", model, tmp_path / "no", *more, *wrong)
        assert ended.code == 2 and sentence in " ".join(ended.err.split()), ended.err
        assert not (tmp_path / "no").exists()
