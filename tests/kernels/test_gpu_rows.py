"""Norms that are quantized at once and the FP8 cache, in Triton: against the contract, and where a model runs them.

Like test_gpu.py through Triton's interpreter where there is no GPU.
"""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

import duotone
from duotone.contract import dequantize_kv, quantize_activations, quantize_kv
from duotone.errors import DuotoneError
from duotone.explanation import _cache
from duotone.kernels import dispatch, reference
from duotone.kernels.gpu import backend, cache, fp8
from duotone.models.text import LLAMA
from duotone.qweight import Fp8Weight
from duotone.runtime import cache as held
from duotone.runtime import decoder, kv_cache, norms
from duotone.runtime.linear import QuantizedLinear, share_call
from duotone.runtime.load import load
from duotone.scheme import GAUDI, HOPPER, Fp8Scheme, Scheme, Target
from tests.kernels.test_gpu import CUDA, DEVICE, quantized, same_bits, weight_of

pytest.importorskip("triton", reason="needs the package triton (the dev extra brings it on Linux)")

from duotone.kernels.gpu import launch, rows

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

EPSILON = 1e-5
NORMS = LLAMA.residual.norms if LLAMA.residual is not None else ()


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def integers(*shape: int) -> Tensor:
    """Their squares' sums are exact in any order."""
    return torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(0)).float()


def norm_of(size: int, dtype: torch.dtype, kind: Any = LlamaRMSNorm) -> Any:
    norm = kind(size, eps=EPSILON).to(dtype)
    norm.weight.data = (draw(size, size) + 1).to(dtype)
    return norm.requires_grad_(False)


def normed(x: Tensor, weight: Tensor, target: Target, static: Tensor | None, epsilon: float = EPSILON) -> tuple[Tensor, Tensor]:
    there = None if static is None else static.to(DEVICE)
    facts = -(-x.shape[1] // 128), there, target.fp8.max, target.smallest_activation_scale
    x8, scales = rows.norm_and_quantize(x.to(DEVICE), weight.to(DEVICE), epsilon, *facts)
    assert not x8[:, x.shape[1] :].float().any() and x8.shape[1] % 128 == 0
    return x8[:, : x.shape[1]].float().cpu(), scales.cpu()[:, None]


def static_of(target: Target) -> Tensor | None:
    return None if target.dynamic_activations else torch.tensor(0.25)


@pytest.mark.parametrize("size", [1, 127, 300, 1000])
@pytest.mark.parametrize(
    ("target", "dtype"),
    [(HOPPER, torch.bfloat16), (HOPPER, torch.float16), (HOPPER, torch.float32), (GAUDI, torch.bfloat16)],
)
def test_norms_bit_for_bit_on_exact_sums(size: int, target: Target, dtype: torch.dtype) -> None:
    """What transformers' norm and then the contract give, where no order of a sum shows; rows of zeros, NaN and infinity."""
    x, norm, static = integers(5, size), norm_of(size, dtype), static_of(target)
    x[1], x[2, size // 2], x[3, 0], x[4, -1] = 0, torch.nan, torch.inf, -torch.inf
    x8, scales = normed(x.to(dtype), norm.weight, target, static)
    meant, scale = quantize_activations(norm(x.to(dtype)), target, static)
    assert same_bits(x8, meant) and same_bits(scales, scale.expand(5, 1))
    assert bool(meant[2:].isnan().any(-1).all())


def test_a_norm_of_next_to_nothing() -> None:
    """Squares that are zero and no epsilon: infinities of the row, not the NaN that is made of what lies after it."""
    x, norm = torch.full((1, 100), 1e-30).bfloat16(), LlamaRMSNorm(100, eps=0.0).bfloat16().requires_grad_(False)
    x8, scale = normed(x, norm.weight, HOPPER, None, 0.0)
    meant, its = quantize_activations(norm(x), HOPPER)
    assert torch.equal(scale, its) and its.isinf().all() and same_bits(x8, meant)


@pytest.mark.parametrize("target", [HOPPER, GAUDI], ids=lambda target: target.name)
@pytest.mark.parametrize(("size", "spread"), [(300, 1.0), (1000, 300.0), (257, 1e-3)])
def test_norms_of_any_values(target: Target, size: int, spread: float) -> None:
    """Each row is, to the bit, what plain torch makes of it with an inverse root that is float32's nearest but for a few ulps.

    That root is all that a sum in another order can change.
    """
    x, norm, static = (draw(size, 6, size) * spread).bfloat16(), norm_of(size, torch.bfloat16), static_of(target)
    x8, scales = normed(x, norm.weight, target, static)
    root = (1 / (x.double().square().mean(-1, keepdim=True) + EPSILON).sqrt()).float()
    agrees = torch.zeros(6, dtype=torch.bool)
    for ulps in range(-4, 5):
        shifted = (root.view(torch.int32) + ulps).view(torch.float32)
        meant, scale = quantize_activations(norm.weight * (x.float() * shifted).bfloat16(), target, static)
        agrees |= (x8 == meant).all(-1) & (scales == scale).all(-1)
    assert bool(agrees.all())


@pytest.mark.parametrize("columns", [1, 127, 129, 1021, 4097])
def test_static_activations_of_every_value(columns: int) -> None:
    """All of BF16 in rows that no block divides, by large and small powers of two: NaN stays, infinity saturates at 240."""
    every = torch.arange(2**16).to(torch.int16).view(torch.bfloat16)
    x = every[-(2**16 // columns if columns == 1021 else 7) * columns :].view(-1, columns)
    for static in (torch.tensor(2.0**-30), torch.tensor(0.125), torch.tensor(2.0**12)):
        x8, scales = quantized(x, GAUDI, static.to(DEVICE))
        meant, _ = quantize_activations(x, GAUDI, static)
        assert same_bits(x8[:, :columns].float(), meant) and bool((scales == static).all())
        assert torch.equal(x8[:, :columns].float().isnan(), x.isnan()) and float(meant.nan_to_num().abs().max()) <= 240


@pytest.mark.parametrize("target", [HOPPER, GAUDI], ids=lambda target: target.name)
def test_rows_that_no_program_holds(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are read twice, piece by piece; the largest value may be in any piece, and so may NaN and infinity."""
    monkeypatch.setattr(rows, "_WHOLE_ROW", 128)
    x = draw(8, 6, 300).bfloat16()
    x[0, 299], x[1, 130], x[2, 0], x[3, 128], x[4, 299] = 100, -100, 100, torch.nan, -torch.inf
    static = static_of(target)
    x8, scales = quantized(x, target, static)
    meant, scale = quantize_activations(x, target, static)
    assert same_bits(x8[:, :300].float(), meant) and same_bits(scales[:, None], scale.expand(6, 1))
    assert not x8[:, 300:].float().any()


def fp8_weight(rows: int, columns: int) -> Fp8Weight:
    values, outer = draw(6, rows, columns).clamp(-4, 4).to(torch.float8_e4m3fn), draw(7, rows).abs() + 0.1
    return Fp8Weight(values.to(DEVICE), outer.bfloat16().float().to(DEVICE), Fp8Scheme(HOPPER))


@pytest.mark.parametrize(
    ("kind", "columns"), [("hopper", 100), ("gaudi", 100), ("FP8 weights", 100), ("hopper", 1100), ("gaudi", 1100)]
)
def test_a_linear_that_norms(kind: str, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bits of norm and linear apart; in the dtype that a model is cast to; without tokens; K split where it is long."""
    monkeypatch.setattr(launch, "_ADDING", 0.0)
    place, weight = backend, weight_of(24, columns, Scheme(GAUDI if kind == "gaudi" else HOPPER, 32))
    if kind == "FP8 weights":
        place, weight = fp8, fp8_weight(24, columns)
    packed, norm, x = place.prepack(weight), norm_of(columns, torch.bfloat16), integers(2, 3, columns)
    both = place.with_norm(packed, norm.weight.to(DEVICE), EPSILON)
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        kept = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
        meant = place.linear(copy.deepcopy(norm).to(kept)(x.to(kept)).to(DEVICE), packed)
        assert torch.equal(place.linear(x.to(DEVICE, dtype), both), meant.to(dtype))
    assert place.linear(x[:0].to(DEVICE, torch.bfloat16), both).shape == (0, 3, 24)


class Block(nn.Module):
    """A norm and who reads it, as Llama's table has them."""

    def __init__(self, norm: Any, readers: dict[str, nn.Module]) -> None:
        super().__init__()
        self.post_attention_layernorm, self.mlp = norm, nn.ModuleDict(readers)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = self.post_attention_layernorm(x)
        return tuple(reader(x) for reader in self.mlp.values())


@pytest.fixture
def readers(monkeypatch: pytest.MonkeyPatch) -> Callable[[], dict[str, nn.Module]]:
    monkeypatch.setattr(backend, "refuses", lambda scheme, _: "no" if isinstance(scheme, Fp8Scheme) else None)
    monkeypatch.setattr(fp8, "refuses", lambda *_: None)
    monkeypatch.setattr(dispatch, "BACKENDS", (backend, fp8, reference))
    weights = [weight_of(rows, 96, Scheme(HOPPER, 32)) for rows in (128, 24)]
    return lambda: {name: QuantizedLinear(weight, None) for name, weight in zip(("gate_proj", "up_proj"), weights, strict=True)}


def test_readers_take_their_norm(readers: Callable[[], dict[str, nn.Module]]) -> None:
    """Alone and as a shared call, copied, cast, compiled: the bits of before; a changed weight is seen."""
    x, norm = integers(3, 96).bfloat16(), norm_of(96, torch.bfloat16)
    meant = [reader(norm(x).to(DEVICE)) for reader in readers().values()]
    x = x.to(DEVICE)
    for shared in (False, True):
        block = Block(copy.deepcopy(norm).to(DEVICE), readers())
        assert not shared or share_call(list(block.mlp.values()))
        assert norms.install(nn.ModuleList([block]), NORMS[1:], torch.bfloat16) == 1
        assert block.post_attention_layernorm(x) is x
        for run in (block, copy.deepcopy(block)):
            assert all(map(torch.equal, run(x), meant))
    assert all(map(torch.equal, torch.compile(block, fullgraph=True, backend="aot_eager")(x), meant))
    assert all(str(reader).endswith(", norms its input)") for reader in block.mlp.values())
    block.post_attention_layernorm.weight.zero_()
    assert not any(bool(y.any()) for y in block(x))
    assert {name for name, _ in block.named_parameters()} == {"post_attention_layernorm.weight"}


def test_readers_of_two_precisions_take_it(readers: Callable[[], dict[str, nn.Module]]) -> None:
    """A linear with FP8 weights beside one of 4-bit codes: each norms what it is given."""
    x, norm = integers(3, 96).bfloat16(), norm_of(96, torch.bfloat16)
    mixed = lambda: readers() | {"up_proj": QuantizedLinear(fp8_weight(24, 96), None)}  # noqa: E731
    meant = [reader(norm(x).to(DEVICE)) for reader in mixed().values()]
    block = Block(norm.to(DEVICE), mixed())
    assert norms.install(nn.ModuleList([block]), NORMS[1:], torch.bfloat16) == 1
    assert all(map(torch.equal, block(x.to(DEVICE)), meant))


@pytest.mark.parametrize("kind", [Gemma2RMSNorm, Olmo2RMSNorm, nn.LayerNorm], ids=lambda kind: kind.__name__)
def test_norms_of_another_kind_stay(kind: Any, readers: Callable[[], dict[str, nn.Module]]) -> None:
    """1 + w, a product rounded once, no epsilon of that name: told, and the block computes what it did."""
    norm = norm_of(96, torch.bfloat16, kind).to(DEVICE)
    if kind is Gemma2RMSNorm:
        norm.variance_epsilon = norm.eps
    block = Block(norm, readers())
    x = draw(0, 2, 96).bfloat16().to(DEVICE)
    meant = block(x)
    told = r"^1 norms stay in plain torch, first post_attention_layernorm: (a trial on|found LayerNorm)"
    with pytest.warns(UserWarning, match=told):
        assert not norms.install(nn.ModuleList([block]), NORMS[1:], torch.bfloat16)
    assert all(map(torch.equal, block(x), meant))


def test_norms_that_others_read_stay(readers: Callable[[], dict[str, nn.Module]]) -> None:
    """A BF16 linear beside a quantized one, one on another kernel: nothing changes, and there is nothing to warn of."""
    norm = norm_of(96, torch.bfloat16)
    mixed = readers() | {"up_proj": nn.Linear(96, 24).bfloat16()}
    elsewhere = readers()
    elsewhere["up_proj"]._backend = reference.__name__  # type: ignore[assignment]
    with warnings.catch_warnings(action="error"):
        for held in (mixed, elsewhere):
            assert not norms.install(nn.ModuleList([Block(norm, held)]), NORMS[1:], torch.bfloat16)
    faults = [
        norms._fault(norm, readers()["gate_proj"], torch.float32),  # type: ignore[arg-type]
        norms._fault(norm_of(2**14 + 1, torch.bfloat16), readers()["gate_proj"], torch.bfloat16),  # type: ignore[arg-type]
    ]
    assert faults[0] == "found a weight in torch.bfloat16, expected the model's torch.float32, and that BF16, FP16 or float32"
    assert faults[1] == "found 16385 columns, expected 16384 or fewer"


def test_a_model_whose_linears_norm(monkeypatch: pytest.MonkeyPatch, tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    """Loaded where the kernels run, all norms of the block are its linears'; with `shortcuts=False` none; logits are near."""
    duotone.quantize(
        tiny_model("llama", num_hidden_layers=1, num_key_value_heads=4), tmp_path / "out", method="rtn", device="cpu"
    )
    monkeypatch.setattr(backend, "refuses", lambda *_: None)
    monkeypatch.setattr(dispatch, "BACKENDS", (backend, reference))
    monkeypatch.setattr(decoder, "install", lambda *_: None)  # a CPU's, for its own linears
    logits: list[Tensor] = []
    for shortcuts in (True, False):
        model: Any = load(tmp_path / "out", device=DEVICE.type, shortcuts=shortcuts)
        taken = [hasattr(norm.forward, "func") for layer in model.model.layers for norm in (layer.input_layernorm,)]
        assert taken == [shortcuts]
        with torch.no_grad():
            logits.append(model(torch.arange(5, device=DEVICE)[None]).logits.float())
    assert torch.allclose(*logits, atol=0.02 * float(logits[1].abs().max()))


# The FP8 cache.


def scales_of(heads: int) -> tuple[Tensor, Tensor]:
    return (draw(1, heads).abs() + 0.01).to(DEVICE), (draw(2, heads).abs() + 0.01).to(DEVICE)


def equal_bytes(found: Tensor, meant: Tensor) -> bool:
    return same_bits(found.float().cpu(), meant.float().cpu())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("batch", "tokens", "size", "inner"), [(1, 1, 128, 128), (2, 5, 48, 40), (1, 17, 65, 1)])
def test_cache_bit_for_bit(dtype: torch.dtype, batch: int, tokens: int, size: int, inner: int) -> None:
    """Keys and values of other sizes, strides as projections leave them, at positions and at once, read from the middle."""
    keys = (draw(3, batch, tokens, 2, size) * 9).to(DEVICE, dtype).transpose(1, 2)
    wide = (draw(4, batch, tokens, 2 * inner + 5) * 900).to(DEVICE, dtype)
    values = wide[..., 5:].view(batch, tokens, 2, inner).transpose(1, 2)
    keys[0, 0, 0, 0], values[0, 0, 0, 0], values[-1, 1, 0, 0] = torch.nan, torch.inf, -torch.inf
    scales = scales_of(2)
    for target in (HOPPER, GAUDI):
        meant = [quantize_kv(x, scale, target) for x, scale in zip((keys, values), scales, strict=True)]
        assert all(map(equal_bytes, cache.quantize((keys, values), scales, target.fp8.max), meant))
        kept = [torch.zeros(batch, 2, tokens + 9, x.shape[-1], device=DEVICE).to(torch.float8_e4m3fn) for x in (keys, values)]
        positions = torch.randperm(tokens + 9, generator=torch.Generator().manual_seed(0))[:tokens].to(DEVICE)
        cache.write((keys, values), kept, scales, target.fp8.max, positions)
        for x8, its in zip(kept, meant, strict=True):
            assert equal_bytes(x8[:, :, positions], its)
            assert int(x8.view(torch.uint8).count_nonzero()) == int(its.contiguous().view(torch.uint8).count_nonzero())
        inside = [x8[:, :, 1:-1] for x8 in kept]
        wide = [dequantize_kv(x8, scale, dtype) for x8, scale in zip(inside, scales, strict=True)]
        found = cache.read(inside, scales, dtype)
        assert all(map(equal_bytes, found, wide)) and all(x.dtype == dtype and x.is_contiguous() for x in found)


def test_every_value_goes_through_the_cache() -> None:
    """All of BF16 is written, all bytes are read: the trial that runs before the first one on a device."""
    assert cache._difference(DEVICE) is None
    every = torch.arange(256, dtype=torch.uint8, device=DEVICE).view(torch.float8_e4m3fn).view(1, 2, 8, 16)
    for dtype in backend.NATIVE:
        found, scales = cache.read((every, every), scales_of(2), dtype), scales_of(2)
        assert all(equal_bytes(x, dequantize_kv(every, scale, dtype)) for x, scale in zip(found, scales, strict=True))


@pytest.mark.skipif(DEVICE.type == "cuda", reason="for machines without a GPU: there an error ends all work on it")
@pytest.mark.parametrize("position", [-1, 4, 2**40])
def test_a_position_outside_writes_nothing(position: int) -> None:
    """Whatever lies beside the cache keeps its bytes; a compiled program stops, too (test_gpu_compiled.py)."""
    memory = [torch.zeros(1, 1, 6, 16, dtype=torch.uint8) for _ in range(2)]
    kept = [bytes_[:, :, 1:5].view(torch.float8_e4m3fn) for bytes_ in memory]
    new = [torch.ones(1, 1, 2, 16) for _ in range(2)]
    if launch.IS_COMPILED:
        with pytest.raises(RuntimeError, match="assert"):
            cache.write(new, kept, scales_of(1), 448.0, torch.tensor([position, 0]))
        assert not any(bytes_[0, 0, [0, 2, 3, 4, 5]].any() for bytes_ in memory)
        return
    cache.write(new, kept, scales_of(1), 448.0, torch.tensor([position, 0]))
    assert all(bytes_[0, 0].any(-1).tolist() == [False, True, False, False, False, False] for bytes_ in memory)


def test_the_ops_keep_their_word() -> None:
    """Schemas, shapes for compilers, what is changed in place and what is not; the linear with a norm and static scales."""
    keys, values = draw(3, 1, 2, 3, 16).bfloat16().to(DEVICE), draw(4, 1, 2, 3, 8).bfloat16().to(DEVICE)
    kept = [torch.zeros(1, 2, 5, size, dtype=torch.uint8, device=DEVICE) for size in (16, 8)]
    given = (keys, values, *kept, *scales_of(2), torch.arange(3, device=DEVICE) + 1, 448.0)
    assert set(torch.library.opcheck(rows.write_cache, given).values()) == {"SUCCESS"}
    found = torch.library.opcheck(rows.read_cache, (*kept, *scales_of(2), torch.bfloat16))
    assert set(found.values()) == {"SUCCESS"}
    packed, x = backend.prepack(weight_of(24, 64, Scheme(GAUDI, 32))), draw(5, 2, 64).bfloat16().to(DEVICE)
    given = (
        x, packed.codes, packed.index, packed.table, packed.outer_scale, packed.input_scale, None, packed.to_a_word,
        packed.is_signed, 32, packed.fp8_max, packed.smallest_scale, torch.ones(64, device=DEVICE).bfloat16(), EPSILON,
    )  # fmt: skip
    assert set(torch.library.opcheck(torch.ops.duotone.gpu_linear.default, given).values()) == {"SUCCESS"}
    bytes_ = torch.zeros(16, 128, dtype=torch.uint8, device=DEVICE)
    given = (x, bytes_, torch.ones(9, device=DEVICE), None, packed.fp8_max, packed.smallest_scale, *given[-2:])
    assert set(torch.library.opcheck(torch.ops.duotone.gpu_linear_fp8.default, given).values()) == {"SUCCESS"}


def test_a_static_cache_compiles() -> None:
    """One graph of the step of a layer: positions are the cache's own tensor, nothing waits for a value."""
    from duotone.kernels.gpu import launch  # its ops are known before

    del launch
    attention = nn.Module()
    for name, scale in zip(("k_scale", "v_scale"), scales_of(2), strict=True):
        attention.register_buffer(name, scale)
    config = load_config()
    held = [StaticCache(config=config, max_cache_len=8) for _ in range(2)]
    new = [draw(i, 1, 2, 3, 16).bfloat16().to(DEVICE) for i in range(2)]
    step = lambda store, tokens: kv_cache._Narrow(store, attention, HOPPER, DEVICE.type).update(*tokens, 0)  # noqa: E731
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for tokens in (new, [x[:, :, :1] for x in new], [x[:, :, 1:2] for x in new]):
        meant = step(held[0], tokens)
        found = step(held[1], tokens) if tokens is new else compiled(held[1], tokens)
        assert all(map(torch.equal, found, meant))
    assert int(held[1].layers[0].cumulative_length) == 5
    assert torch.equal(held[0].layers[0].keys.view(torch.uint8), held[1].layers[0].keys.view(torch.uint8))


def load_config() -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=16)


@pytest.fixture(scope="module")
def cached(tiny_model: Callable[..., Path], text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cached") / "out"
    options: dict[str, Any] = {"samples": 2, "seq_len": 16, "calibration": (str(text_file),), "kv_cache": "fp8"}
    model = tiny_model("mistral", sliding_window=None, num_hidden_layers=1)
    duotone.quantize(model, out, method="rtn", device="cpu", **options)
    return out


def test_a_model_keeps_the_same_bytes(cached: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompt, tokens, several at once, cropped, repeated; static; without a cache: logits and bytes of plain torch.

    A growing cache is written in place from its second call on: nothing is copied until its room is full.
    """
    plain = load(cached, device=DEVICE.type, shortcuts=False)
    monkeypatch.setattr(cache, "refuses", lambda _: None)
    ours = load(cached, device=DEVICE.type, shortcuts=False)
    written: list[int] = []
    original = cache.write
    monkeypatch.setattr(cache, "write", lambda new, *rest: written.append(new[0].shape[2]) or original(new, *rest))
    monkeypatch.setattr(held, "_ROOM", 5)
    prompt = torch.arange(40, 50, device=DEVICE)[None]
    with torch.no_grad():
        assert torch.equal(ours(prompt, use_cache=False).logits, plain(prompt, use_cache=False).logits) and written == [10]
        for make in (DynamicCache, lambda: StaticCache(ours.config, max_cache_len=20)):
            stores = [make(), make()]
            places: list[int] = []
            for part in (*prompt.split((4, 1, 3, 1, 1), 1), prompt[:, :7]):
                logits = [model(part, past_key_values=store).logits for model, store in zip((ours, plain), stores, strict=True)]
                assert torch.equal(*logits)
                places.append(stores[0].layers[0].keys.data_ptr())
            keys = [store.layers[0].values.contiguous().view(torch.uint8) for store in stores]
            assert torch.equal(*keys)
            if isinstance(stores[0], StaticCache):
                assert len(set(places)) == 1
                continue
            assert places[1] == places[2] == places[3], "given room once"
            for store in stores:
                store.crop(-3)
                store.batch_repeat_interleave(2)
            more = prompt[:, :2].repeat(2, 1)
            again = [model(more, past_key_values=store).logits for model, store in zip((ours, plain), stores, strict=True)]
            assert torch.equal(*again)


def test_what_the_kernels_are_not_for(cached: Path) -> None:
    """float64, another device, a gradient, a model whose device they refused: plain torch, the same call."""
    model: Any = load(cached, device=DEVICE.type, shortcuts=False)
    attention = model.model.layers[0].self_attn
    narrow, x = kv_cache._Narrow(None, attention, HOPPER, DEVICE.type), draw(0, 1, 2, 3, 32).to(DEVICE)
    assert narrow._is_home(x, x.clone()) and not narrow._is_home(x, x.half()) and not narrow._is_home(x.double(), x.double())
    assert not narrow._is_home(x, x.clone().requires_grad_()) and not narrow._is_home(x, x.to("meta"))
    assert not kv_cache._Narrow(None, attention, HOPPER, None)._is_home(x, x)
    with torch.no_grad():
        assert narrow._is_home(x, x.clone().requires_grad_())


def test_a_cache_that_places_its_tokens_itself(cached: Path) -> None:
    """A window is handed new bytes; a cache of something else is refused in one sentence, as without the kernels."""
    model: Any = load(cached, device=DEVICE.type, shortcuts=False)
    attention, config = model.model.layers[0].self_attn, copy.deepcopy(model.config)
    config.sliding_window = 4
    stores = [DynamicCache(config=config) for _ in range(2)]
    for tokens in (3, 1, 2):
        new = [draw(i, 1, 2, tokens, 32).bfloat16().to(DEVICE) for i in range(2)]
        found, meant = (
            kv_cache._Narrow(store, attention, HOPPER, home).update(*new, 0)
            for store, home in zip(stores, (DEVICE.type, None), strict=True)
        )
        assert all(map(torch.equal, found, meant)) and found[0].shape[2] == min(3, stores[0].get_seq_length() - tokens) + tokens
    begun = DynamicCache()
    begun.update(*new, 0)
    with pytest.raises(DuotoneError, match=r"^FP8 KV cache: found a DynamicCache that cannot keep FP8"):
        kv_cache._Narrow(begun, attention, HOPPER, DEVICE.type).update(*new, 0)


def test_refusals_of_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that is none, a trial that fails or differs: a sentence, which `explain` shows."""
    assert cache.refuses(torch.device("cpu")) == "runs on NVIDIA GPUs, not on cpu"
    monkeypatch.setattr(backend, "device_refuses", lambda _: None)
    original = cache.read
    monkeypatch.setattr(cache, "read", lambda *given: tuple(x + 1 for x in original(*given)))
    assert cache._fault.__wrapped__(DEVICE) == f"a trial on {DEVICE} gave other keys and values than plain torch does"
    monkeypatch.setattr(cache, "write", lambda *_: None)
    assert cache._fault.__wrapped__(DEVICE) == f"a trial on {DEVICE} gave other FP8 keys and values than plain torch does"
    scheme = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}
    for refusal, said in ((None, "Triton kernels"), ("found no NVIDIA GPU", "plain torch (triton: found no NVIDIA GPU)")):
        monkeypatch.setattr(cache, "refuses", lambda _, refusal=refusal: refusal)
        assert str(_cache({"kv_cache_scheme": scheme}, CUDA)).endswith(f"; written and read by {said}")
        assert str(_cache({"kv_cache_scheme": scheme}, torch.device("cpu"))).endswith("one for its values")
    assert _cache(None, CUDA) is None
