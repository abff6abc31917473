"""The pipeline on a GPU that is only pretended (tests/pretended.py): nothing is left on the CPU, and little is waited for."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map_only

from duotone import opening, pipeline
from duotone.calibrate import offload
from duotone.checkpoint import ahead
from duotone.checkpoint.source import Source, check_finite
from duotone.kernels import native
from duotone.outcome import QuantizeReport
from duotone.phases import HostClock
from duotone.pipeline import quantize
from duotone.settings import QuantizeConfig
from duotone.solver import local_search, loops
from tests.pretended import Pretended, PretendedGpu, pretended_gpu


class Loops:
    """In the place of the Triton programs: the extension's ops, each one operation of the GPU."""

    def __init__(self, gpu: PretendedGpu) -> None:
        self._gpu = gpu

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def run(*given: Any) -> Any:
            assert all(isinstance(x, Pretended) for x in given if isinstance(x, torch.Tensor)), name
            self._gpu.seen["operations"] += 1
            self._gpu.seen[name] += 1
            found = getattr(torch.ops.duotone, name)(*(x.held if isinstance(x, Pretended) else x for x in given))
            return tree_map_only(torch.Tensor, Pretended, found)

        return run


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[PretendedGpu]:
    """A GPU with 8 GiB free, without streams, events and Triton."""

    def read(source: Source, names: Iterable[str], device: torch.device) -> dict[str, Any]:
        with gpu, torch.no_grad():  # another thread has modes of its own
            tensors = {name: tensor.to(device) for name, tensor in source.load(names).items()}
            check_finite(source, tensors)
        return tensors

    for module in (offload, opening):
        monkeypatch.setattr(module, "free_bytes", lambda _: 8 * 2**30)
    monkeypatch.setattr(pipeline, "StreamClock", lambda _: HostClock())
    monkeypatch.setattr(pipeline, "peak_bytes", lambda _: 123)
    monkeypatch.setattr(pipeline, "refusal", lambda _: None)
    monkeypatch.setattr(ahead, "read_beside", read)
    monkeypatch.setattr(ahead, "handed_over", lambda *_: None)
    with pretended_gpu(monkeypatch) as gpu:
        programs, found = Loops(gpu), loops.compiled
        monkeypatch.setattr(loops, "compiled", lambda fp8, x: programs if isinstance(x, Pretended) else found(fp8, x))
        yield gpu


def run(model: Path, out: Path, text_file: Path, device: str, **options: Any) -> QuantizeReport:
    """A checkpoint of few windows; attention is added up in the same order on both devices."""
    usual = {"samples": 8, "seq_len": 64, "calibration": (str(text_file),), "device": device, "dtype": "float32"}
    with sdpa_kernel(SDPBackend.MATH), pytest.MonkeyPatch.context() as patch:
        patch.setattr(local_search, "LEAST_VISITS", 2**13)
        return quantize(model, out, QuantizeConfig(**{**usual, **options}))


CASES = {
    "dpq": ("llama", {}),
    "equalized": ("qwen3", {"equalize": 0.5, "symmetric": False, "kv_cache": "fp8"}),
    "gptq, gaudi": ("llama", {"method": "gptq", "target": "gaudi", "group_size": 32}),
    "experts": ("mixtral", {"num_local_experts": 2, "num_experts_per_tok": 1, "num_hidden_layers": 1}),
}


@pytest.mark.skipif(not native.available(), reason=native.unavailable() or "")
@pytest.mark.parametrize("case", CASES)
def test_everything_is_on_the_gpu_and_the_bytes_are_a_cpus(
    case: str, tiny_model: Callable[..., Path], tmp_path: Path, text_file: Path, request: pytest.FixtureRequest
) -> None:
    """No operand is left behind on the CPU, weights are read ahead, and all that is written is what a CPU writes."""
    kind, options = CASES[case]
    sizes = {name: options.pop(name) for name in [*options] if name.startswith("num_")} if kind == "mixtral" else {}
    model = tiny_model(kind, **sizes)
    meant = run(model, tmp_path / "cpu", text_file, "cpu", **options)
    gpu = request.getfixturevalue("gpu")
    found = run(model, tmp_path / "gpu", text_file, "cuda:0", **options)
    assert (meant.states_in, meant.device_bytes) == ("memory", 0)
    assert (found.states_in, found.device_bytes) == ("the GPU's memory", 123)
    on_cpu, on_gpu = (load_file(tmp_path / name / "model.safetensors") for name in ("cpu", "gpu"))
    assert on_cpu.keys() == on_gpu.keys()
    assert [name for name in on_cpu if not torch.equal(on_cpu[name], on_gpu[name])] == []
    assert gpu.seen["sweep"] > 0 and gpu.seen["waits"] < 25 * len(found.layers)
