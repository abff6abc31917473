"""What only a GPU shows: graphs, streams, pinned memory, events, its own compiler, and whole runs. Skipped where there is none.

Beside tests/kernels/test_gpu*.py, which run on a GPU too, the first thing to run on a new one: `pytest -m gpu`.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import DynamicCache, StaticCache

import duotone
from duotone.calibrate.offload import HostMemory
from duotone.checkpoint.ahead import ReadAhead
from duotone.checkpoint.source import load_finite, open_source
from duotone.device import StreamClock
from duotone.kernels.gpu import backend, bank, cache, fp8
from duotone.runtime.linear import QuantizedLinear
from duotone.scheme import HOPPER, Scheme
from duotone.solver import loops
from duotone.speed_gpu import forms
from duotone.speed_gpu.clock import Clock
from duotone.speed_gpu.decoder import Between
from tests.kernels.test_gpu import weight_of
from tests.kernels.test_gpu_rows import draw, fp8_weight

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")


def replayed(call: Callable[[], Any], changed: Callable[[], object]) -> tuple[Any, Any]:
    """What a graph of a call gives once its inputs have changed, and what the call itself gives then."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = call()
    changed()
    graph.replay()
    torch.cuda.synchronize()
    return found, call()


def same(found: Any, meant: Any) -> bool:
    both = zip(found, meant, strict=True) if isinstance(found, tuple) else [(found, meant)]
    return all(torch.equal(a, b) for a, b in both)


@pytest.mark.parametrize("tokens", [1, 40, 70])
@pytest.mark.parametrize("kind", ["4 bits", "4 bits, normed", "FP8", "FP8 to float32"])
def test_graphs_hold_linears(kind: str, tokens: int) -> None:
    """Of each tile and of a prompt: the bits of the call by itself, of inputs that came later."""
    dtype = torch.float32 if kind.endswith("float32") else torch.bfloat16
    place = fp8 if kind.startswith("FP8") else backend
    packed: Any = place.prepack(fp8_weight(240, 1056) if place is fp8 else weight_of(240, 1056, Scheme(HOPPER, 128)))
    if kind.endswith("normed"):
        packed = backend.with_norm(packed, torch.ones(1056, device=CUDA, dtype=dtype), 1e-5)
    x, later = (draw(seed, tokens, 1056).to(CUDA, dtype) for seed in (0, 1))
    assert same(*replayed(lambda: place.linear(x, packed), lambda: x.copy_(later)))


@pytest.mark.parametrize("form", forms.OWN, ids=lambda form: form.name)
def test_graphs_hold_every_form(form: forms.Form) -> None:
    """What `bench gpu` compares."""
    linear = form.prepare(forms.random_weight((256, 512), 128, CUDA, 0))
    x, later = (draw(seed, 70, 512).bfloat16().to(CUDA) for seed in (0, 1))
    with torch.no_grad():
        assert same(*replayed(lambda: linear(x), lambda: x.copy_(later)))
        assert Clock(CUDA, 2**20).best(lambda: linear(x), 2) > 0


def test_graphs_hold_experts() -> None:
    """Tokens that go elsewhere later: which blocks are whose is found out anew."""
    from duotone.kernels.gpu import grouped

    held = bank.stack([[backend.prepack(weight_of(100, 256, Scheme(HOPPER, 128)))] for _ in range(3)])
    x, chosen = draw(0, 20, 256).bfloat16().to(CUDA), torch.zeros(20, 2, dtype=torch.int64, device=CUDA)
    later = torch.randint(0, 4, (20, 2), device=CUDA)
    assert same(*replayed(lambda: grouped.linear(x, grouped.routes(chosen, 3), held), lambda: chosen.copy_(later)))


def test_graphs_hold_the_cache() -> None:
    """Written at positions that move on."""
    new = [draw(seed, 2, 2, 1, 64).bfloat16().to(CUDA) for seed in (0, 1)]
    kept = [torch.zeros(2, 2, 9, 64, device=CUDA).to(torch.float8_e4m3fn) for _ in new]
    scales, position = [torch.full((2,), 0.1, device=CUDA)] * 2, torch.zeros(1, dtype=torch.int64, device=CUDA)

    def step() -> tuple[Tensor, Tensor]:
        cache.write(new, kept, scales, 448.0, position)
        return cache.read(kept, scales, torch.bfloat16)

    found, meant = replayed(step, lambda: position.fill_(7))
    assert same(found, meant) and all(bool(x[:, :, [0, 7]].any(-1).all()) and not x[:, :, 1:7].any() for x in found)


def test_what_lies_between_linears_is_compiled() -> None:
    """By Inductor."""
    assert Between.on(CUDA).how == "torch.compile, inductor"


def test_blocks_come_by_a_stream_of_their_own(tiny_model: Callable[..., Path]) -> None:
    """The file's values, one block ahead."""
    source = open_source(tiny_model("llama"))
    blocks = [[name for name in source.tensors if f".layers.{index}." in name] for index in range(2)]
    with ReadAhead(source, blocks, CUDA) as ahead:
        for index, names in enumerate(blocks):
            tensors = ahead.block(index)
            assert tensors.keys() == set(names) and all(tensor.is_cuda for tensor in tensors.values())
            assert all(torch.equal(tensors[name].cpu(), tensor) for name, tensor in load_finite(source, names).items())


def test_states_wait_in_the_host_and_phases_have_seconds() -> None:
    """Pinned memory with the same values; time between two events in the queue."""
    clock = StreamClock(CUDA)
    since = clock.mark()
    state = draw(0, 4, 300, 8).to(CUDA, torch.bfloat16) * 2
    kept = HostMemory().keep(state)
    assert kept.is_pinned() and torch.equal(kept.to(CUDA, non_blocking=True), state)
    assert clock.seconds(since, clock.mark()) > 0


def nibbles(packed: Tensor) -> Tensor:
    return torch.stack([packed.view(torch.uint8) & 15, packed.view(torch.uint8) >> 4])


@pytest.mark.parametrize("target", ["hopper", "gaudi"])
@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_a_run_from_weights_to_text(
    kind: str, target: str, tiny_model: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    """Quantized here and on a CPU: nearly the same codes. Loaded here: our kernels, and nearly a CPU's logits; caches agree."""
    sizes = {"num_local_experts": 3, "num_experts_per_tok": 2} if kind == "mixtral" else {}
    options: dict[str, Any] = {"samples": 8, "seq_len": 64, "calibration": (str(text_file),), "dtype": "float32"}
    options |= {"target": target, "kv_cache": "fp8" if target == "hopper" else None}
    for device in ("cpu", "cuda"):
        report = duotone.quantize(tiny_model(kind, **sizes), tmp_path / device, device=device, **options)
        assert not [note for note in report.notes if "plain torch" in note]
    assert report.device_bytes > 0 and loops.refusal(CUDA) is None
    codes = [load_file(tmp_path / device / "model.safetensors") for device in ("cpu", "cuda")]
    assert codes[0].keys() == codes[1].keys()
    packed = [name for name in codes[0] if name.endswith("weight_packed")]
    alike = [float((nibbles(codes[0][name]) == nibbles(codes[1][name])).float().mean()) for name in packed]
    assert min(alike) > 0.7, dict(zip(packed, alike, strict=True))
    tokens = torch.arange(60, 72)[None]
    models: list[Any] = [duotone.load(tmp_path / "cuda", device=device) for device in ("cpu", "cuda")]
    linears = [module for module in models[1].modules() if isinstance(module, QuantizedLinear)]
    assert linears and all(linear.backend is backend for linear in linears), linears[0].refusals
    with torch.no_grad():
        meant = models[0](tokens).logits.float()
        for store in (None, DynamicCache(), StaticCache(models[1].config, max_cache_len=20)):
            parts = (tokens,) if store is None else tokens.split((7, 1, 4), 1)
            found = torch.cat([models[1](part.to(CUDA), past_key_values=store).logits for part in parts], 1)
            assert torch.allclose(found.float().cpu(), meant, atol=0.05 * float(meant.abs().max())), type(store).__name__
        written = models[1].generate(tokens.to(CUDA), max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert written.shape[1] > tokens.shape[1]
