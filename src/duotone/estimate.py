# Shapes: N out_features, K in_features.
"""What a run will take on the device it is for, from shapes and short measurements there: of matrix products, and on a GPU of
its memory, its launches and the solver's compiled loops.
"""

import math
import time
from dataclasses import dataclass, replace

import torch

from duotone.calibrate.offload import WAITING_SHARE, choose_keeper
from duotone.calibrate.samples import are_tensors
from duotone.calibrate.stream import WAITING_BYTES
from duotone.checkpoint.ahead import AHEAD_SHARE, PIECE_BYTES
from duotone.checkpoint.behind import BEHIND_BYTES
from duotone.device import calibration_dtype, free_bytes, processor_name
from duotone.floors import best_seconds, measured_flops
from duotone.gpu_costs import DISK, HASH, VISIT_INSTRUCTIONS, Gpu, Group, Job, phases
from duotone.plan import BlockPlan, Plan
from duotone.scheme import Scheme
from duotone.solver.couple import BEAM_WIDTH, REVISITS, row_parts
from duotone.solver.local_search import local_search, steps_of
from duotone.solver.loops import refusal
from duotone.solver.sweep import Grid, Rule


@dataclass(frozen=True)
class Estimate:
    """Seconds, peak memory, and disk with what is kept there while the run lasts.

    saved_bytes: what a save holds besides, of a run that is long enough for one; twice that while the next is written. device,
    measured: what was measured for it, and the speeds that were found. device_bytes: memory of a GPU, which is not in
    peak_bytes. states_in: where hidden states wait. notes: what the user has to know of the device.
    """

    seconds: float
    peak_bytes: int
    disk_bytes: int
    saved_bytes: int
    device: str
    measured: dict[str, float]
    device_bytes: int = 0
    states_in: str = "memory"
    notes: tuple[str, ...] = ()


#: Interpreter, torch and transformers before any weight.
_BASE_BYTES = 500_000_000
#: Share of the measured matrix-product speed that mixed work reaches; and seconds a column of the solver's Python loop.
_EFFICIENCY, _COLUMN_SECONDS = 0.6, 1.5e-4

#: Of the beam search, one thread: a path's step, and what each earlier column adds to it.
_PATH_SECONDS, _PATH_COLUMN_SECONDS = 5e-8, 3.5e-11

#: What CUDA and its libraries take of the host; floats of a weight that the solver holds on a GPU, and of an entry of H.
_CUDA_BYTES, _SOLVER_FLOATS, _MOMENT_FLOATS = 2_000_000_000, 12, 9
#: What is measured of a GPU: products of so many rows and columns, bytes copied, launches, columns of a local search.
_PRODUCT, _COPIED, _LAUNCHES, _SEARCHED = 4096, 2**28, 256, 1024


def estimate(plan: Plan, device: torch.device | None = None) -> Estimate:
    """Seconds, peak memory and disk of a plan on a device, the CPU by default. An estimate: within about a factor of two; of a
    GPU's seconds that is not known yet.
    """
    return _on_cpu(plan) if device is None or device.type == "cpu" else _on_gpu(plan, device)


def _on_cpu(plan: Plan) -> Estimate:
    config = plan.config
    tokens = config.samples * plan.seq_len if config.needs_calibration else 0
    weights = sum(n * k for n, k in plan.shapes.values())
    flops, columns, hessian_bytes = 4.0 * tokens * weights, 0, 0
    if config.needs_statistics:
        for block in plan.blocks:
            widths = [plan.shapes[group[0]][1] for group in block.shared_inputs]
            flops += sum((3.0 if config.method_facts.drift else 1.5) * tokens * k**2 + k**3 for k in widths)
            hessian_bytes = max(hessian_bytes, 4 * 5 * max(widths) ** 2)  # a group's, and what its factor takes
        flops += sum(4.0 * n * k**2 for n, k in plan.shapes.values())
        columns = sum(k for _, k in plan.shapes.values())
    if config.high_effort:
        flops += 6.0 * tokens * weights + sum(1.2 * tokens * rows**2 for rows in _parts(plan))
    block_bytes = 4 * max(
        sum(n * k for g in block.shared_inputs for n, k in (plan.shapes[x] for x in g)) for block in plan.blocks
    )
    largest = 4 * max(n * k for n, k in plan.shapes.values())
    outside_bytes = 4 * sum(plan.source.tensors[name].nbytes // 2 for name in plan.outside)
    # Windows wait inside a block: about six states of the hidden width each, and the widest linear's input.
    hidden, widest = plan.hidden_size, max(k for _, k in plan.shapes.values())
    prefixes = 2 if config.method_facts.drift else 1
    allowed = WAITING_BYTES if plan.waiting_bytes is None else plan.waiting_bytes
    waiting_bytes = prefixes * min(4 * tokens * (6 * hidden + widest), allowed)
    state_bytes = 2 * prefixes * 4 * tokens * hidden
    peak = _BASE_BYTES + 3 * block_bytes + 6 * largest + outside_bytes + hessian_bytes + waiting_bytes + state_bytes
    speed = _measured_flops()
    seconds = flops / (_EFFICIENCY * speed) + columns * _COLUMN_SECONDS + weights * 2e-8
    disk = plan.disk_bytes
    if config.high_effort:
        seconds += _path_seconds(plan)
        peak += 4 * tokens * hidden * len(plan.blocks)  # hidden states at every block's entrance, for the way back
        disk += 4 * sum(rows**2 for rows in _parts(plan))
    saved_bytes = prefixes * 4 * tokens * hidden
    return Estimate(seconds, peak, disk, saved_bytes, processor_name(), {"float32_flops": speed})


def _on_gpu(plan: Plan, device: torch.device) -> Estimate:
    config, method, gpu, reason = plan.config, plan.config.method_facts, measured_gpu(device), refusal(device)
    tokens = config.samples * plan.seq_len if config.needs_calibration else 0
    dtype = calibration_dtype(config.dtype, device, tokens * plan.weights, config.high_effort)
    narrow, has_search = dtype == torch.bfloat16, config.method == "dpq"
    job = Job(
        tokens, plan.seq_len, len(plan.blocks), plan.hidden_size, narrow, method.drift, config.needs_statistics, has_search,
        reason is None,
    )  # fmt: skip
    at_work = replace(gpu, narrow=_EFFICIENCY * gpu.narrow, wide=_EFFICIENCY * gpu.wide)
    work = sum(phase.seconds for phase in phases(_groups(plan), at_work, job).values())
    read, written = plan.source.weight_bytes / DISK, plan.disk_bytes * (1 / DISK + 1 / HASH)
    seconds = max(work, read, written) if _reads_ahead(plan, device) else max(work + read, written)  # beside the work
    device_bytes, host_bytes, states_in = _gpu_memory(plan, device, tokens, dtype.itemsize)
    disk, saved_bytes = plan.disk_bytes, (1 + method.drift) * dtype.itemsize * tokens * plan.hidden_size
    if config.high_effort:
        gradients = 6.0 * tokens * plan.weights + sum(1.2 * tokens * rows**2 for rows in _parts(plan))
        seconds += gradients / (at_work.narrow if narrow else at_work.wide) + _path_seconds(plan)  # paths on the CPU
        disk += 4 * sum(rows**2 for rows in _parts(plan))
    measured = {
        "bfloat16_flops": gpu.narrow,
        "float32_flops": gpu.wide,
        "memory_bytes_per_s": gpu.memory,
        "launch_seconds": gpu.launch,
    }
    slow = f"the solver runs in plain torch on this GPU, which takes long: {reason}"
    notes = (slow,) if reason is not None and config.needs_statistics else ()
    host_bytes += saved_bytes if states_in.startswith("the GPU") else 0  # what a save copies
    return Estimate(seconds, host_bytes, disk, saved_bytes, gpu.name, measured, device_bytes, states_in, notes)


def _gpu_memory(plan: Plan, device: torch.device, tokens: int, itemsize: int) -> tuple[int, int, str]:
    """Bytes of a GPU, bytes of its host, and where hidden states wait."""
    config, method, specs = plan.config, plan.config.method_facts, plan.source.tensors
    stored = _stored(plan)
    block = max(sum(math.prod(specs[name].shape) for name in block.tensors) for block in plan.blocks)
    kept = {f"{layer}.{leaf}" for layer in plan.anatomy.keep.keys() - plan.anatomy.seeing for leaf in ("weight", "bias")}
    outside = sum(math.prod(specs[name].shape) for name in plan.outside if config.high_effort or name not in kept)
    largest, widest = max(n * k for n, k in plan.shapes.values()), max(k for _, k in plan.shapes.values())
    on_device = 4 * _SOLVER_FLOATS * largest + (4 * _MOMENT_FLOATS * widest**2 if config.needs_statistics else 0)
    on_host = _BASE_BYTES + _CUDA_BYTES + stored + max((specs[name].nbytes for name in plan.outside), default=0)
    on_host += min(BEHIND_BYTES, plan.disk_bytes)
    if _reads_ahead(plan, device):
        on_device, on_host = on_device + 2 * stored, on_host + 2 * PIECE_BYTES
    prefixes, hidden = 1 + method.drift, plan.hidden_size
    states = 2 * prefixes * itemsize * tokens * hidden
    states_in = choose_keeper(None, device, None if are_tensors(config.calibration) else states)[1]
    if config.needs_calibration:
        copies = 2 if method.needs_statistics and (method.drift or not method.sequential) else 1
        allowed = plan.waiting_bytes
        if allowed is None:
            allowed = max(WAITING_BYTES, int(WAITING_SHARE * free_bytes(device)))
        waiting = prefixes * min(itemsize * tokens * (6 * hidden + widest), allowed)
        on_device += itemsize * (copies * block + outside) + waiting
    if config.high_effort:
        states += itemsize * tokens * hidden * len(plan.blocks)  # at every block's entrance, for the way back
    is_there = states_in.startswith("the GPU")
    return on_device + states * is_there, on_host + states * (not is_there), states_in


def _stored(plan: Plan) -> int:
    """Bytes of the largest block as it is in the folder."""
    return max(sum(plan.source.tensors[name].nbytes for name in block.tensors) for block in plan.blocks)


def _reads_ahead(plan: Plan, device: torch.device) -> bool:
    return _stored(plan) <= AHEAD_SHARE * free_bytes(device)


def _groups(plan: Plan) -> list[Group]:
    """The linears that read one input, with the share of tokens that comes to them."""
    groups: list[Group] = []
    for block in plan.blocks:
        of_experts = _expert_share(plan, block)
        for names in block.shared_inputs:
            rows, columns = tuple(plan.shapes[layer][0] for layer in names), plan.shapes[names[0]][1]
            share = of_experts if names[0] in block.experts else 1.0
            groups.append(Group(columns, rows, names[0] in block.streams, share))
    return groups


def _expert_share(plan: Plan, block: BlockPlan) -> float:
    """Of a block's tokens, how many one of its experts gets: all of them where config.json does not tell."""
    first = [names[0].rpartition(".")[2] for names in block.shared_inputs if names[0] in block.experts]
    taken = getattr(plan.text, "num_experts_per_tok", None)
    if not first or not isinstance(taken, int) or plan.config.calibrate_all_experts:
        return 1.0
    return min(1.0, taken / first.count(first[0]))


def measured_gpu(device: torch.device, size: int = _PRODUCT) -> Gpu:
    """What a GPU reaches: products of `size` cubed, a copy in its memory, launches one after the other, and, where the solver's
    loops are compiled, a local search; else the instructions that float32 products are made of.
    """
    facts = torch.cuda.get_device_properties(device)
    narrow, wide = (measured_flops(dtype, device, size) for dtype in (torch.bfloat16, torch.float32))
    source = torch.zeros(_COPIED, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    memory = 2 * _COPIED / best_seconds(lambda: target.copy_(source), 4, device)
    launch = best_seconds(lambda: [source[:1].add_(1) for _ in range(_LAUNCHES)], 4, device) / _LAUNCHES
    instructions = wide / 2
    if refusal(device) is None:
        instructions = _search_speed(device, 16 * facts.multi_processor_count)
    name = torch.cuda.get_device_name(device)
    return Gpu(name, narrow, wide, memory, facts.L2_cache_size, facts.multi_processor_count, instructions, launch)


def _search_speed(device: torch.device, rows: int) -> float:
    """Instructions a second of the local search, of so many rows of few columns."""
    ones = torch.ones(rows, _SEARCHED, device=device)
    gradient = torch.arange(rows * _SEARCHED, device=device).sin().reshape(rows, _SEARCHED)
    grid = Grid(ones[:, : _SEARCHED // 128].T.contiguous(), None, ones[:, 0].contiguous(), Rule.NEAREST_VALUE, Scheme())
    given = (gradient, torch.eye(_SEARCHED, device=device), ones[0], grid, ones.mul(8).to(torch.uint8))
    seconds = best_seconds(lambda: local_search(*given), 4, device)
    return rows * _SEARCHED * steps_of(_SEARCHED) * VISIT_INSTRUCTIONS / seconds


def _path_seconds(plan: Plan) -> float:
    """Of the beam search of `--effort high`."""
    steps = BEAM_WIDTH * (1 + REVISITS)
    return steps * sum(n * k * (_PATH_SECONDS + k * _PATH_COLUMN_SECONDS) for n, k in plan.shapes.values())


def _parts(plan: Plan) -> list[int]:
    """Rows of every part whose curvature is kept."""
    groups = [[plan.shapes[layer][0] for layer in group] for block in plan.blocks for group in block.shared_inputs]
    return [sum(len(rows) for rows in part) for group in groups for part in row_parts(group)]


def _measured_flops(size: int = 768) -> float:
    """FLOP/s of a float32 matrix product here, best of a few."""
    a = torch.ones(size, size)
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        torch.mm(a, a)
        best = min(best, time.perf_counter() - start)
    return 2.0 * size**3 / best
