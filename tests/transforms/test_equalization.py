# Shapes: M tokens, N out_features, K in_features.
"""Equalization: what a norm loses its linears gain, by the rule that is named, and the statistics follow."""

from dataclasses import fields

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from duotone.errors import DuotoneError
from duotone.settings import QuantizeConfig
from duotone.solver.statistics import Statistics, StatisticsAccumulator
from duotone.transforms.equalization import LARGEST, channel_scales, equalize, rescaled

CPU = torch.device("cpu")


def drawn(rows: int, columns: int, seed: int) -> Tensor:
    """Gaussian values whose columns differ by up to 2^6 in size."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator) * 2.0 ** torch.randint(-3, 4, (columns,), generator=generator)


def observed(x_MK: Tensor, x0_MK: Tensor | None = None, off_MD: Tensor | None = None) -> Statistics:
    accumulator = StatisticsAccumulator(x_MK.shape[1], CPU)
    accumulator.add(x_MK, x0_MK, off_MD)
    return accumulator.finish("layer")


@settings(max_examples=60, deadline=None, derandomize=True)
@given(columns=st.integers(1, 40), alpha=st.sampled_from([0.1, 0.25, 0.5, 0.75, 1.0]), seed=st.integers(0, 10**6))
def test_scales_follow_the_rule(columns: int, alpha: float, seed: int) -> None:
    """rms^alpha / absmax^(1 - alpha) over its geometric mean, against a loop over channels."""
    x_MK, weights = drawn(50, columns, seed), [drawn(rows, columns, seed + rows) for rows in (5, 9)]
    s_K = channel_scales(x_MK.square().mean(0), weights, alpha)
    raw = []
    for j in range(columns):
        largest = max(float(weight[n, j].abs()) for weight in weights for n in range(len(weight)))
        raw.append((float(x_MK[:, j].double().square().mean()) ** 0.5) ** alpha / largest ** (1 - alpha))
    mean = torch.tensor(raw).double().log2().mean()
    assert ((s_K.double().log2() - (torch.tensor(raw).double().log2() - mean)).abs() < 1e-4).all()
    assert abs(float(s_K.log2().mean())) < 1e-4


def test_alpha_decides_who_is_leveled() -> None:
    """1: inputs of channels come out equal, whatever the weights; towards 0: the weights' largest values do."""
    x_MK, w_NK = torch.tensor([[1.0, 4.0, 16.0], [-1.0, -4.0, 16.0]]), torch.tensor([[8.0, 2.0, 1.0], [-8.0, 2.0, -1.0]])
    power_K = x_MK.square().mean(0)
    whole = channel_scales(power_K, [w_NK], 1.0)
    assert torch.allclose(x_MK.abs() / whole, torch.full((2, 3), 4.0))
    weights = (w_NK * channel_scales(power_K, [w_NK], 1e-6)).abs().amax(0)
    assert float(weights.amax() / weights.amin()) < 1.0001


def test_silent_channels_and_extremes() -> None:
    """A channel that is zero on either side keeps its size, and does not count; the rest is bounded."""
    power_K, w_NK = torch.tensor([0.0, 1.0, 1e30, 1e-30, 4.0]), torch.tensor([[1.0, 0.0, 1.0, 1.0, 2.0]])
    s_K = channel_scales(power_K, [w_NK], 1.0)
    assert s_K[0] == s_K[1] == 1
    assert s_K[2] == LARGEST and s_K[3] == 1 / LARGEST
    assert torch.equal(channel_scales(torch.zeros(3), [torch.ones(2, 3)], 0.5), torch.ones(3))


@settings(max_examples=30, deadline=None, derandomize=True)
@given(columns=st.integers(1, 24), stream=st.booleans(), seed=st.integers(0, 10**6))
def test_statistics_are_those_of_the_divided_inputs(columns: int, stream: bool, seed: int) -> None:
    """With powers of two to the last bit: every field is what observing X / s (and X0 / s) gives."""
    x_MK, x0_MK, off_MD = drawn(30, columns, seed), drawn(30, columns, seed + 1), drawn(30, 7, seed + 2)
    s_K = 2.0 ** torch.randint(-4, 5, (columns,), generator=torch.Generator().manual_seed(seed))
    found = rescaled(observed(x_MK, None if stream else x0_MK, off_MD if stream else None), s_K)
    expected = observed(x_MK / s_K, None if stream else x0_MK / s_K, off_MD if stream else None)
    compared = 0
    for field in fields(Statistics):
        wanted, got = getattr(expected, field.name), getattr(found, field.name)
        assert (wanted is None) == (got is None)
        assert torch.equal(torch.as_tensor(wanted), torch.as_tensor(got)) if wanted is not None else True, field.name
        compared += wanted is not None
    assert compared == 5


def test_products_stay() -> None:
    """Norm times column is what it was for every reader; inputs are not changed.

    The norm is a BF16 value, so s is not quite what the rule asks for; a channel without a norm has none.
    """
    x_MK = drawn(40, 24, 0)
    x_MK[:, 5] = 0
    originals = {f"{name}.weight": drawn(rows, 24, rows).bfloat16() for name, rows in (("q", 8), ("k", 4), ("v", 6))}
    originals["norm.weight"] = (1 + 0.3 * drawn(24, 1, 3)[:, 0]).bfloat16()
    originals["norm.weight"][5] = 0
    before = {name: tensor.clone() for name, tensor in originals.items()}
    done = equalize(originals, "norm", ("q", "k", "v"), ("k", "v", "q"), observed(x_MK), 0.5)
    norm_K = done.tensors["norm.weight"]
    assert done.tensors.keys() == originals.keys() and torch.equal(norm_K, norm_K.bfloat16().float())
    for name in ("q.weight", "k.weight", "v.weight"):
        product, expected = norm_K * done.tensors[name], originals["norm.weight"].float() * originals[name].float()
        assert ((product - expected).abs() <= 2.0**-22 * expected.abs()).all()
    assert all(torch.equal(originals[name], before[name]) for name in before)
    wanted = channel_scales(x_MK.square().mean(0), [before[f"{name}.weight"] for name in "qkv"], 0.5)
    assert done.s_K[5] == wanted[5] == 1 and float(wanted.log2().std()) > 1
    assert 0 < float((done.s_K / wanted - 1).abs().max()) < 2.0**-8
    expected = observed(x_MK / done.s_K).hessian
    assert (done.statistics.hessian - expected).norm() < 1e-6 * expected.norm()


def test_a_reader_that_stays_bf16_loses_no_bit() -> None:
    """Then s are powers of two: its columns and the norm's weight stay BF16 values, for the sake of the other two."""
    originals = {f"{name}.weight": drawn(6, 24, seed).bfloat16() for seed, name in enumerate("qkv")}
    originals["norm.weight"] = (1 + 0.3 * drawn(24, 1, 3)[:, 0]).bfloat16()
    x_MK = drawn(40, 24, 0)
    done = equalize(originals, "norm", ("q", "k", "v"), ("q", "v"), observed(x_MK), 0.5)
    wanted = channel_scales(x_MK.square().mean(0), [originals["q.weight"], originals["v.weight"]], 0.5)
    assert torch.equal(torch.frexp(done.s_K).mantissa, torch.full_like(done.s_K, 0.5)) and len(done.s_K.unique()) > 3
    assert ((done.s_K / wanted).log2().abs() <= 0.5 + 1e-5).all()
    for name, s_K in (("k.weight", done.s_K), ("norm.weight", 1 / done.s_K)):
        assert torch.equal(done.tensors[name], originals[name].float() * s_K)
        assert torch.equal(done.tensors[name], done.tensors[name].bfloat16().float())


@pytest.mark.parametrize("alpha", [0.0, -0.5, 1.5, float("nan"), float("inf")])
def test_exponents_that_mean_nothing_are_refused(alpha: float) -> None:
    with pytest.raises(DuotoneError, match=r"--equalize: found .*, expected a number above 0 and at most 1"):
        QuantizeConfig(equalize=alpha)


@pytest.mark.parametrize("target", ["hopper", "gaudi"])
def test_a_method_that_observes_nothing_is_refused(target: str) -> None:
    with pytest.raises(DuotoneError, match="--equalize: found --method rtn, expected one that looks at its inputs: gptq, "):
        QuantizeConfig(equalize=0.5, method="rtn", target=target)
