"""The ops between a decoder's linears, against what transformers' small ops give and against float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from duotone.kernels import native

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


@given(batch=st.integers(1, 4), heads=st.integers(1, 5), half=st.integers(1, 40), shared=st.booleans())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_rotation_is_transformers_own(batch: int, heads: int, half: int, shared: bool) -> None:
    """Bit for bit, with one position for all sequences or one for each."""
    angle = torch.rand(1 if shared else batch, 1, half, generator=torch.Generator().manual_seed(half)).repeat(1, 1, 2) * 6
    cosine, sine = angle.cos().bfloat16(), angle.sin().bfloat16()
    x = draw(heads, batch, 1, heads, 2 * half)
    meant, _ = apply_rotary_pos_emb(x.transpose(1, 2), x.transpose(1, 2), cosine, sine)
    found = x.reshape(batch, -1).clone()
    torch.ops.duotone.rotate(found, cosine[:, 0], sine[:, 0])
    assert torch.equal(found.view(batch, heads, 1, -1), meant)


@given(
    batch=st.integers(1, 3), heads=st.integers(1, 4), queries=st.integers(1, 5), length=st.integers(1, 70),
    size=st.sampled_from([1, 8, 32, 50, 64, 128]),
)  # fmt: skip
@settings(max_examples=80, deadline=None, derandomize=True)
def test_attention_equals_float64(batch: int, heads: int, queries: int, length: int, size: int) -> None:
    """Any number of sequences, heads and tokens, any size of a head: the weighted mean of values, rounded once to BF16."""
    q, k, v = (draw(i, batch, count, rows, size) for i, (count, rows) in enumerate(((heads, queries), *((heads, length),) * 2)))
    found = torch.ops.duotone.attend(q.reshape(batch, -1), k, v, 0.3)
    weights = torch.softmax(q.double() @ k.double().transpose(2, 3) * 0.3, -1)
    meant = (weights @ v.double()).view(batch, -1)
    allowed = meant.abs() * 2.0**-8 + (weights @ v.double().abs()).view(batch, -1) * 1e-5
    assert found.dtype == torch.bfloat16 and bool(((found.double() - meant).abs() <= allowed).all())


def test_attention_is_the_same_alone_and_in_a_batch() -> None:
    """Bit for bit, on one thread and on two, and for scores that would overflow an exponential."""
    q, k, v = draw(0, 4, 8 * 64) * 30, draw(1, 4, 2, 300, 64) * 30, draw(2, 4, 2, 300, 64)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        whole = torch.ops.duotone.attend(q, k, v, 0.125)
        torch.set_num_threads(1)
        alone = torch.cat([torch.ops.duotone.attend(q[i : i + 1], k[i : i + 1], v[i : i + 1], 0.125) for i in range(4)])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(whole, alone) and bool(whole.isfinite().all())


@given(rows=st.integers(1, 3), size=st.integers(1, 200), scale=st.sampled_from([1e-3, 1.0, 30.0, 1e4]))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_gates(rows: int, size: int, scale: float) -> None:
    """torch's silu times the other, far out too; one value in a hundred may round the other way."""
    gate, up = draw(rows, rows, size) * scale, draw(size, rows, size)
    found, meant = torch.ops.duotone.silu_multiply(gate, up), torch.nn.functional.silu(gate) * up
    off = (found.float() - meant.float()).abs()
    assert found.shape == gate.shape and bool((off <= meant.float().abs() * 2.0**-6 + 1e-30).all())
    assert int((off > 1e-30).sum()) <= 0.02 * off.numel() + 1


BAD = {
    "norm's weight": (lambda: torch.ops.duotone.rms_norm(draw(0, 2, 8), draw(0, 7), 1e-5), "x: expected shape"),
    "norm in float32": (lambda: torch.ops.duotone.rms_norm(torch.ones(2, 8), draw(0, 8), 1e-5), "x: found another type"),
    "odd heads": (lambda: torch.ops.duotone.rotate(draw(0, 2, 9), draw(0, 1, 3), draw(0, 1, 3)), "x: expected whole heads"),
    "sine": (lambda: torch.ops.duotone.rotate(draw(0, 2, 8), draw(0, 1, 4), draw(0, 1, 2)), "sine: found another shape"),
    "positions": (lambda: torch.ops.duotone.rotate(draw(0, 3, 8), draw(0, 2, 4), draw(0, 2, 4)), "cosine: expected a row"),
    "gate": (lambda: torch.ops.duotone.silu_multiply(draw(0, 2, 8), draw(0, 2, 7)), "up: found another size"),
    "values": (lambda: torch.ops.duotone.attend(draw(0, 1, 8), draw(0, 1, 2, 3, 4), draw(0, 1, 2, 2, 4), 1.0), "v: found"),
    "queries": (lambda: torch.ops.duotone.attend(draw(0, 1, 9), draw(0, 1, 2, 3, 4), draw(0, 1, 2, 3, 4), 1.0), "q: expected"),
    "no queries": (lambda: torch.ops.duotone.attend(draw(0, 1, 0), *(draw(0, 1, 2, 3, 4),) * 2, 1.0), "q: expected"),
    "no tokens": (lambda: torch.ops.duotone.attend(draw(0, 1, 8), *(draw(0, 1, 2, 0, 4),) * 2, 1.0), "k: expected"),
}  # fmt: skip


@pytest.mark.parametrize("call", BAD.values(), ids=BAD.keys())
def test_wrong_shapes_are_errors(call: tuple) -> None:
    """Nothing is read that is not there."""
    with pytest.raises(RuntimeError, match=call[1]):
        call[0]()
