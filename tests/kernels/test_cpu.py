"""The compiled linear: every path this machine runs, against the contract, against each other, and against itself.

A path that this CPU lacks is skipped by name; `portable` runs everywhere.
"""

import copy
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from duotone.contract import quantize_activations
from duotone.errors import DuotoneError
from duotone.kernels import cpu, dispatch, layout, native, reference
from duotone.kernels.layout import mantissa_table
from duotone.qweight import QuantizedWeight, fp8_values
from duotone.runtime.linear import QuantizedLinear
from duotone.scheme import GAUDI, HOPPER, Scheme, Target
from tests.kernels.test_reference import make_weight

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(not native.available(), reason=f"compiled linear: {native.unavailable()}")
RUNS = cpu.paths() if native.available() else []
PATHS = [pytest.param(path, marks=pytest.mark.skipif(path not in RUNS, reason=f"this CPU has no {path}")) for path in cpu.PATHS]
EVERY_PATH = pytest.mark.parametrize("path", PATHS)
SCHEMES = st.builds(Scheme, st.sampled_from([HOPPER, GAUDI]), st.sampled_from([32, 64, 128]), st.booleans())
#: Like NF4: denser around zero, off any grid.
BENT = tuple(float(x) ** 3 for x in torch.linspace(-1, 1, 16))
DTYPES = [torch.bfloat16, torch.float32, torch.float16]


@pytest.fixture
def threads() -> Iterator[None]:
    """Put torch's number of threads back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def packed_for(path: str, weight: QuantizedWeight) -> cpu.Packed:
    """For a path, or for the next one where it does not take such weights: those have a test of their own."""
    if path == "avx512vbmi" and mantissa_table(weight.scheme) is None:
        path = "avx512vnni"
    return cpu.prepack(weight, path)


def tokens_of(count: int, columns: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Tokens of very different size."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, columns, generator=generator) * torch.logspace(-2, 1, count)[:, None]
    return x.to(dtype)


@given(rows=st.integers(1, 40), columns=st.integers(1, 300), scheme=SCHEMES)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_packing_loses_nothing(rows: int, columns: int, scheme: Scheme) -> None:
    """The FP8 operand comes back bit for bit from what is packed, and padding aside it takes half a byte a weight."""
    weight = make_weight(rows, columns, scheme)
    for path in RUNS:
        packed = packed_for(path, weight)
        assert torch.equal(cpu.values(packed), fp8_values(weight))
        block = packed.block_rows
        assert packed.codes.numel() == -(-rows // block) * block * -(-columns // 32) * 16


@EVERY_PATH
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 300),
    tokens=st.integers(1, 60),
    scheme=SCHEMES,
    dtype=st.sampled_from(DTYPES),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_equals_float64(path: str, rows: int, columns: int, tokens: int, scheme: Scheme, dtype: torch.dtype) -> None:
    """Any shape, group, zero points and dtype: float64's product of the same operands, but for float32 sums and roundings."""
    weight = make_weight(rows, columns, scheme)
    x = tokens_of(tokens, columns, dtype)
    x8, scale = quantize_activations(x, scheme.target, weight.input_scale)
    operands, outer = fp8_values(weight).double(), weight.outer_scale.double()
    exact = x8.double() @ operands.T * outer * scale.double()
    magnitude = x8.double().abs() @ operands.abs().T * outer * scale.double()
    found = cpu.linear(x, packed_for(path, weight))
    assert found.shape == (tokens, rows) and found.dtype == dtype
    last = 0 if dtype == torch.float32 else exact.abs() * torch.finfo(dtype).eps + torch.finfo(dtype).smallest_normal
    assert bool(((found.double() - exact).abs() <= magnitude * (columns + 3) * 2**-24 + last + 1e-30).all())


def by_segments(x: Tensor, weight: QuantizedWeight) -> Tensor:
    """What csrc/linear_kernels.h says, in int64 and float32: exact sums of segments, first to last, then what was cut off."""
    scheme, (rows, columns) = weight.scheme, weight.shape
    x8, scale = quantize_activations(x, scheme.target, weight.input_scale)
    w_NK, x_MK = (fp8_values(weight) * 512).long(), (x8 * 512).long()
    total = torch.zeros(len(x), rows)
    width = min(scheme.group_size, 256)  # the groups of these tests are powers of two
    for is_low in (False, True):
        for first in range(0, columns, width):
            x_Mk, w_Nk = x_MK[:, first : first + width], w_NK[:, first : first + width]
            shift = sum((x_Mk.abs().amax(1, keepdim=True) >> bit > 32767).long() for bit in range(4))
            high = x_Mk >> shift
            part, power = (x_Mk - (high << shift), torch.zeros_like(shift)) if is_low else (high, shift)
            exact = part @ w_Nk.T  # a multiple of the group's unit, which float32 rounds alike
            total += exact.float() * torch.exp2(power.float()) * 2.0**-18
    return total * weight.outer_scale * scale


@EVERY_PATH
@given(rows=st.integers(1, 20), columns=st.integers(1, 700), tokens=st.integers(1, 12), spread=st.floats(0, 8), scheme=SCHEMES)
@settings(max_examples=80, deadline=None, derandomize=True)
def test_bitwise_by_segments(path: str, rows: int, columns: int, tokens: int, spread: float, scheme: Scheme) -> None:
    """Every bit, for values next to each other that are as far apart as FP8 goes and beyond."""
    weight = make_weight(rows, columns, scheme)
    generator = torch.Generator().manual_seed(columns)
    x = torch.randn(tokens, columns, generator=generator) * 10 ** (-spread * torch.rand(tokens, columns, generator=generator))
    assert torch.equal(cpu.linear(x, packed_for(path, weight)), by_segments(x, weight))


@EVERY_PATH
@pytest.mark.parametrize("group_size", [256, 352, 512, 640])
def test_wide_groups_do_not_overflow(path: str, group_size: int) -> None:
    """The largest codes and activations of one sign: sums that would not fit 32 bits are taken in parts."""
    scheme = Scheme(HOPPER, group_size)
    group = torch.full((9, scheme.groups(1280)), 56.0)
    weight = QuantizedWeight(torch.zeros(9, 1280, dtype=torch.uint8), group, torch.ones(9), scheme)
    found = cpu.linear(torch.full((5, 1280), 3.0), packed_for(path, weight))
    assert torch.equal(found, torch.full((5, 9), -1280 * 448 * 3.0))


@given(scale=st.floats(2.0**-12, 60.0), zero=st.integers(-8, 7))
@settings(max_examples=400, deadline=None, derandomize=True)
def test_sixteen_values_fit_a_byte(scale: float, zero: int) -> None:
    """Any BF16 scale, not only those of a grid, and any zero point: 16 FP8 values are whole units, and none is lost."""
    group, zero_point = torch.tensor([[scale]]).bfloat16().float(), torch.tensor([[float(zero)]])
    codes, static = torch.arange(16, dtype=torch.uint8)[None], torch.tensor(0.25)
    weight = QuantizedWeight(codes, group, torch.ones(1), Scheme(GAUDI, 32, False), zero_point, static)
    assert torch.equal(cpu.values(cpu.prepack(weight)), fp8_values(weight))


@pytest.mark.parametrize("count", [126, 127, 128])
def test_as_many_scales_as_there_are_bytes(count: int) -> None:
    """BF16 scales are no FP8 bytes, however many there are."""
    scale = (128 + torch.arange(count))[:, None].float() / 32
    codes = torch.arange(16, dtype=torch.uint8).repeat(count, 2)
    weight = QuantizedWeight(codes, scale, torch.ones(1), Scheme(GAUDI, 32), None, torch.tensor(0.25))
    assert torch.equal(cpu.values(cpu.prepack(weight)), fp8_values(weight))


@EVERY_PATH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bias", [False, True])
def test_bitwise_on_exact_sums(path: str, dtype: torch.dtype, bias: bool) -> None:
    """Where every sum is exact in float32 the reference's bits come out: quantization, scales, bias."""
    scheme = Scheme(HOPPER, 32)
    generator = torch.Generator().manual_seed(0)
    group = torch.tensor([[56.0, 28.0], [56.0, 14.0], [56.0, 56.0]])
    codes = torch.randint(0, 16, (3, 64), generator=generator, dtype=torch.uint8)
    weight = QuantizedWeight(codes, group, torch.tensor([0.5, 0.25, 1.0]), scheme)
    x = (torch.randint(-7, 8, (9, 64), generator=generator) * 64).to(dtype) * 0.37  # scales are no powers of two
    added = torch.randn(3, generator=generator).to(dtype) if bias else None
    found, meant = (module.linear(x, packed, added) for module, packed in both(path, weight))
    assert torch.equal(found, meant)


def both(path: str, weight: QuantizedWeight) -> list[tuple]:
    return [(cpu, packed_for(path, weight)), (reference, reference.prepack(weight))]


@EVERY_PATH
@pytest.mark.parametrize("target", [HOPPER, GAUDI], ids=["hopper", "gaudi"])
def test_activations_are_rounded_as_the_contract_says(path: str, target: Target) -> None:
    """An identity shows what the product reads: ties, subnormals, saturation, zeros, every token's own scale."""
    scheme = Scheme(target, 32)
    codes = torch.full((32, 32), 8, dtype=torch.uint8)
    codes.fill_diagonal_(9)  # level 1
    if target.channel_outer_scale:
        codes[:, 0] = torch.where(torch.arange(32) == 0, 9, 8)
        weight = QuantizedWeight(codes, torch.full((32, 1), 56.0), torch.ones(32), scheme)
    else:
        weight = QuantizedWeight(codes, torch.ones(32, 1), torch.ones(1), scheme, None, torch.tensor(0.25))
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(200, 32, generator=generator) * torch.logspace(-6, 3, 200)[:, None]
    x[0], x[1, 1:], x[2] = 0, 0, torch.linspace(-448, 448, 32)
    x[3] = torch.arange(32) * 2.0**-10  # ties and subnormals beside the largest
    x[3, 0] = 448
    found, meant = (module.linear(x, packed) for module, packed in both(path, weight))
    assert torch.equal(found, meant)


@EVERY_PATH
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_no_number_stays_with_its_token(path: str, bad: float) -> None:
    """One bad value makes its own token's outputs what the reference's are, NaN, and nobody else's."""
    weight = make_weight(8, 64, Scheme(HOPPER, 32))
    x = tokens_of(7, 64)
    x[4, 33] = bad
    found, meant = (module.linear(x, packed) for module, packed in both(path, weight))
    assert bool(found[4].isnan().all()) and bool(meant[4].isnan().all())
    rest = torch.arange(7) != 4
    assert torch.equal(found[rest], cpu.linear(x[rest], packed_for(path, weight)))


@EVERY_PATH
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("scheme", [Scheme(HOPPER, 128), Scheme(GAUDI, 32, False)], ids=["hopper", "gaudi"])
def test_a_token_is_the_same_in_every_batch_and_on_any_number_of_threads(path: str, scheme: Scheme) -> None:
    """Bit for bit: alone, in batches around every size at which the way of computing changes, on one thread or three."""
    weight = make_weight(77, 700, scheme)
    packed, x = packed_for(path, weight), tokens_of(150, 700)
    torch.set_num_threads(1)
    whole = cpu.linear(x, packed)
    for count in (1, 2, 3, 4, 5, 6, 7, 47, 48, 49, 51, 97):
        torch.set_num_threads(3 if count % 2 else 1)
        assert torch.equal(cpu.linear(x[:count], packed), whole[:count]), count
        assert torch.equal(cpu.linear(x[-count:], packed), whole[-count:]), count


@pytest.mark.parametrize("path", PATHS[1:])
@given(rows=st.integers(1, 70), columns=st.integers(1, 600), tokens=st.integers(1, 60), scheme=SCHEMES)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_all_paths_give_the_same_bits(path: str, rows: int, columns: int, tokens: int, scheme: Scheme) -> None:
    """Sums of a segment are whole numbers and segments have one order, so an instruction set is no part of the result."""
    weight, x = make_weight(rows, columns, scheme), tokens_of(tokens, columns)
    assert torch.equal(cpu.linear(x, packed_for(path, weight)), cpu.linear(x, packed_for("portable", weight)))


def test_many_tables() -> None:
    """More than 256 different groups take a wider index: 126 scales times 16 zero points are there."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    scale = scale[scale <= 28]
    group = scale[torch.randint(0, len(scale), (60, 20), generator=generator)]
    group[:, 0] = 28
    zero = torch.randint(-8, 8, (60, 20), generator=generator).float()
    codes = torch.randint(0, 16, (60, 640), generator=generator, dtype=torch.uint8)
    weight = QuantizedWeight(codes, group, torch.ones(60), Scheme(HOPPER, 32, False), zero)
    packed = cpu.prepack(weight)
    assert packed.index.dtype == torch.uint16 and len(packed.table) > 256
    assert torch.equal(cpu.values(packed), fp8_values(weight))
    x = tokens_of(3, 640)
    assert torch.allclose(cpu.linear(x, packed), reference.linear(x, reference.prepack(weight)), rtol=1e-4)


@EVERY_PATH
@pytest.mark.parametrize("scheme", [Scheme(HOPPER, 64), Scheme(HOPPER, 32, False)], ids=["symmetric", "zero points"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_merged_weights_are_the_weights(path: str, scheme: Scheme, dtype: torch.dtype) -> None:
    """One call gives each weight's own bits; the parts are views that hold what the weights held."""
    weights = [make_weight(rows, 200, scheme) for rows in (48, 16, 13)]
    packed = [packed_for(path, weight) for weight in weights]
    assert cpu.can_merge(packed) and not cpu.can_merge(packed[::-1]), "13 rows are no whole blocks"
    merged = cpu.merge(packed)
    x = tokens_of(6, 200, dtype).view(2, 3, 200)
    for part, weight, one in zip(cpu.linears(x, merged), weights, packed, strict=True):
        assert torch.equal(part, cpu.linear(x, one)) and part.is_contiguous()
        assert part.shape == (2, 3, weight.shape[0])
    for view, weight in zip(cpu.split(merged), weights, strict=True):
        assert torch.equal(cpu.values(view), fp8_values(weight))
        assert view.codes.untyped_storage().data_ptr() == merged.codes.untyped_storage().data_ptr()


def test_what_cannot_be_merged() -> None:
    """Other groups, other widths, other static scales."""
    one = cpu.prepack(make_weight(8, 64, Scheme(HOPPER, 32)))
    assert not cpu.can_merge([one, cpu.prepack(make_weight(8, 64, Scheme(HOPPER, 64)))])
    assert not cpu.can_merge([one, cpu.prepack(make_weight(8, 96, Scheme(HOPPER, 32)))])
    static = cpu.prepack(make_weight(8, 64, Scheme(GAUDI, 32)))
    assert cpu.can_merge([static, static]) and static.input_scale is not None
    assert not cpu.can_merge([static, replace(static, input_scale=static.input_scale * 2)])


def test_leading_dimensions_and_no_tokens() -> None:
    """[2, 3, K] is six tokens; none give none; a slice that is not contiguous is read as what it is."""
    packed = cpu.prepack(make_weight(16, 64, Scheme(HOPPER, 32)))
    x = tokens_of(6, 64)
    flat = cpu.linear(x, packed)
    assert torch.equal(cpu.linear(x.view(2, 3, 64), packed), flat.view(2, 3, 16))
    assert cpu.linear(x[:0], packed).shape == (0, 16)
    assert torch.equal(cpu.linear(x.T.contiguous().T, packed), flat)
    assert torch.equal(cpu.linear(x[::2], packed), flat[::2])


def test_compilers_know_its_shape() -> None:
    """torch.compile traces a linear in one piece, for another number of tokens too."""
    linear = QuantizedLinear(make_weight(16, 64, Scheme(HOPPER, 32)), torch.randn(16))
    assert linear.backend is cpu
    compiled = torch.compile(linear, fullgraph=True, backend="eager", dynamic=True)
    with torch.no_grad():
        for count in (1, 5):
            x = tokens_of(count, 64)
            assert torch.equal(compiled(x), linear(x))


def test_refusals_are_sentences(monkeypatch: pytest.MonkeyPatch) -> None:
    """A group it does not know, another device, the extension left out, a path that this machine lacks."""
    fits, odd = Scheme(HOPPER, 32), Scheme(HOPPER, 16)
    assert cpu.refuses(fits, CPU) is None
    assert cpu.refuses(odd, CPU) == "group_size: found 16, expected a multiple of 32"
    assert cpu.refuses(fits, torch.device("cuda")) == "runs on a CPU, not on cuda"
    backend, refusals = dispatch.choose(odd, CPU)
    assert backend is reference and refusals[0] == "cpu: group_size: found 16, expected a multiple of 32"
    monkeypatch.setenv("DUOTONE_NATIVE", "mmx")
    assert cpu.refuses(fits, CPU) == f"DUOTONE_NATIVE=mmx, and this machine runs {', '.join(cpu.paths())}"


@EVERY_PATH
def test_environment_chooses_the_path(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """DUOTONE_NATIVE names one; without it the fastest is taken."""
    weight = make_weight(8, 64, Scheme(HOPPER, 32))
    assert cpu.PATHS[cpu.prepack(weight).path] == cpu.paths()[-1]
    monkeypatch.setenv("DUOTONE_NATIVE", path)
    assert cpu.PATHS[cpu.prepack(weight).path] == path


@pytest.mark.parametrize("path", [PATHS[-1]])
@pytest.mark.parametrize("scheme", [Scheme(GAUDI, 32), Scheme(HOPPER, 32, False), Scheme(HOPPER, 32, True, BENT)])
def test_columns_are_for_fp8_scales_alone(path: str, scheme: Scheme, monkeypatch: pytest.MonkeyPatch) -> None:
    """BF16 scales, zero points and levels off the grid take the next path by themselves; named, it refuses in a sentence."""
    reason = "needs INT4 codes without zero points and FP8 group scales (target hopper)"
    weight = make_weight(8, 64, scheme)
    assert cpu.PATHS[cpu.prepack(weight).path] == "avx512vnni" and f"{path}: {reason}" in cpu.path_refusals(scheme)
    with pytest.raises(ValueError, match=re.escape(reason)):
        cpu.prepack(weight, path)
    monkeypatch.setenv("DUOTONE_NATIVE", path)
    assert cpu.refuses(scheme, CPU) == f"DUOTONE_NATIVE={path}, which {reason}"


@given(byte=st.integers(1, 102), code=st.integers(0, 15))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_eight_mantissas_make_all_products(byte: int, code: int) -> None:
    """Every product of a scale up to 56, subnormal ones too, is that of its mantissa in units of its exponent."""
    scale = torch.tensor([byte], dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    mantissa, exponent = torch.frexp(scale)
    table = mantissa_table(Scheme(HOPPER, 32))
    assert table is not None
    value = table[int(mantissa * 16) - 8, code].float() - 128
    assert float(value) * 2.0 ** (int(exponent) - 4) == float((scale * (code - 8)).to(torch.float8_e4m3fn).float())


def test_the_mantissas_are_nobodys_to_change() -> None:
    """Asked for first in inference mode and on another device, the table is an ordinary one, and everybody's own."""
    scheme = Scheme(HOPPER, 96)
    with torch.inference_mode(), torch.device("meta"):
        first = mantissa_table(scheme)
    second = mantissa_table(scheme)
    assert first is not None and second is not None and not second.is_inference() and second.device == CPU
    second.zero_()
    assert torch.equal(first, mantissa_table(scheme)) and int(first.max()) > 128


@pytest.mark.parametrize("scheme", [Scheme(), Scheme(symmetric=False), Scheme(GAUDI), Scheme(levels=BENT)])
def test_the_default_dtype_changes_nothing(scheme: Scheme) -> None:
    """Loaders of others, vLLM's and transformers', set it to the model's: tables and paths are those of float32."""
    weight = make_weight(24, 256, scheme)
    expected, values = cpu.prepack(weight), fp8_values(weight)
    layout._mantissa_values.cache_clear()
    torch.set_default_dtype(torch.bfloat16)
    try:
        packed, found = cpu.prepack(weight), fp8_values(weight)
    finally:
        torch.set_default_dtype(torch.float32)
        layout._mantissa_values.cache_clear()
    assert packed.path == expected.path and torch.equal(found, values)
    assert torch.equal(cpu.values(packed), cpu.values(expected))


def test_a_copied_scheme_is_the_same_scheme() -> None:
    """As other processes get it, whose formats are equal to ours and not the same objects."""
    scheme = Scheme(HOPPER, 64)
    copied = copy.deepcopy(scheme)
    layout._mantissa_values.cache_clear()
    assert copied.target.fp8 is not scheme.target.fp8 and mantissa_table(copied) is not None
    weight = make_weight(16, 128, scheme)
    assert torch.equal(layout.in_blocks(replace(weight, scheme=copied)).table, layout.in_blocks(weight).table)


def test_without_the_extension() -> None:
    """DUOTONE_NATIVE=0: the torch path, and the reason with it."""
    program = (
        "import torch; from duotone.kernels import dispatch; from duotone.scheme import HOPPER, Scheme;"
        "backend, refusals = dispatch.choose(Scheme(HOPPER, 32), torch.device('cpu'));"
        "print(backend.NAME, refusals)"
    )
    found = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env={**os.environ, "DUOTONE_NATIVE": "0"}
    )
    others = "'triton: runs on NVIDIA GPUs, not on cpu', 'scaled_mm: multiplies FP8 weights, not 4-bit codes'"
    assert found.stdout.strip() == f"torch ['cpu: DUOTONE_NATIVE=0', {others}]"


def test_it_stays_on_its_device() -> None:
    """What is packed for a CPU is not sent elsewhere; the error says what to do."""
    linear = QuantizedLinear(make_weight(8, 64, Scheme(HOPPER, 32)), None)
    with pytest.raises(DuotoneError, match=r"loaded for a CPU; load it for meta: duotone\.load"):
        linear.to("meta")


@pytest.mark.parametrize("path", [PATHS[-1]])
def test_columns_read_nothing_out_of_bounds(path: str) -> None:
    """The other layout's tensors, and a table that is too short."""
    columns, blocks = (cpu.prepack(make_weight(8, 64, Scheme(HOPPER, 32)), of) for of in (path, "portable"))
    x = torch.zeros(2, 64)
    wrong = [
        replace(columns, codes=blocks.codes),
        replace(columns, index=blocks.index),
        replace(columns, table=columns.table[:7]),
        replace(columns, bias=-1),
        replace(blocks, path=columns.path),
    ]
    for packed in wrong:
        with pytest.raises(RuntimeError, match="expected"):
            cpu.linear(x, packed)


BAD = {
    "x narrow": ({"x": torch.zeros(2, 63)}, "x: expected shape"),
    "x double": ({"x": torch.zeros(2, 64, dtype=torch.float64)}, "x: expected bfloat16 or float32"),
    "codes short": ({"codes": torch.zeros(1, 2, 4, 2, 15, dtype=torch.uint8)}, "codes: found another shape"),
    "index wide": ({"index": torch.zeros(1, 2, 8, dtype=torch.uint16)}, "index: found another type"),
    "index past the table": (
        {"index": torch.full((1, 2, 8), 300, dtype=torch.uint16), "table": torch.zeros(300, 32, dtype=torch.uint8)},
        "index: found no such row",
    ),
    "table too short for a byte": ({"table": torch.zeros(255, 32, dtype=torch.uint8)}, "table: expected shape"),
    "table": ({"table": torch.zeros(3, 31, dtype=torch.uint8)}, "table: expected shape"),
    "bias": ({"bias": torch.zeros(9)}, "bias: found another shape"),
    "parts of half a block": ({"parts": torch.tensor([4, 4])}, "parts: expected multiples of 8"),
    "parts of more": ({"parts": torch.tensor([8, 8])}, "parts: expected multiples of 8"),
    "parts of less": ({"parts": torch.tensor([0])}, "parts: expected as many rows"),
    "parts that overflow": ({"parts": torch.tensor([2**62] * 4 + [8])}, "parts: expected multiples of 8"),
    "negative parts": ({"parts": torch.tensor([16, -8])}, "parts: expected multiples of 8"),
    "group": ({"group_size": 48}, "group_size: expected a multiple of 32"),
    "path": ({"path": 77}, "path: this machine cannot run it"),
    "bias of values": ({"value_bias": 2**32}, "value_bias: expected a byte"),
    "fp8": ({"fp8_max": 1e30}, "fp8_max: expected at most 448"),
}


@pytest.mark.parametrize("change", BAD.values(), ids=BAD.keys())
def test_the_op_reads_nothing_out_of_bounds(change: tuple[dict, str]) -> None:
    """Called by hand with tensors that do not belong together: an error, not a crash."""
    packed = packed_for("portable", make_weight(8, 64, Scheme(HOPPER, 32)))
    given = {
        "x": torch.zeros(2, 64), "codes": packed.codes, "index": packed.index, "table": packed.table,
        "outer_scale": packed.outer_scale, "input_scale": None, "bias": None, "parts": None, "columns": 64, "group_size": 32,
        "value_bias": -1, "fp8_max": 448.0, "smallest_scale": 1e-6, "path": 0,
    }  # fmt: skip
    with pytest.raises(RuntimeError, match=change[1]):
        torch.ops.duotone.linear(*(given | change[0]).values())
