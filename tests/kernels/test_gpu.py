"""The Triton kernels against the contract: on a GPU where there is one, through Triton's interpreter elsewhere (conftest.py).

What the interpreter cannot run, PTX, test_gpu_executed.py runs, with these tests; what only a compiler can tell is in
test_gpu_compiled.py.
"""

import ast
import dataclasses
import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import StaticCache

import duotone
from duotone.contract import quantize_activations
from duotone.kernels import dispatch, reference
from duotone.kernels.gpu import backend, layout
from duotone.qweight import QuantizedWeight, fp8_values
from duotone.runtime.linear import QuantizedLinear, share_call
from duotone.runtime.load import load
from duotone.scheme import GAUDI, HOPPER, Fp8Scheme, Scheme, Target
from duotone.speed_gpu.sizes import LLAMA_8B, LLAMA_70B
from tests.kernels.test_reference import make_weight

pytest.importorskip("triton", reason="needs the package triton (the dev extra brings it on Linux)")

from duotone.kernels.gpu import launch, trial

#: The interpreter computes with numpy, which warns of NaN and infinity.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CUDA = torch.device("cuda")
SYMMETRIC_LEVELS = tuple(float(level) for level in (-7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7, 7))


def to_device(weight: QuantizedWeight) -> QuantizedWeight:
    moved = {name: value.to(DEVICE) for name, value in vars(weight).items() if isinstance(value, Tensor)}
    return dataclasses.replace(weight, **moved)


def weight_of(rows: int, columns: int, scheme: Scheme, is_signed: bool = False) -> QuantizedWeight:
    weight = make_weight(rows, columns, scheme)
    return to_device(dataclasses.replace(weight, codes=weight.codes.clamp(min=1)) if is_signed else weight)


def quantized(x: Tensor, target: Target, static: Tensor | None = None) -> tuple[Tensor, Tensor]:
    chunks, static = -(-x.shape[1] // layout.CHUNK), None if static is None else static.to(DEVICE)
    x8, scales = launch.quantize(x.to(DEVICE), chunks, static, target.fp8.max, target.smallest_activation_scale)
    return x8.cpu(), scales.cpu()


def same_bits(found: Tensor, meant: Tensor) -> bool:
    """Equal values, NaN for NaN."""
    return bool(((found == meant) | (found.isnan() & meant.isnan())).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("target", [HOPPER, GAUDI], ids=lambda target: target.name)
def test_activations_bit_for_bit(dtype: torch.dtype, target: Target) -> None:
    """Any size, zeros, values whose scale is clamped, NaN and infinity; columns after K are zero."""
    x = torch.randn(9, 300, generator=torch.Generator().manual_seed(0))
    x *= torch.tensor([1, 0, 1e-9, 1e-5, 100, 3e4, 1, 1, 1])[:, None]
    x[6, 7], x[7, 0], x[8, 299] = torch.nan, torch.inf, -torch.inf
    x = x.to(dtype)
    static = None if target.dynamic_activations else torch.tensor(0.125)
    x8, scales = quantized(x, target, static)
    meant, scale = quantize_activations(x, target, static)
    assert same_bits(x8[:, :300].float(), meant) and same_bits(scales[:, None], scale.expand(9, 1))
    assert not x8[:, 300:].float().any() and x8.shape == (9, 384)


def test_every_bf16_value_and_every_tie_becomes_its_fp8() -> None:
    """All 65536 values of BF16; all numbers halfway between two of FP8's, and their neighbors in float32."""
    every = torch.arange(2**16).to(torch.int16).view(torch.bfloat16).float().view(64, 1024)
    values = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middle = (values[1:] + values[:-1]) / 2
    near = torch.cat([middle, torch.nextafter(middle, middle * 2), torch.nextafter(middle, middle * 0)])
    for x in (every, torch.cat([near, -near])[None]):
        x8, _ = quantized(x, GAUDI, torch.tensor(1.0))
        assert same_bits(x8[:, : x.shape[1]].float(), GAUDI.fp8.round(x))
        x8, scale = quantized(x, HOPPER)
        meant, _ = quantize_activations(x, HOPPER)
        assert same_bits(x8[:, : x.shape[1]].float(), meant) and len(scale) == len(x)


@pytest.mark.parametrize("group_size", [32, 64, 128, 256])
@pytest.mark.parametrize("kind", ["hopper", "signed", "zero points", "gaudi"])
def test_weights_bit_for_bit(group_size: int, kind: str) -> None:
    """What is written for a prompt, and what plain torch reads out of the packed form, are the contract's FP8 values."""
    target, symmetric = GAUDI if kind == "gaudi" else HOPPER, kind != "zero points"
    weight = weight_of(70, 300, Scheme(target, group_size, symmetric), kind == "signed")
    packed, meant = backend.prepack(weight), fp8_values(weight)
    assert packed.is_signed == (kind == "signed")
    assert torch.equal(backend.values(packed), meant)
    written = launch.write_values(layout.pack(weight), group_size)
    assert torch.equal(written[:70, :300].float(), meant)


def test_other_levels_and_large_tables() -> None:
    """Levels are data: 8 magnitudes take the shorter lookup; more groups than a byte counts take wider words of the index."""
    scheme = Scheme(HOPPER, 32, levels=SYMMETRIC_LEVELS)
    codes = torch.randint(0, 16, (5, 96), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    group = torch.full((5, 3), scheme.peak_group_scale)
    weight = QuantizedWeight(codes, group, torch.full((5,), 0.5), scheme)
    assert backend.prepack(weight).is_signed and torch.equal(backend.values(backend.prepack(weight)), fp8_values(weight))
    scales = (torch.arange(400).view(40, 10) + 1).float().bfloat16().float() / 256
    codes = codes.repeat(8, 4)[:, :320].contiguous()
    wide = to_device(QuantizedWeight(codes, scales, torch.ones(1), Scheme(GAUDI, 32), None, torch.tensor(1.0)))
    packed = backend.prepack(wide)
    assert packed.to_a_word == 4 or len(packed.table) > 256
    assert torch.equal(backend.values(packed), fp8_values(wide))
    assert torch.equal(launch.write_values(layout.pack(wide), 32)[:40, :320].float(), fp8_values(wide))


def product_bound(y: Tensor, x: Tensor, weight: QuantizedWeight) -> None:
    """Within float32 sums of the operands in float64, and the roundings at the end; a GPU's own sums keep fewer bits."""
    x8, scale = quantize_activations(x, weight.scheme.target, weight.input_scale)
    operand, outer = fp8_values(weight).double(), weight.outer_scale.double() * scale.double()
    exact = x8.double() @ operand.T * outer
    size = x8.double().abs() @ operand.abs().T * outer
    sums = size * (2.0**-12 if DEVICE.type == "cuda" else (x.shape[1] + 3) * 2.0**-24)
    rounding = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10, torch.float32: 0.0}[y.dtype]
    assert bool(((y.double() - exact).abs() <= sums + exact.abs() * rounding + 1e-7).all())


@pytest.mark.parametrize(
    ("tokens", "dtype", "group_size", "target", "symmetric"),
    [
        (1, torch.bfloat16, 128, HOPPER, True),
        (3, torch.float32, 32, HOPPER, False),
        (17, torch.float16, 64, HOPPER, True),
        (33, torch.bfloat16, 128, GAUDI, True),
        (70, torch.bfloat16, 64, HOPPER, True),
        (70, torch.float32, 256, HOPPER, True),
    ],
)
def test_products(
    tokens: int, dtype: torch.dtype, group_size: int, target: Target, symmetric: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tiles of tokens that are not full, a K of chunks that are not, splits of K, prompts, zero points, static activations."""
    monkeypatch.setattr(launch, "_ADDING", 0.0)  # so that K is split where it is as short as this
    columns = {1: 1100, 3: 1000, 17: 1100, 33: 1000, 70: 300}[tokens]
    assert tokens == 70 or launch.chunks_each(256, columns // 128, launch.tile_for(tokens), launch.processors(DEVICE)) < 8
    weight = weight_of(130, columns, Scheme(target, group_size, symmetric))
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(tokens)).to(DEVICE, dtype)
    y = backend.linear(x, backend.prepack(weight))
    assert y.dtype == dtype and y.shape == (tokens, 130) and y.is_contiguous()
    product_bound(y, x, weight)


@pytest.mark.parametrize("tokens", [1, 33])
def test_bitwise_on_exact_sums(tokens: int) -> None:
    """Where every product and sum is exact, so is the output: shape, order of scales, rounding, and the bias after it."""
    scheme = Scheme(HOPPER, 64)
    codes = torch.randint(0, 16, (144, 384), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    group = torch.full((144, 6), 56.0)
    weight = to_device(QuantizedWeight(codes, group, torch.full((144,), 0.25), scheme))
    x = torch.zeros(tokens, 2, 384).bfloat16()
    x[..., ::3] = torch.randint(-3, 4, (tokens, 2, 128), generator=torch.Generator().manual_seed(1)).bfloat16() * 64
    x[..., 0] = 448  # s_x is exactly 1
    x, bias = x.to(DEVICE), torch.randn(144, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    packed, meant = backend.prepack(weight), (x.double() @ fp8_values(weight).double().T * 0.25).bfloat16()
    assert torch.equal(backend.linear(x, packed), meant)
    assert torch.equal(backend.linear(x, packed, bias.bfloat16()), meant + bias.bfloat16())
    if tokens == 1:
        assert torch.equal(backend.linear(x, packed, bias), meant + bias), "a bias of another type decides the type"


def test_no_tokens_and_doubles() -> None:
    """An expert that nothing is sent to; a type that no kernel reads."""
    weight = weight_of(8, 64, Scheme(HOPPER, 32))
    packed, x = backend.prepack(weight), torch.randn(2, 64, dtype=torch.float64, device=DEVICE)
    assert backend.linear(x[:0].bfloat16(), packed).shape == (0, 8)
    y = backend.linear(x, packed)
    assert y.dtype == torch.float64
    product_bound(y.float(), x.float(), weight)


def test_splits_fill_a_gpu() -> None:
    """Every chunk is in just one split, for any size; on an H200 no multiprocessor has a fifth more to do than the others."""
    tile = launch.tile_for(1)
    for rows, chunks, processors in ((4096, 32, 108), (128, 1, 132), (256, 9, 132), (640, 33, 20), (512, 3, 1)):
        each = launch.chunks_each(rows, chunks, tile, processors)
        splits = -(-chunks // each)
        assert (splits - 1) * each < chunks <= splits * each + 1
        assert splits == 1 or each >= 4
        assert chunks % 2 or each % 2 == 0
    for sizes in (LLAMA_8B, LLAMA_70B):
        for rows, columns in sizes.linears().values():
            chunks, blocks = columns // 128, rows // 128
            each = launch.chunks_each(rows, chunks, tile, 132)
            busiest = each * -(-blocks * -(-chunks // each) // 132)
            assert busiest < 1.2 * blocks * chunks / 132, f"{rows}x{columns}: {each} chunks each"
    for columns in (trial._COLUMNS, trial._ODD_COLUMNS):  # what the trial compares is what will run
        for tokens, processors in itertools.product(trial._TOKENS[:2], (58, 132, 148)):
            chunks = -(-columns // layout.CHUNK)
            assert launch.chunks_each(2 * layout.BLOCK_ROWS, chunks, launch.tile_for(tokens), processors) < chunks
    assert {launch.tile_for(tokens).rows for tokens in range(1, 65)} == {128}, "splits depend on rows, never on tokens"


def test_the_op_keeps_its_word() -> None:
    """Schema, shapes for compilers, nothing changed in place: what torch.compile and CUDA graphs go by."""
    weight = weight_of(24, 64, Scheme(HOPPER, 32))
    packed, x = backend.prepack(weight), torch.randn(2, 3, 64, device=DEVICE).bfloat16()
    arguments = (
        x, packed.codes, packed.index, packed.table, packed.outer_scale, None, torch.randn(24, device=DEVICE).bfloat16(),
        packed.to_a_word, packed.is_signed, 32, packed.fp8_max, packed.smallest_scale,
    )  # fmt: skip
    assert set(torch.library.opcheck(launch.linear, arguments).values()) == {"SUCCESS"}


def test_linears_of_one_input_share_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits as alone, one call for all; the module's weights are those of its own rows."""

    monkeypatch.setattr(backend, "refuses", lambda *_: None)
    monkeypatch.setattr(dispatch, "BACKENDS", (backend, reference))
    weights = [weight_of(rows, 96, Scheme(HOPPER, 32)) for rows in (128, 256, 24)]
    alone, together = ([QuantizedLinear(weight, None) for weight in weights] for _ in range(2))
    assert alone[0].backend is backend and share_call(together)
    calls: list[int] = []
    original = backend.linear
    monkeypatch.setattr(backend, "linear", lambda *given: calls.append(1) or original(*given))
    x = torch.randn(1, 2, 96, generator=torch.Generator().manual_seed(0)).to(DEVICE, torch.bfloat16)
    with torch.no_grad():
        meant, calls[:] = [layer(x) for layer in alone], []
        assert all(torch.equal(together[i](x), meant[i]) for i in (1, 0, 2)) and len(calls) == 1
    for layer, weight in zip(together, weights, strict=True):
        assert torch.equal(layer.dequantize(), fp8_values(weight) * weight.outer_scale[:, None])
    assert not share_call([QuantizedLinear(weight_of(rows, 96, Scheme(HOPPER, 32)), None) for rows in (24, 128)])


def test_a_trial_finds_what_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong weights, activations or products, and whatever fails, are a sentence; the kernels as they are pass."""
    if DEVICE.type == "cpu":
        for name, less in (("_TOKENS", (3,)), ("_ROWS", 16), ("_COLUMNS", 160), ("_ODD_COLUMNS", 96)):
            monkeypatch.setattr(trial, name, less)
    assert trial.fault.__wrapped__(64, DEVICE) is None
    for name, wrong, said in (
        ("linear", lambda x, *_: torch.zeros(len(x), trial._ROWS, device=DEVICE), "products of 3 tokens"),
        ("quantize", lambda x, *_: (torch.zeros_like(x), x[:, 0].float()), "FP8 activations"),
        ("write_values", lambda *_: torch.ones(trial._ROWS, trial._ODD_COLUMNS, device=DEVICE), "FP8 weights"),
    ):
        monkeypatch.setattr(launch, name, wrong)
        assert trial.fault.__wrapped__(64, DEVICE) == f"a trial on {DEVICE} gave other {said} than plain torch does"

    def fails(*_: object) -> Tensor:
        raise RuntimeError("no ptxas\nat all")

    monkeypatch.setattr(launch, "write_values", fails)
    assert trial.fault.__wrapped__(64, DEVICE) == f"a trial on {DEVICE} failed (RuntimeError: no ptxas)"
    packs, original = [1, 0], layout.pack
    monkeypatch.setattr(layout, "pack", lambda weight: original(weight)._replace(table=original(weight).table + packs.pop()))
    assert trial.fault.__wrapped__(64, DEVICE) == f"a trial on {DEVICE} gave other packed codes than plain torch does"


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each in one sentence: another device, no Triton or an old one, AMD, no GPU, an old one, groups, a failed trial."""
    scheme = Scheme(HOPPER, 128)
    assert backend.refuses(scheme, torch.device("cpu")) == "runs on NVIDIA GPUs, not on cpu"
    assert backend.refuses(Fp8Scheme(HOPPER), CUDA) == "multiplies 4-bit codes, not FP8 weights"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert backend.refuses(scheme, CUDA) == "found no NVIDIA GPU"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    said = "NVIDIA A100 does not multiply FP8: found compute capability 8.0, expected 8.9 or higher"
    assert backend.refuses(scheme, CUDA) == said
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(trial, "fault", lambda size, device: f"a trial of {size} on {device} failed" if size == 128 else None)
    assert backend.refuses(scheme, CUDA) == "a trial of 128 on cuda failed"
    assert backend.refuses(Scheme(GAUDI, 256), CUDA) is None
    assert backend.refuses(Scheme(HOPPER, 96), CUDA) == "group_size: found 96, expected 32, 64 or a multiple of 128"
    chosen, refusals = dispatch.choose(Scheme(HOPPER, 64), CUDA)
    assert chosen is backend and refusals == ["cpu: runs on a CPU, not on cuda"]
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert "another FP8 (FNUZ)" in str(backend.refuses(scheme, CUDA))
    monkeypatch.setattr(backend, "version", lambda _: "3.5.1")
    assert backend.refuses(scheme, CUDA) == "found triton 3.5.1, expected 3.6 or newer"
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda _: None)
    assert "is not installed" in str(backend.refuses(scheme, CUDA))


def test_triton_is_imported_only_where_it_runs() -> None:
    """Few files import Triton or what does, and nobody imports those but inside a function: duotone works without it."""
    root = Path(duotone.__file__).parent
    names = {path: ".".join(path.relative_to(root.parent).with_suffix("").parts) for path in root.rglob("*.py")}
    needing = {names[path] for path in names if re.search(r"^import triton", path.read_text(), re.M)}
    kernels = ("kernels", "grouped_kernels", "row_kernels", "solver_kernels", "launch", "solver")
    assert needing == {f"duotone.kernels.gpu.{name}" for name in kernels}
    needing |= {f"duotone.kernels.gpu.{name}" for name in ("grouped", "rows", "trial")} | {"duotone.solver.trial"}
    for path, name in names.items():
        if name not in needing:
            at_once = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.ImportFrom)]
            assert not {f"{node.module}.{alias.name}" for node in at_once for alias in node.names} & needing, path


def test_a_whole_model(monkeypatch: pytest.MonkeyPatch, tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    """Loaded on these kernels, its linears sharing calls, a model answers as on plain torch but for roundings."""
    duotone.quantize(
        tiny_model("llama", num_hidden_layers=1, num_key_value_heads=4), tmp_path / "out", method="rtn", device="cpu"
    )
    logits: list[Tensor] = []
    for chosen in (backend, reference):
        monkeypatch.setattr(backend, "refuses", lambda *_: None)
        monkeypatch.setattr(dispatch, "BACKENDS", (chosen,))
        model = load(tmp_path / "out", device=DEVICE.type, shortcuts=False)
        linears = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
        assert linears and all(linear.backend is chosen for linear in linears)
        assert sum(linear._shared is not None for linear in linears) == (5 if chosen is backend else 0)
        with torch.no_grad():
            logits.append(model(torch.arange(5, device=DEVICE)[None]).logits.float())
    assert torch.allclose(*logits, atol=0.02 * float(logits[1].abs().max()))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model_type", "sizes"),
    [("llama", {}), ("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128})],
)
def test_a_whole_model_compiles(
    model_type: str, sizes: dict[str, int], monkeypatch: pytest.MonkeyPatch, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    """torch's own compiler takes prompt and steps of a model with a static cache as one graph each, and says the same."""
    folder = tiny_model(model_type, num_hidden_layers=1, num_key_value_heads=4, **sizes)
    duotone.quantize(folder, tmp_path / "out", method="rtn", device="cpu")
    monkeypatch.setattr(backend, "refuses", lambda *_: None)
    monkeypatch.setattr(dispatch, "BACKENDS", (backend,))
    # Experts as one; but for a decoder that has ops of the CPU's on one.
    model = load(tmp_path / "out", device=DEVICE.type, shortcuts=model_type != "llama")

    def told(forward: Any) -> list[Tensor]:
        cache = StaticCache(config=model.config, max_cache_len=16)
        tokens = torch.arange(7, device=DEVICE)[None]
        with torch.no_grad():
            return [forward(part, past_key_values=cache).logits.float() for part in tokens.split((5, 1, 1), 1)]

    for found, meant in zip(told(torch.compile(model, fullgraph=True)), told(model), strict=True):
        assert torch.allclose(found, meant, atol=0.05 * float(meant.abs().max()))
