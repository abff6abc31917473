# Shapes: N out_features, K in_features, G groups along K.
"""The vLLM plugin without vLLM: what each process makes of a fused linear, and that nothing is imported before vLLM asks.

With vLLM's own classes it is run by bench/peers/vllm_plugin.py.
"""

import subprocess
import sys
import tomllib
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from duotone.checkpoint.compressed_tensors import SideScales, to_tensors
from duotone.errors import DuotoneError
from duotone.kernels import cpu, dispatch
from duotone.qweight import AnyWeight, Fp8Weight, QuantizedWeight, dequantize
from duotone.scheme import GAUDI, HOPPER, Fp8Scheme, Scheme, Target
from duotone.vllm_plugin.shares import Share, is_left_to_vllm, weights_of
from tests.conftest import ROOT
from tests.kernels.test_reference import make_weight

SCHEMES = st.builds(Scheme, st.sampled_from([HOPPER, GAUDI]), st.sampled_from([32, 64, 128]), st.booleans())


def side(weight: AnyWeight) -> SideScales | None:
    """What duotone.json has of a weight."""
    return None if weight.input_scale is None else SideScales(float(weight.outer_scale), float(weight.input_scale))


def dealt(share: Share, weights: Sequence[AnyWeight], rank: int, ranks: int) -> dict[str, Tensor]:
    """The file's tensors as vLLM's parameters take them: rows of each linear, or columns of the codes, of this rank."""
    stored: dict[str, Tensor] = {}
    for name, (rows, width) in share.shapes.items():
        tensors = [to_tensors("x", weight)[f"x.{name}"] for weight in weights]
        if share.is_cut:
            (whole,) = tensors
            stored[name] = whole[:, rank * width : (rank + 1) * width] if name in {"weight_packed", "weight"} else whole
        else:
            stored[name] = torch.cat([tensor.chunk(ranks)[rank] for tensor in tensors])
        assert stored[name].shape == (rows, width)
    return stored


@given(
    scheme=SCHEMES,
    rows=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    columns=st.integers(1, 300),
    ranks=st.integers(1, 3),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_rows_of_fused_linears(scheme: Scheme, rows: list[int], columns: int, ranks: int) -> None:
    """q/k/v or gate/up: each rank's rows are the contract's, also where the last group is short."""
    weights = [make_weight(8 * ranks * count, columns, scheme) for count in rows]
    for rank in range(ranks):
        share = Share("qkv", tuple(8 * count for count in rows), columns, columns, 0, scheme)
        found = weights_of(share, dealt(share, weights, rank, ranks), [side(weight) for weight in weights])
        assert len(found) == (1 if scheme.target.channel_outer_scale else len(rows))
        expected = torch.cat([dequantize(weight).chunk(ranks)[rank] for weight in weights])
        assert torch.equal(torch.cat([dequantize(weight) for weight in found]), expected)


@given(scheme=SCHEMES, rows=st.sampled_from([8, 24]), columns=st.integers(1, 12), ranks=st.integers(2, 4))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_columns_on_several_ranks(scheme: Scheme, rows: int, columns: int, ranks: int) -> None:
    """o_proj, down_proj: a rank's columns have the whole row's scales, also where a border lies in a group."""
    weight = make_weight(rows, 8 * columns * ranks, scheme)
    for rank in range(ranks):
        share = Share("o_proj", (rows,), 8 * columns, 8 * columns * ranks, rank * 8 * columns, scheme)
        (found,) = weights_of(share, dealt(share, [weight], rank, ranks), [side(weight)])
        assert isinstance(found, QuantizedWeight) and found.cut
        assert torch.equal(dequantize(found), dequantize(weight).chunk(ranks, 1)[rank])
        assert scheme.group_size % found.scheme.group_size == 0


@pytest.mark.parametrize("target", [HOPPER, GAUDI])
@pytest.mark.parametrize("ranks", [1, 2])
def test_linears_in_fp8(target: Target, ranks: int) -> None:
    """Fused and cut, what is stored in FP8 is the contract's too."""
    static = None if target.dynamic_activations else torch.tensor(0.5)

    def weight(rows: int) -> Fp8Weight:
        values = target.fp8.round(torch.randn(rows, 48, generator=torch.Generator().manual_seed(rows)) * 100)
        outer = torch.full((rows,), 3.0) if target.channel_outer_scale else torch.tensor([rows / 4])
        return Fp8Weight(values.to(torch.float8_e4m3fn), outer, Fp8Scheme(target), static)

    weights = [weight(8), weight(16)]
    for rank in range(ranks):
        fused = Share("gate_up", (8 // ranks, 16 // ranks), 48, 48, 0, Fp8Scheme(target))
        found = weights_of(fused, dealt(fused, weights, rank, ranks), [side(one) for one in weights])
        expected = torch.cat([dequantize(one).chunk(ranks)[rank] for one in weights])
        assert torch.equal(torch.cat([dequantize(one) for one in found]), expected)
        cut = Share("down", (16,), 48 // ranks, 48, rank * 48 // ranks, Fp8Scheme(target))
        (one,) = weights_of(cut, dealt(cut, weights[1:], rank, ranks), [side(weights[1])])
        assert torch.equal(dequantize(one), dequantize(weights[1]).chunk(ranks, 1)[rank])


@pytest.mark.parametrize("scheme", [Scheme(), Scheme(symmetric=False), Scheme(GAUDI)])
def test_what_the_kernel_makes_of_cut_weights(scheme: Scheme) -> None:
    """Groups of 128 cut at 192: the CPU's kernel has the same values, whatever its layout."""
    weight = make_weight(16, 384, scheme)
    share = Share("o_proj", (16,), 192, 384, 192, scheme)
    (found,) = weights_of(share, dealt(share, [weight], 1, 2), [side(weight)])
    backend, refusals = dispatch.choose(found.scheme, torch.device("cpu"))
    assert backend is cpu or refusals
    packed = backend.prepack(found)
    assert torch.equal(backend.values(packed) * packed.outer_scale[:, None], dequantize(weight)[:, 192:])


def test_refusals_are_sentences() -> None:
    """Parts that cannot be cut, scales that are missing or no scales."""
    with pytest.raises(DuotoneError, match=r"o_proj: found 12 columns .* multiple of 8; use another --tensor-parallel-size"):
        Share("o_proj", (8,), 12, 24, 0, Scheme())
    with pytest.raises(DuotoneError, match=r"k_proj: found \(12,\) rows .* with zero points"):
        Share("k_proj", (12,), 128, 128, 0, Scheme(symmetric=False))
    weight = make_weight(8, 128, Scheme(GAUDI))
    share = Share("up_proj", (8,), 128, 128, 0, weight.scheme)
    stored = dealt(share, [weight], 0, 1)
    with pytest.raises(DuotoneError, match=r"up_proj: duotone.json has no scales for it"):
        weights_of(share, stored, [None])
    with pytest.raises(DuotoneError, match=r"up_proj\.weight_scale: found negative or non-finite scales"):
        weights_of(share, stored | {"weight_scale": -stored["weight_scale"]}, [side(weight)])
    with pytest.raises(DuotoneError, match="up_proj: the checkpoint's scales are not valid: group_scale"):
        weights_of(share, stored | {"weight_scale": 0 * stored["weight_scale"]}, [side(weight)])


@pytest.mark.parametrize("scale", [57.0, 1.03])
def test_a_cut_weight_has_fp8_scales(scale: float) -> None:
    """Its row's largest may be elsewhere; what is no E4M3 value, or above the peak, is still refused."""
    codes, outer = torch.zeros(1, 32, dtype=torch.uint8), torch.ones(1)
    QuantizedWeight(codes, torch.tensor([[28.0]]), outer, Scheme(HOPPER, 32), cut=True)
    with pytest.raises(ValueError, match="group_scale: expected E4M3FN values of at most 56"):
        QuantizedWeight(codes, torch.tensor([[scale]]), outer, Scheme(HOPPER, 32), cut=True)


def test_what_is_left_to_vllm() -> None:
    """What it has a kernel for: hopper's scheme, groups of 128, compute capability 9.0."""
    assert is_left_to_vllm(Scheme(), (9, 0))
    assert not any(is_left_to_vllm(Scheme(), capability) for capability in (None, (8, 9), (10, 0)))
    others = (Scheme(HOPPER, 64), Scheme(GAUDI), Scheme(symmetric=False))
    assert not any(is_left_to_vllm(scheme, (9, 0)) for scheme in others)


def test_vllm_finds_it_and_nobody_else_imports_it() -> None:
    """The entry point names a function that is there; to import it takes neither vLLM nor torch."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["entry-points"]["vllm.general_plugins"] == {"duotone": "duotone.vllm_plugin:register"}
    program = (
        "import sys; from duotone.vllm_plugin import NAME, register; print(NAME, callable(register), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["duotone", "True", "False"]
    importers = [path for path in (ROOT / "src").rglob("*.py") if "duotone.vllm_plugin" in path.read_text(encoding="utf-8")]
    assert {path.parent.name for path in importers} == {"vllm_plugin"}
