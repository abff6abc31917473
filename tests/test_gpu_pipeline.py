"""The pipeline on a GPU that is only pretended (tests/pretended.py): nothing is left on the CPU, and little is waited for."""

import errno
import os
import sys
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map_only

from duotone import device, estimate, gpu_costs, opening, pipeline, solving, unfinished
from duotone.calibrate import offload
from duotone.checkpoint import ahead
from duotone.checkpoint.journal import Journal
from duotone.checkpoint.sidecar import RUN_RECORD
from duotone.checkpoint.source import Source, check_finite, open_source
from duotone.checkpoint.writer import CheckpointWriter, reporting_full_disk
from duotone.device import processor_name
from duotone.errors import DuotoneError
from duotone.floors import measured_ceiling
from duotone.kernels import dispatch, native, reference
from duotone.models.skeleton import place_buffers
from duotone.modules import quantize_module
from duotone.outcome import QuantizeReport
from duotone.phases import HostClock
from duotone.pipeline import quantize
from duotone.plan import Plan, make_plan
from duotone.runtime.linear import QuantizedLinear
from duotone.scheme import GAUDI, HOPPER, Scheme, Target
from duotone.settings import QuantizeConfig
from duotone.solver import local_search, loops, statistics, sweep
from duotone.solver.statistics import StatisticsAccumulator

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))

import scale
import scale_gpu

from tests.kernels.test_reference import make_weight
from tests.pretended import CUDA, Pretended, PretendedGpu, pretended_gpu
from tests.test_cli import invoke


class Loops:
    """In the place of the Triton programs: the extension's ops, each one operation of the GPU."""

    def __init__(self, gpu: PretendedGpu) -> None:
        self._gpu = gpu

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def run(*given: Any) -> Any:
            assert all(isinstance(x, Pretended) for x in given if isinstance(x, torch.Tensor)), name
            self._gpu.seen["launches"] += 1
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

    for module in (offload, opening, ahead):
        monkeypatch.setattr(module, "free_bytes", lambda _: 8 * 2**30)
    monkeypatch.setattr(solving, "StreamClock", lambda _: HostClock())
    monkeypatch.setattr(pipeline, "peak_bytes", lambda _: 123)
    for module in (solving, unfinished):
        monkeypatch.setattr(module, "refusal", lambda _: None)
    monkeypatch.setattr(ahead, "read_beside", read)
    monkeypatch.setattr(ahead, "handed_over", lambda *_: None)
    with pretended_gpu(monkeypatch) as gpu:
        programs, found = Loops(gpu), loops.compiled
        monkeypatch.setattr(loops, "compiled", lambda fp8, x: programs if isinstance(x, Pretended) else found(fp8, x))
        yield gpu


def run(model: Path, out: Path, text_file: Path, device: str, **options: Any) -> QuantizeReport:
    """A checkpoint of few windows; attention is added up in the same order on both devices."""
    usual = {"samples": 8, "seq_len": 64, "calibration": (str(text_file),), "device": device, "dtype": "float32"}
    saving = {name: options.pop(name) for name in ("save_every", "resume") if name in options}
    with sdpa_kernel(SDPBackend.MATH), pytest.MonkeyPatch.context() as patch:
        patch.setattr(local_search, "LEAST_VISITS", 2**13)
        return quantize(model, out, QuantizeConfig(**{**usual, **options}), **saving)


CASES = {
    "dpq": ("llama", {}),
    "equalized": ("qwen3", {"num_hidden_layers": 1, "equalize": 0.5, "symmetric": False, "kv_cache": "fp8"}),
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
    sizes = {name: size for name, size in options.items() if name.startswith("num_")}
    options = {name: value for name, value in options.items() if name not in sizes}
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
    if case == "dpq":  # what docs/scale.md counts on paper
        paper = scale_gpu.phases(scale.dense(case, 128, 256, 2, 64, 260), scale_gpu.H200, 8 * 64)
        launches = sum(phase.launches for phase in paper.values()) / scale_gpu.H200.launch
        assert 0.85 * launches < gpu.seen["launches"] <= launches


@pytest.mark.skipif(not native.available(), reason=native.unavailable() or "")
def test_no_room_and_no_triton(gpu: PretendedGpu, tiny_model: Callable[..., Path], tmp_path: Path, text_file: Path) -> None:
    """Hidden states that a GPU has no room for wait in its host, and so do large blocks; a solver in torch is told."""
    model = tiny_model(num_hidden_layers=1)
    with pytest.MonkeyPatch.context() as patch:
        for module in (offload, ahead):
            patch.setattr(module, "free_bytes", lambda _: 1000)
        for module in (solving, unfinished):
            patch.setattr(module, "refusal", lambda _: "there is none")
        found = run(model, tmp_path / "host", text_file, "cuda:0", method="gptq")
    gpu.seen.clear()
    meant = run(model, tmp_path / "gpu", text_file, "cuda:0", method="gptq")
    job = gpu_costs.Job(8 * 64, 64, 1, 128, drift=False, search=False)
    paper = gpu_costs.phases(estimate._groups(planned(model, method="gptq")), scale_gpu.H200, job).values()
    launches = sum(phase.launches for phase in paper) / scale_gpu.H200.launch
    assert 0.85 * launches < gpu.seen["launches"] <= launches
    assert found.states_in == "pinned host memory" and meant.states_in == "the GPU's memory"
    told = {"the solver runs in plain torch on this GPU, which takes long: there is none"}
    assert set(found.notes) - set(meant.notes) == told
    kept, there = (load_file(tmp_path / name / "model.safetensors") for name in ("host", "gpu"))
    assert all(torch.equal(kept[name], tensor) for name, tensor in there.items())


def whole(folder: Path) -> dict[str, bytes]:
    """All files but the one that tells of times."""
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name != RUN_RECORD}


@pytest.mark.skipif(not native.available(), reason=native.unavailable() or "")
@pytest.mark.usefixtures("gpu")
def test_what_is_written_behind_the_work_is_saved_when_it_is_there(
    tiny_model: Callable[..., Path], tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slow disk that is full in the second block: one sentence; what was saved has its bytes; going on, all are the same."""
    model, out, threads, saved = tiny_model(), tmp_path / "out", set[int](), list[int]()
    options: dict[str, Any] = {"method": "gptq", "samples": 2, "seq_len": 32}
    run(model, tmp_path / "whole", text_file, "cuda:0", **options)
    write, save, last = CheckpointWriter.write, Journal.save, "model.layers.1.self_attn.o_proj"
    blocks = planned(model, **options).blocks

    def slow(writer: CheckpointWriter, tensors: dict[str, torch.Tensor]) -> None:
        threads.add(threading.get_ident())
        time.sleep(0.005)
        if full and any(name.startswith(last) for name in tensors):
            with reporting_full_disk(tmp_path):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(writer, tensors)

    def checked(journal: Journal, done: int, written: dict[str, str], *rest: Any) -> None:
        saved.append(done)
        for block in blocks[:done]:
            assert all(any(name.startswith(f"{layer}.") for name in written) for layer in sum(block.shared_inputs, ()))
        save(journal, done, written, *rest)

    monkeypatch.setattr(CheckpointWriter, "write", slow)
    monkeypatch.setattr(Journal, "save", checked)
    full = [True]
    for every in (1000.0, 0.0):
        with pytest.raises(DuotoneError, match=r"the disk is full: needs more") as told:
            run(model, out, text_file, "cuda:0", save_every=every, **options)
        assert str(told.value).endswith("--resume goes on with it)") == (not every)
        assert not out.exists() and (tmp_path / ".out.partial").exists() == (not every), "half-written"
    full.clear()
    assert run(model, out, text_file, "cuda:0", save_every=0.0, resume=True, **options).resumed_at == 1
    assert saved == [0, 1, 1, 2] and whole(out) == whole(tmp_path / "whole")
    assert threads and threading.get_ident() not in threads and list(tmp_path.glob(".*")) == []


@pytest.mark.skipif(not native.available(), reason=native.unavailable() or "")
def test_wide_matrices_are_multiplied_in_bfloat16(
    gpu: PretendedGpu, tiny_model: Callable[..., Path], tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a CPU with units for it, but with sums in float32; the local search reads a BF16 Hessian; errors are as small."""
    model, products, read = tiny_model(num_hidden_layers=1), list[Any](), list[Any]()
    multiply, search = device.wide_product, Loops.__getattr__
    monkeypatch.setattr(device, "wide_product", lambda *pair: products.append([x.dtype for x in pair]) or multiply(*pair))

    def looked_at(programs: Loops, name: str) -> Callable[..., Any]:
        return lambda *given: read.extend([given[1].dtype] * (name == "local_search")) or search(programs, name)(*given)

    monkeypatch.setattr(Loops, "__getattr__", looked_at)
    wide = run(model, tmp_path / "wide", text_file, "cuda:0")
    assert set(read) == {torch.float32} and not products
    monkeypatch.setattr(device, "WIDE", 128)
    read.clear()
    narrow = run(model, tmp_path / "narrow", text_file, "cuda:0")
    assert set(read) == {torch.bfloat16} and all(pair == [torch.bfloat16] * 2 for pair in products) and len(products) > 7
    errors = [[layer.output_error for layer in report.layers] for report in (wide, narrow)]
    assert errors[1] == pytest.approx(errors[0], rel=0.1) and errors[1] != errors[0]  # few rows: now better, now worse
    assert device.multiplies_narrow(CUDA, 128) and not device.multiplies_narrow(CUDA, 127)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    assert not device.multiplies_narrow(CUDA, 128), "units before Ampere's have no BF16"
    assert gpu.seen["local_search"] == 14


@pytest.mark.skipif(not native.available(), reason=native.unavailable() or "")
def test_a_module_given_in_python(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Module and batches come from the CPU, positional and named; the codes are a CPU's, and the answer is on the GPU."""
    monkeypatch.setattr(local_search, "LEAST_VISITS", 2**11)
    torch.manual_seed(0)
    module, x = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.GELU(), torch.nn.Linear(96, 8)), torch.randn(2, 32, 64)
    meant = quantize_module(module, [{"input": x[0]}, x[1]], device="cpu", group_size=32)
    request.getfixturevalue("gpu")
    found = quantize_module(module, [{"input": x[0]}, x[1]], device="cuda:0", group_size=32)
    assert meant.weights.keys() == found.weights.keys() == {"0"}
    for layer, weight in found.weights.items():
        assert weight.codes.device == CUDA and torch.equal(weight.codes.cpu(), meant.weights[layer].codes)
    assert torch.allclose(found.module(x[0].to(CUDA)).cpu(), meant.module(x[0]), atol=1e-5)


@pytest.mark.usefixtures("gpu")
def test_moments_in_bfloat16_stay_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is rounded to BF16 on the way: sums of products of BF16 values, within float32's roundings of float64's."""
    products: list[torch.dtype] = []
    multiply = statistics.wide_product

    def product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        products.append(left.dtype)
        return multiply(left, right)

    monkeypatch.setattr(statistics, "wide_product", product)
    x, original, target = (torch.randn(2, 150, width).bfloat16() for width in (300, 300, 70))
    sums = StatisticsAccumulator(300, CUDA)
    for part in range(2):
        sums.add(*(tensor[part].to(CUDA) for tensor in (x, original, target)))
    found = sums.finish("layer")
    x_MK, drift_MK, target_MD = (y.reshape(-1, y.shape[-1]).double() for y in (x, original - x, target))
    for moment, left in ((found.hessian, x_MK), (found.input_drift, drift_MK), (found.stream_target, target_MD)):
        assert moment is not None and moment.device == CUDA and moment.dtype == torch.float32
        exact, size = left.T @ x_MK / len(x_MK), left.abs().T @ x_MK.abs() / len(x_MK)
        assert bool(((moment.cpu().double() - exact).abs() <= 1e-5 * size).all())
    assert set(products) == {torch.bfloat16} and len(products) > 6


def test_two_devices_do_not_mix(gpu: PretendedGpu) -> None:
    """What the tests above rely on: an operand left on the CPU is an error, as on a GPU; reading values back counts."""
    x = torch.ones(3, 3).to(CUDA)
    assert isinstance(x, Pretended) and x.device == CUDA
    for mixed in (lambda: x + torch.ones(3, 3), lambda: torch.ones(3)[x.long()], lambda: torch.where(x > 0, x, torch.zeros(3))):
        with pytest.raises(RuntimeError, match=r"found (operands|indices) on cuda:0"):
            mixed()
    waits = gpu.seen["waits"]
    assert float(x.sum()) == 9.0 and torch.equal((x + 1).cpu(), torch.full((3, 3), 2.0))
    assert gpu.seen["waits"] == waits + 2


@pytest.mark.usefixtures("gpu")
def test_buffers_follow() -> None:
    """Those that no checkpoint brings are made on the CPU; those on meta are filled later."""
    module = torch.nn.Module()
    module.register_buffer("table", torch.arange(3), persistent=False)
    module.register_buffer("later", torch.empty(3, device="meta"))
    place_buffers(module, CUDA)
    assert isinstance(module.table, Pretended) and module.later.is_meta


def test_ceilings_are_the_gpus(gpu: PretendedGpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products run on the device of the run, and are waited for before the clock is read."""
    waits: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "synchronize", waits.append)
    assert measured_ceiling(tmp_path, CUDA, size=32).narrow > 0
    assert waits == [CUDA] * 10 and gpu.seen["launches"] >= 10


# ---- what --dry-run foresees


@pytest.fixture
def h200(gpu: PretendedGpu, monkeypatch: pytest.MonkeyPatch) -> PretendedGpu:
    """A GPU that is measured to be what an H200's data sheet says."""
    monkeypatch.setattr(estimate, "measured_gpu", lambda _: scale_gpu.H200)
    monkeypatch.setattr(estimate, "free_bytes", lambda _: 8 * 2**30)
    monkeypatch.setattr(estimate, "refusal", lambda _: None)
    return gpu


def planned(model: Path, **options: Any) -> Plan:
    return make_plan(open_source(model), QuantizeConfig(**{"samples": 8, "seq_len": 64, **options}))


@pytest.mark.skipif(not native.available(), reason=native.unavailable() or "")
def test_a_gpu_is_measured_where_it_is(gpu: PretendedGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products in both arithmetics, memory, launches and the compiled local search, all of them there and waited for."""
    waits: list[torch.device] = []
    facts = SimpleNamespace(L2_cache_size=1000, multi_processor_count=1)
    monkeypatch.setattr(torch.cuda, "synchronize", waits.append)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: facts)
    monkeypatch.setattr(estimate, "_COPIED", 2**20)
    products = list[torch.dtype]()
    monkeypatch.setattr(estimate, "measured_flops", lambda dtype, place, _: products.append(dtype) or float(place == CUDA))
    for reason, searches in (("none", 0), (None, 4)):
        monkeypatch.setattr(estimate, "refusal", lambda _, reason=reason: reason)
        found = estimate.measured_gpu(CUDA)
        assert gpu.seen["local_search"] == searches, "measured where it is compiled"
    assert products == [torch.bfloat16, torch.float32] * 2 and set(waits) == {CUDA} and len(waits) == 20
    assert (found.name, found.narrow, found.wide, found.cache, found.multiprocessors) == ("a pretended GPU", 1, 1, 1000, 1)
    assert found.memory > 0 and 0 < found.launch < 1 and found.instructions > 1e6


@pytest.mark.usefixtures("h200")
def test_what_is_foreseen_is_what_the_paper_says(tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/scale.md's account for the same shapes, or what the disk takes beside it; products at a share of their speed."""
    plan = planned(tiny_model())
    paper = scale_gpu.phases(scale.dense("llama", 128, 256, 2, 64, 260), scale_gpu.H200, 8 * 64, 64)
    meant = sum(phase.seconds for phase in paper.values())
    assert estimate.estimate(plan, CUDA).seconds > meant
    monkeypatch.setattr(estimate, "_EFFICIENCY", 1.0)
    found = estimate.estimate(plan, CUDA)
    assert found.seconds == pytest.approx(meant)
    assert (found.device, found.notes) == ("H200", ()) and found.measured["bfloat16_flops"] == scale_gpu.H200.narrow
    assert found.disk_bytes == plan.disk_bytes and found.saved_bytes == 2 * 2 * 8 * 64 * 128
    cheaper = estimate.estimate(planned(tiny_model(), method="gptq"), CUDA)
    assert cheaper.seconds < 0.8 * found.seconds and 2 * cheaper.saved_bytes == found.saved_bytes
    wide = estimate.estimate(planned(tiny_model(), dtype="float32"), CUDA)
    assert wide.seconds > found.seconds and wide.saved_bytes == 2 * found.saved_bytes
    assert estimate.estimate(planned(tiny_model(), method="rtn"), CUDA).seconds < 0.01 * found.seconds


@pytest.mark.usefixtures("h200")
def test_memory_of_both_is_foreseen(tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Hidden states are counted where they wait; blocks read ahead are on the GPU; the host has neither."""
    plan = planned(tiny_model())
    states = 2 * 2 * 2 * 8 * 64 * 128
    there = estimate.estimate(plan, CUDA)
    longer = estimate.estimate(planned(tiny_model(), samples=16), CUDA)
    assert there.states_in == "the GPU's memory" and longer.device_bytes - there.device_bytes >= states
    assert longer.peak_bytes - there.peak_bytes == there.saved_bytes
    for module in (offload, estimate):
        monkeypatch.setattr(module, "free_bytes", lambda _: 1000)
    here = estimate.estimate(plan, CUDA)
    block = sum(plan.source.tensors[name].nbytes for name in plan.blocks[0].tensors)
    assert here.states_in == "pinned host memory"
    assert there.device_bytes - here.device_bytes == states + 2 * block
    assert here.peak_bytes - there.peak_bytes == states - 2 * ahead.PIECE_BYTES - there.saved_bytes
    assert here.seconds == pytest.approx(there.seconds + plan.source.weight_bytes / gpu_costs.DISK)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(estimate, "HASH", 1000.0)
        assert estimate.estimate(plan, CUDA).seconds == pytest.approx(plan.disk_bytes / 1000, rel=1e-3)


class Held:
    """Bytes of the pretended GPU's tensors: those that are there, and the most that were."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.peak, self._bytes, self._users = 0, 0, Counter[int]()
        make = Pretended.__new__

        def made(cls: type[Pretended], held: torch.Tensor, *_: object) -> Pretended:
            tensor, storage = make(cls, held), held.untyped_storage()
            weakref.finalize(tensor, self._count, storage.data_ptr(), storage.nbytes(), -1)
            self._count(storage.data_ptr(), storage.nbytes(), 1)
            return tensor

        monkeypatch.setattr(Pretended, "__new__", staticmethod(made))

    def _count(self, place: int, nbytes: int, more: int) -> None:
        self._users[place] += more
        if self._users[place] == max(0, more):  # the first user of this memory, or its last
            self._bytes += more * nbytes
            self.peak = max(self.peak, self._bytes)


@pytest.mark.skipif(not native.available(), reason=native.unavailable() or "")
@pytest.mark.usefixtures("h200")
def test_memory_is_foreseen_within_a_factor_of_two(
    tiny_model: Callable[..., Path], tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No less than tensors take between two operations, so that there is room for what these take, and not twice as much."""
    model, options = tiny_model(hidden_size=256, intermediate_size=704, head_dim=64), {"dtype": "bfloat16"}
    foreseen = estimate.estimate(planned(model, **options), CUDA).device_bytes
    held = Held(monkeypatch)
    run(model, tmp_path / "out", text_file, "cuda:0", **options)
    assert held.peak <= foreseen <= 2 * held.peak


@pytest.mark.usefixtures("h200")
def test_experts_are_foreseen_with_their_share_of_the_tokens(tiny_model: Callable[..., Path]) -> None:
    """One of four experts a token: the forward pass through experts is a quarter of what all of them take."""
    model = tiny_model("mixtral", num_local_experts=4, num_experts_per_tok=1, num_hidden_layers=1)
    shares = [
        {group.share for group in estimate._groups(planned(model, calibrate_all_experts=every))} for every in (False, True)
    ]
    assert shares == [{1.0, 0.25}, {1.0}]


@pytest.mark.usefixtures("h200")
def test_a_solver_in_torch_is_foreseen(tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes many times as long, which the user is told."""
    plan = planned(tiny_model())
    compiled = estimate.estimate(plan, CUDA)
    monkeypatch.setattr(estimate, "refusal", lambda _: "there is none")
    slow = estimate.estimate(plan, CUDA)
    assert slow.seconds > 10 * compiled.seconds
    assert slow.notes == ("the solver runs in plain torch on this GPU, which takes long: there is none",)


def test_launches_of_a_solver_in_torch(gpu: PretendedGpu) -> None:
    """What is foreseen of it is what it asks for: of a step of the local search, of a column in the column loop."""
    rows, columns = 3, 64
    ones = torch.ones(rows, columns).to(CUDA)
    grid = sweep.Grid(ones[:, :1].T.contiguous(), None, ones[:, 0].contiguous(), sweep.Rule.NEAREST_VALUE, Scheme())
    given = (ones.cumsum(1).sin(), torch.eye(columns).to(CUDA), ones[0], grid, ones.mul(8).to(torch.uint8))
    launches = list[int]()
    for steps in (1, 11):
        gpu.seen.clear()
        local_search.local_search_torch(*given, steps)
        launches.append(gpu.seen["launches"])
    assert (launches[1] - launches[0]) / 10 == pytest.approx(gpu_costs.STEP_LAUNCHES, rel=0.1)
    gpu.seen.clear()
    base_BN = ones.T.contiguous()
    sweep.sweep_torch(base_BN, base_BN, given[1], grid, torch.zeros(columns, dtype=torch.int32).to(CUDA))
    assert gpu.seen["launches"] / columns == pytest.approx(gpu_costs.COLUMN_LAUNCHES, rel=0.1)


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("target", [HOPPER, GAUDI], ids=lambda target: target.name)
def test_a_weight_is_packed_where_it_runs(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the GPU, and to what a CPU makes of it; what is there already is not moved."""
    weight = make_weight(9, 64, Scheme(target, 32))
    seen: list[bool] = []
    original = reference.prepack
    monkeypatch.setattr(reference, "prepack", lambda given: seen.append(given is weight) or original(given))
    monkeypatch.setattr(dispatch, "BACKENDS", (reference,))
    there, here = (QuantizedLinear(weight, None, place).packed_tensors() for place in (CUDA, None))
    assert seen == [False, True] and all(isinstance(tensor, Pretended) for tensor in there)
    assert all(torch.equal(theirs.cpu(), ours) for theirs, ours in zip(there, here, strict=True))


@pytest.mark.usefixtures("h200")
def test_a_dry_run_is_of_the_device_that_will_run(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    """By `--device`, told in both forms; where there is no such device, one sentence and no estimate of another."""
    arguments = ("quantize", tiny_model(), tmp_path / "out", "--dry-run", "--device")
    found = invoke(*arguments, "cuda", "--json").json()
    assert found["device"] == "H200" and found["device_bytes"] > 0 and found["states_in"] == "the GPU's memory"
    text = " ".join(invoke(*arguments, "cuda").out.split())
    assert "on H200 (989 TFLOP/s in BF16, 67 TFLOP/s in float32)" in text and "peak GPU memory" in text
    here = invoke(*arguments, "cpu", "--json").json()
    assert here["device"] == processor_name() and set(here["measured"]) == {"float32_flops"} and here["device_bytes"] == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        refused = invoke(*arguments, "cuda")
    assert (refused.code, refused.out) == (2, "")
    assert refused.err == "duotone: --device: cuda was asked for, found no CUDA device; use --device cpu\n"
