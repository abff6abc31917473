"""A decoder's ops, against what transformers' small ops and our linears give, and against float64."""

from dataclasses import dataclass, field, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from duotone.contract import dequantize_kv, quantize_kv
from duotone.kernels import cpu, native
from duotone.qweight import QuantizedWeight
from duotone.scheme import GAUDI, HOPPER, Scheme, Target
from tests.kernels.test_reference import make_weight

pytestmark = pytest.mark.skipif(not native.available(), reason=f"compiled ops: {native.unavailable()}")


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


@given(rows=st.integers(1, 5), size=st.integers(1, 300), scale=st.sampled_from([1e-3, 1.0, 300.0]))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_rms_norm(rows: int, size: int, scale: float) -> None:
    """Any width and size of values: transformers' norm but for the last bit, which the order of a sum may turn."""
    x, norm = draw(size, rows, 2, size) * scale, LlamaRMSNorm(size, eps=1e-5).bfloat16()
    norm.weight.data = draw(rows, size)
    with torch.no_grad():
        found, meant = torch.ops.duotone.rms_norm(x, norm.weight.data, 1e-5), norm(x)
    assert found.shape == x.shape and found.dtype == torch.bfloat16
    assert bool(((found.float() - meant.float()).abs() <= meant.float().abs() * 2.0**-6 + 1e-30).all())
    assert float((found != meant).float().mean()) < 0.05


@given(rows=st.integers(1, 3), size=st.integers(1, 200), scale=st.sampled_from([1e-3, 1.0, 30.0, 1e4]))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_gates(rows: int, size: int, scale: float) -> None:
    """torch's silu times the other, far out too; one value in a hundred may round the other way."""
    gate, up = draw(rows, rows, size) * scale, draw(size, rows, size)
    found, meant = torch.ops.duotone.silu_multiply(gate, up), torch.nn.functional.silu(gate) * up
    off = (found.float() - meant.float()).abs()
    assert found.shape == gate.shape and bool((off <= meant.float().abs() * 2.0**-6 + 1e-30).all())
    assert int((off > 1e-30).sum()) <= 0.02 * off.numel() + 1


@given(rows=st.integers(1, 150), columns=st.integers(1, 200), tokens=st.integers(1, 4))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_dense(rows: int, columns: int, tokens: int) -> None:
    """A BF16 product of any shape, rounded once: within a float32 sum's error of float64, and alone as beside others."""
    x, weight = draw(rows, tokens, 1, columns), draw(columns, rows, columns)
    found = torch.ops.duotone.dense(x, weight)
    exact, sizes = x.double() @ weight.double().T, x.double().abs() @ weight.double().abs().T
    assert found.shape == (tokens, 1, rows) and found.dtype == torch.bfloat16
    assert bool(((found.double() - exact).abs() <= exact.abs() * 2.0**-8 + sizes * 1e-6).all())
    assert torch.equal(torch.cat([torch.ops.duotone.dense(x[i : i + 1], weight) for i in range(tokens)]), found)


@dataclass
class Layer:
    """A random layer and what comes into it."""

    batch: int = 1
    heads: int = 2
    queries: int = 2
    size: int = 16
    inner: int = 96
    length: int = 0
    room: int = 3
    hidden: int = 64
    target: Target = HOPPER
    symmetric: bool = True
    biased: bool = False
    head_norms: bool = False
    shared_position: bool = True
    spread: float = 1.0
    fp8: bool = False
    weights: list[cpu.Packed] = field(init=False)
    biases: list[Tensor | None] = field(init=False)

    def __post_init__(self) -> None:
        wide = self.heads * self.queries * self.size
        kv, hidden = self.heads * self.size, self.hidden
        shapes = (((wide, hidden), (kv, hidden), (kv, hidden)), ((hidden, wide),), ((self.inner, hidden),) * 2,
                  ((hidden, self.inner),))  # fmt: skip
        weights = [[self._weight(i * 3 + j, *shape) for j, shape in enumerate(group)] for i, group in enumerate(shapes)]
        packed = [[cpu.prepack(weight) for weight in group] for group in weights]
        if not all(cpu.can_merge(group) for group in packed):  # half a block of the widest layout
            path = [name for name in cpu.paths() if name != "avx512vbmi"][-1]
            packed = [[cpu.prepack(weight, path) for weight in group] for group in weights]
        self.weights = [cpu.merge(group) if len(group) > 1 else group[0] for group in packed]
        rows = [len(weight.outer_scale) for group in packed for weight in group]
        some = (0, 1, 2, 3, 6)  # as in Qwen 2, and two more
        self.biases = [draw(i, count) if self.biased and i in some else None for i, count in enumerate(rows)]
        norms = [hidden, hidden] + [self.size] * 2 * self.head_norms
        self.norms = [draw(50 + i, count) for i, count in enumerate(norms)]
        self.x = draw(60, self.batch, 1, hidden) * self.spread
        positions = 1 if self.shared_position else self.batch
        angle = torch.rand(positions, self.size // 2, generator=torch.Generator().manual_seed(1)).repeat(1, 2) * 6
        self.cosine, self.sine = angle.cos().bfloat16()[:, None], angle.sin().bfloat16()[:, None]
        self.keys, self.values = (draw(i, self.batch, self.heads, self.length + self.room, self.size) for i in (70, 71))
        self.scales = [(draw(72 + i, self.heads).abs() / 64 + 2.0**-8).float() for i in range(2)] if self.fp8 else []
        if self.fp8:
            kept = (self.keys, self.values)
            self.keys, self.values = (quantize_kv(x, scale, self.target) for x, scale in zip(kept, self.scales, strict=True))
        self.eps = [1e-5, 1e-6, 1e-3, 1e-4][: len(norms)]

    def _weight(self, seed: int, rows: int, columns: int) -> QuantizedWeight:
        weight = make_weight(rows, columns, Scheme(self.target, 32, self.symmetric), 2.0**-5)
        generator = torch.Generator().manual_seed(seed)
        codes = torch.randint(0, 16, (rows, columns), generator=generator, dtype=torch.uint8)
        return replace(weight, codes=codes)

    def op(self, **changes: object) -> Tensor:
        """What the op gives; keys and values get another token each."""
        none = draw(0, 0)
        first = self.weights[0]
        given: dict[str, object] = {
            "x": self.x,
            "cosine": self.cosine,
            "sine": self.sine,
            "keys": [self.keys],
            "values": [self.values],
            "kv_scales": self.scales,
            "length": self.length,
            "norms": self.norms,
            "weights": [
                t for w in self.weights
                for t in (w.codes, w.index, w.table, w.outer_scale, none if w.input_scale is None else w.input_scale)
            ],
            "biases": [none if bias is None else bias for bias in self.biases],
            "facts": [fact for w in self.weights for fact in (w.in_features, w.group_size, w.bias)],
            "eps": self.eps,
            "scale": self.size**-0.5,
            "fp8_max": first.fp8_max,
            "smallest_scale": first.smallest_scale,
            "path": first.path,
        }  # fmt: skip
        return torch.ops.duotone.decoder_layers(*(given | changes).values())

    def meant(self) -> tuple[Tensor, Tensor, Tensor]:
        """Its output and the new keys and values, by our linears, norms and gates and transformers' rotation, one by one."""
        rms_norm, batch = torch.ops.duotone.rms_norm, self.batch
        normed = rms_norm(self.x, self.norms[0], self.eps[0])
        query, key, value = (y + b if b is not None else y for y, b in zip(
            cpu.linears(normed, self.weights[0]), self.biases[:3], strict=True))  # fmt: skip
        query, key, value = (y.view(batch, 1, -1, self.size) for y in (query, key, value))
        if self.head_norms:
            query, key = rms_norm(query, self.norms[2], self.eps[2]), rms_norm(key, self.norms[3], self.eps[3])
        query, key = apply_rotary_pos_emb(query.transpose(1, 2), key.transpose(1, 2), self.cosine, self.sine)
        value = value.transpose(1, 2)
        if self.fp8:
            key, value = (quantize_kv(x, scale, self.target) for x, scale in zip((key, value), self.scales, strict=True))
        keys = torch.cat((self.keys[:, :, : self.length], key), 2)
        values = torch.cat((self.values[:, :, : self.length], value), 2)
        if self.fp8:
            every = zip((keys, values), self.scales, strict=True)
            keys, values = (dequantize_kv(x, scale, torch.bfloat16) for x, scale in every)
        grouped = query.double().view(batch, self.heads, self.queries, self.size)
        scores = torch.softmax(grouped @ keys.double().transpose(2, 3) * self.size**-0.5, -1)
        attended = (scores @ values.double()).bfloat16().view(batch, 1, -1)
        hidden = self.x + cpu.linear(attended, self.weights[1], self.biases[3])
        gate, up = cpu.linears(rms_norm(hidden, self.norms[1], self.eps[1]), self.weights[2])
        gated = torch.ops.duotone.silu_multiply(gate, up)
        return hidden + cpu.linear(gated, self.weights[3], self.biases[6]), key, value


LAYERS = {
    "batch": st.integers(1, 6),
    "heads": st.integers(1, 3),
    "queries": st.integers(1, 3),
    "size": st.sampled_from([8, 24, 32]),
    "inner": st.sampled_from([32, 96, 200, 4200]),
    "target": st.sampled_from([HOPPER, GAUDI]),
    "symmetric": st.booleans(),
    "biased": st.booleans(),
    "head_norms": st.booleans(),
    "shared_position": st.booleans(),
    "fp8": st.booleans(),
}


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Of BF16 or FP8, the sign of a zero too."""
    kind = torch.uint8 if one.element_size() == 1 else torch.int16
    return one.dtype == other.dtype and torch.equal(one.contiguous().view(kind), other.contiguous().view(kind))


@pytest.mark.parametrize("target", [HOPPER, GAUDI], ids=lambda target: target.name)
@pytest.mark.parametrize("scale", [1.0, 0.0123])
def test_every_value_is_kept_as_the_contract_rounds_it(target: Target, scale: float) -> None:
    """All BF16 values as values of a token, infinities and NaN too: without an input a linear gives its bias."""
    layer = Layer(heads=64, queries=1, size=64, hidden=32, fp8=True, target=target, biased=True)
    layer.scales = [torch.full((64,), scale)] * 2
    every = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
    for some in every.split(4096):
        layer.biases[0] = layer.biases[1] = torch.zeros(4096, dtype=torch.bfloat16)
        layer.biases[2] = some + 0  # as the linear adds it: without negative zeros
        y = layer.op(x=torch.zeros_like(layer.x))
        found, meant = layer.values[0, :, 0], quantize_kv(layer.biases[2].view(1, 64, 1, 64), layer.scales[1], target)[0, :, 0]
        nan = meant.float().isnan()
        assert torch.equal(found.view(torch.uint8)[~nan], meant.view(torch.uint8)[~nan]) and bool(
            found[nan].float().isnan().all()
        )
        assert bool(y.isfinite().all()) != bool(nan.any())


@given(st.builds(Layer, **LAYERS))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_a_layer_is_its_parts(layer: Layer) -> None:
    """Bit for bit where attention has one token to look at: any shapes, biases, norms, schemes, positions."""
    meant, key, value = layer.meant()
    assert torch.equal(layer.op(), meant)
    assert same_bits(layer.keys[:, :, :1], key) and same_bits(layer.values[:, :, :1], value)


@given(st.builds(Layer, **LAYERS, length=st.integers(1, 70), spread=st.sampled_from([0.1, 1.0, 100.0])))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_a_layer_attends_to_all_tokens(layer: Layer) -> None:
    """As float64 attends, up to what the rounding of one value in BF16 does to the FP8 grid behind it."""
    meant, key, value = layer.meant()
    before = layer.keys.clone(), layer.values.clone()
    found, at = layer.op(), layer.length
    step = (meant - layer.x).double()
    assert float((found - meant).double().norm()) <= 0.02 * float(step.norm() + layer.x.double().norm() * 2.0**-8)
    assert same_bits(layer.keys[:, :, at : at + 1], key) and same_bits(layer.values[:, :, at : at + 1], value)
    for now, then in zip((layer.keys, layer.values), before, strict=True):  # and nothing else was written
        assert same_bits(now[:, :, :at], then[:, :, :at]) and same_bits(now[:, :, at + 1 :], then[:, :, at + 1 :])


def test_a_token_gets_the_same_alone_and_in_a_batch() -> None:
    """Bit for bit, on one thread and on two, and for scores that would overflow an exponential."""
    layer = Layer(batch=5, length=40, hidden=128, inner=4200, spread=1000.0, shared_position=False)
    layer.norms[0] *= 100
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        whole = layer.op()
        torch.set_num_threads(1)
        rows = [slice(i, i + 1) for i in range(5)]
        alone = [
            layer.op(x=layer.x[i], cosine=layer.cosine[i], sine=layer.sine[i], keys=[layer.keys[i]], values=[layer.values[i]])
            for i in rows
        ]
    finally:
        torch.set_num_threads(before)
    assert torch.equal(whole, torch.cat(alone)) and bool(whole.isfinite().all())


BAD = {
    "norm's weight": (lambda: torch.ops.duotone.rms_norm(draw(0, 2, 8), draw(0, 7), 1e-5), "x: expected shape"),
    "norm in float32": (lambda: torch.ops.duotone.rms_norm(torch.ones(2, 8), draw(0, 8), 1e-5), "x: found another type"),
    "gate": (lambda: torch.ops.duotone.silu_multiply(draw(0, 2, 8), draw(0, 2, 7)), "up: found another size"),
    "dense": (lambda: torch.ops.duotone.dense(draw(0, 2, 8), draw(0, 2, 7)), "x: expected shape"),
    "dense in float32": (lambda: torch.ops.duotone.dense(draw(0, 2, 8).float(), draw(0, 2, 8)), "x: found another type"),
    "two tokens": (lambda: Layer().op(x=draw(0, 1, 2, 64)), "x: expected shape"),
    "no room": (lambda: Layer(room=0).op(), "length: found no room"),
    "before the room": (lambda: Layer().op(length=-1), "length: found no room"),
    "values": (lambda: Layer().op(values=[draw(0, 1, 2, 2, 16)]), "values: found another shape"),
    "keys of others": (lambda: Layer().op(keys=[draw(0, 2, 2, 3, 16)]), "keys: expected shape"),
    "keys in float32": (lambda: Layer().op(keys=[torch.zeros(1, 2, 3, 16)]), "keys: found another type"),
    "scales of others": (lambda: Layer(fp8=True).op(kv_scales=[torch.ones(3)] * 2), "kv_scales: found another shape"),
    "a scale missing": (lambda: Layer(fp8=True).op(kv_scales=[torch.ones(2)]), "kv_scales: expected two a layer"),
    "FP8 without scales": (lambda: Layer(fp8=True).op(kv_scales=[]), "keys: found another type"),
    "scales without FP8": (lambda: Layer().op(kv_scales=[torch.ones(2)] * 2), "keys: found another type"),
    "keys apart": (lambda: Layer().op(keys=[draw(0, 1, 2, 4, 16)[:, :, :3]]), "keys: expected a contiguous"),
    "positions": (lambda: Layer(batch=3).op(cosine=draw(0, 2, 1, 16)), "cosine: expected an even row"),
    "sine": (lambda: Layer().op(sine=draw(0, 1, 1, 8)), "sine: found another shape"),
    "a norm's size": (lambda: Layer().op(norms=[draw(0, 64), draw(0, 63)]), "norms: found another shape"),
    "three norms": (lambda: Layer().op(norms=[draw(0, 64)] * 3), "norms: expected two or four"),
    "a weight": (lambda: Layer().op(weights=[]), "weights: expected those of four"),
    "biases": (lambda: Layer().op(biases=[draw(0, 3), *[draw(0, 0)] * 6]), "biases: expected as many"),
    "heads": (lambda: Layer().op(keys=[draw(0, 1, 3, 3, 16)], values=[draw(0, 1, 3, 3, 16)]), "weights: found sizes"),
    "columns": (lambda: Layer().op(x=draw(0, 1, 1, 32), norms=[draw(0, 32)] * 2), "weights: found sizes"),
}  # fmt: skip


@pytest.mark.parametrize("call", BAD.values(), ids=BAD.keys())
def test_wrong_shapes_are_errors(call: tuple) -> None:
    """Nothing is read that is not there."""
    with pytest.raises(RuntimeError, match=call[1]):
        call[0]()
