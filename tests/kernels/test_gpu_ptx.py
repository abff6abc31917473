"""The way that is compiled, interpreted: its lookups are emulated from their PTX, all around them is Triton's as it stands.

Else that way would run on a GPU only: what is interpreted otherwise decodes weight by weight.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from duotone.kernels.gpu import backend, bank, layout
from duotone.qweight import fp8_values
from duotone.scheme import GAUDI, HOPPER, Scheme
from tests.kernels.test_gpu import DEVICE, emulate, weight_of

pytest.importorskip("triton", reason="needs the package triton (the dev extra brings it on Linux)")

import triton.language as tl
from triton.runtime.interpreter import TensorHandle

from duotone.kernels.gpu import grouped, kernels, launch

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.skipif(DEVICE.type == "cuda", reason="for machines without a GPU: there the way that is compiled runs"),
]

KINDS = ("hopper", "signed", "zero points", "gaudi")


def looked_up(words: Any, t0: Any, t1: Any, t2: Any, t3: Any, QUARTER: Any, SIGNED: Any) -> Any:
    """`kernels._look_up` of a block: an instance of the text for each 4 neighbors."""
    held = np.ascontiguousarray(words.handle.data)
    pairs = held.view(np.uint32).reshape(len(held), 8, 2)
    registers = {"$1": pairs[..., 0], "$2": pairs[..., 1]}
    for i, entry in enumerate((t0, t1, t2, t3)):
        registers[f"${3 + 4 * i}"] = np.broadcast_to(entry.handle.data.view(np.uint32)[:, None], pairs.shape[:2])
    found = emulate(kernels.table_text(int(QUARTER), bool(SIGNED)), registers)
    bytes_ = np.ascontiguousarray(found.astype(np.uint32)).view(np.uint8).reshape(len(held), 32)
    return tl.core.tensor(TensorHandle(bytes_, tl.float8e4nv), tl.block_type(tl.float8e4nv, list(bytes_.shape)))


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Lookups that were made; sums are added up as where the units keep all bits, which needs no PTX."""
    calls: list[Any] = []
    monkeypatch.setattr(kernels, "_look_up", lambda *given: calls.append(given[5]) or looked_up(*given))
    steps = launch.steps
    monkeypatch.setattr(launch, "steps", lambda *given: steps(*given) | {"PROMOTES": False})
    with monkeypatch.context() as patch:
        patch.setattr(launch, "IS_COMPILED", True)
        yield calls


@pytest.mark.parametrize("group_size", [32, 64, 128, 256])
@pytest.mark.parametrize("kind", KINDS)
def test_weights_bit_for_bit(kind: str, group_size: int, compiled: list[Any]) -> None:
    """The contract's FP8 values: quarters in their order, each with its group's row of the table."""
    target, symmetric = GAUDI if kind == "gaudi" else HOPPER, kind != "zero points"
    weight = weight_of(70, 300, Scheme(target, group_size, symmetric), kind == "signed")
    written = launch.write_values(layout.pack(weight), group_size)
    assert torch.equal(written[:70, :300].float(), fp8_values(weight))
    assert len(compiled) == 4 * 2 * 3, "quarters of 64 rows of a chunk"


@pytest.mark.parametrize(("kind", "tokens", "columns"), [("hopper", 3, 1000), ("signed", 17, 300), ("zero points", 33, 300)])
def test_products_bit_for_bit(
    kind: str, tokens: int, columns: int, compiled: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same sums of the same values: alone and as one of a bank's, in splits and not, chunks by twos and one by one."""
    weight = weight_of(70, columns, Scheme(HOPPER, 64, kind != "zero points"), kind == "signed")
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(tokens)).bfloat16()
    monkeypatch.setattr(launch, "_ADDING", 0.0)
    packed, chosen = backend.prepack(weight), torch.arange(tokens)[:, None] % 2
    held = bank.stack([[packed], [packed]])
    found = backend.linear(x, packed), grouped.linear(x, grouped.routes(chosen, 2), held)
    assert compiled
    monkeypatch.setattr(launch, "IS_COMPILED", False)
    meant = backend.linear(x, packed), grouped.linear(x, grouped.routes(chosen, 2), held)
    assert all(map(torch.equal, found, meant)) and bool(found[0].any())
