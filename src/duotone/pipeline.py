# Shapes: N out_features, K in_features.
"""The story: open, plan, and for each block: load, observe, equalize, solve, pass on, pack, write.

Only the current block's weights and the calibration activations are in memory; a block's tensors are on disk before the
next block is read. The output folder appears when everything in it is whole.
"""

import copy
import dataclasses
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from duotone.advice import idle_advice
from duotone.calibrate.cache import CacheWatch
from duotone.calibrate.curvature import Backward, measure_curvature
from duotone.calibrate.observer import Observer
from duotone.calibrate.offload import choose_keeper
from duotone.calibrate.pairs import ImageTextPairs, draw_samples
from duotone.calibrate.samples import Samples, are_tensors, input_shapes, read_samples
from duotone.calibrate.sources import calibration_sources
from duotone.calibrate.stream import BlockStream
from duotone.checkpoint.ahead import ReadAhead
from duotone.checkpoint.hub import locate_model
from duotone.checkpoint.kv_cache import scale_tensors
from duotone.checkpoint.scratch import Scratch
from duotone.checkpoint.source import load_finite, open_source
from duotone.checkpoint.staging import check_output
from duotone.contract import kv_scale, static_activation_scale
from duotone.device import calibration_dtype, peak_bytes, resolve_device
from duotone.errors import DuotoneError
from duotone.floors import phase_work
from duotone.models.caching import key_heads
from duotone.models.experts import FEW_TOKENS, Experts
from duotone.models.skeleton import build_skeleton, fill, is_parameter, release
from duotone.opening import behind_tower, open_stream
from duotone.outcome import QuantizeReport, calibration_facts, notes_of
from duotone.output import made_output
from duotone.phases import Phases, return_memory
from duotone.plan import BlockPlan, Plan, make_plan
from duotone.qweight import AnyWeight, dequantize
from duotone.ranks import ALONE, Ranks
from duotone.run import Progress, Run
from duotone.settings import QuantizeConfig
from duotone.solver.drift import bias_shift
from duotone.solver.statistics import Statistics
from duotone.solving import solve_group, use_solver
from duotone.transforms.equalization import equalize
from duotone.unfinished import run_settings

#: Where `--effort high` keeps curvatures while it runs, inside the folder that is being made.
_SCRATCH = ".curvature"


def quantize(
    model: str | Path,
    out: str | Path,
    config: QuantizeConfig,
    progress: Progress | None = None,
    *,
    resume: bool = False,
    save_every: float = 60.0,
    offload: str | Path | None = None,
    ranks: Ranks = ALONE,
) -> QuantizeReport:
    """Quantize a model folder or hub id into the folder `out`.

    resume: go on with a run that was killed, from where it last saved; save_every: seconds of work between two saves, at least.
    offload: a folder for the hidden states of calibration, which are in memory otherwise.
    The same bytes come out, killed or not. ranks: the processes that share the work; all of them call this, the first writes.
    Raises DuotoneError; then `out` is as it was before, or holds what was saved.
    """
    phases = Phases()
    tell: Progress = progress or (lambda *_: None)
    with phases("read"):
        folder, out = locate_model(model), Path(out)
        if ranks.first:
            check_output(out)
        device = ranks.place(resolve_device(config.device), config.device)
        plan = make_plan(open_source(folder), config)
        windows = _calibration_samples(plan) if config.needs_calibration else None
        _check_effort(plan, windows)
        _check_shared(config, windows, ranks)
        tokens = windows.positions if windows is not None else 0
        dtype = calibration_dtype(config.dtype, device, tokens * plan.weights, config.high_effort)
    report = QuantizeReport(
        str(model), str(out), config, calibration_facts(windows, dtype), kept=plan.kept, notes=notes_of(plan, windows)
    )
    report.original_bytes, report.inputs = plan.source.weight_bytes, input_shapes(config.calibration)
    report.bits_per_weight, report.quantized_macs_share = plan.bits_per_weight, plan.quantized_macs_share
    report.work = {
        phase: dataclasses.asdict(work) for phase, work in phase_work(plan, tokens, plan.seq_len, dtype, device).items()
    }
    run = Run(plan, device, dtype, phases, report, ranks)
    ahead = _use_device(run, offload, windows)
    with made_output(run, out, resume, run_settings(plan, device, dtype, windows, ranks), save_every) as output, ahead:
        skeleton = build_skeleton(plan.source.config, dtype)
        steps, before, done = len(plan.blocks), 0, output.done or 0
        stream = open_stream(run, skeleton, windows, done) if windows is not None else None
        if stream is not None and windows is not None and config.high_effort and output.folder is not None:
            steps, before = 3 * steps, 2 * steps  # forward, backward, and the quantizing
            run.curvatures = Scratch(output.folder / _SCRATCH, anew=output.done is None)
            if output.done is None:
                _measure_curvature(run, skeleton, stream, windows, lambda done: tell(done, steps, "measuring curvature"))
        if stream is not None and output.done is not None and done < len(plan.blocks):
            output.take_up(stream)
        for index, block in enumerate(plan.blocks[done:], done):
            if stream is not None and windows is not None and done < index == plan.tower_blocks:
                stream = behind_tower(run, skeleton, windows, stream)
            if index >= plan.tower_blocks:  # what the tower saw before is not kept
                output.save_if_due(index, stream)
            tell(before + index, steps, block.path)
            output.write_block(block, *quantize_block(run, index, block, skeleton, stream))
        idle = {layer.layer: layer.dead_columns for layer in report.layers}
        report.notes += [one.sentence for one in idle_advice(plan, idle) if one.sentence not in report.notes]
        tell(steps, steps, "writing")
        output.finish()
    report.seconds, report.device_bytes = dict(phases.seconds), peak_bytes(device)
    report.peak_bytes, report.phase_bytes = phases.peak_bytes(), dict(phases.peaks)
    return report


def _use_device(run: Run, offload: str | Path | None, windows: Samples | None) -> ReadAhead:
    """See how blocks are read, where hidden states will be, what times the phases, and whether the solver is compiled."""
    plan, device = run.plan, run.device
    use_solver(run)
    state_bytes: int | None = 0
    if windows is not None:  # of what is no text, nobody knows how long a sample will be
        states = 2 * (1 + plan.config.method_facts.drift)  # what enters a block and what leaves it, of one prefix or two
        width = plan.hidden_size if "tokens" in windows.tensors else 0
        state_bytes = states * windows.positions // run.ranks.size * width * run.dtype.itemsize or None
    run.offload, run.report.states_in = choose_keeper(offload, device, state_bytes)
    sizes = [sum(plan.source.tensors[name].nbytes for name in block.tensors) for block in plan.blocks]
    run.ahead = ReadAhead(plan.source, [block.tensors for block in plan.blocks], device, max(sizes, default=0))
    return run.ahead


def quantize_block(
    run: Run, index: int, block: BlockPlan, skeleton: nn.Module, stream: BlockStream | None
) -> tuple[dict[str, AnyWeight], dict[str, Tensor]]:
    """Load one block and solve its linears, group after group, while the calibration windows walk through it.

    Returns the quantized weights, and the other tensors that have changed with them: biases, norms that were equalized, and
    the scales of the cache.
    """
    with run.phases("read"):
        originals = load_finite(run.plan.source, block.tensors) if run.ahead is None else run.ahead.block(index)
    weights: dict[str, AnyWeight] = {}
    changed: dict[str, Tensor] = {}
    if stream is None:
        for group in block.shared_inputs:
            weights |= solve_group(run, group, originals, None)
        return_memory()
        return weights, changed
    fill(skeleton, originals, run.dtype, run.device)
    module, method = skeleton.get_submodule(block.path), run.plan.config.method_facts
    if isinstance(module, PreTrainedModel):  # the whole model is the block
        module.tie_weights()
    original = copy.deepcopy(module) if method.drift else None
    # Methods that do not go group by group look at a block that stays as it was, a group at a time: one Hessian in memory.
    untouched = copy.deepcopy(module) if method.needs_statistics and not method.sequential else None
    watch = CacheWatch(skeleton.get_submodule(block.caches[0])) if block.caches else None
    with ExitStack() as stack:
        stack.enter_context(watch or nullcontext())
        observer = stack.enter_context(stream.enter(index, module, block.stops, block.streams, original))
        ahead = (
            stack.enter_context(stream.enter(index, untouched, block.stops, {}, aside=True)) if untouched is not None else None
        )
        for group in block.shared_inputs:
            expert = group[0] in block.experts
            for seen, where, beside in ((observer, module, original), (ahead, untouched, None)):
                if seen is not None and where is not None and group[0] in block.banks:
                    _look_at_routing(run, seen, block, block.banks[group[0]], where, beside)
            statistics = observer.observe(group[0], method.needs_statistics and method.sequential, expert)
            if ahead is not None:
                statistics = ahead.observe(group[0], expert=expert)
            s_K: Tensor | None = None
            if statistics is not None and run.plan.config.equalize is not None and group[0] in block.norms:
                done = equalize(originals, *block.norms[group[0]], group, statistics, run.plan.config.equalize)
                s_K, statistics = done.s_K, done.statistics
                changed, originals = changed | done.tensors, originals | done.tensors
                observer.absmax[group[0]] /= s_K
            free = statistics is not None and method.drift and all(f"{layer}.bias" in originals for layer in group)
            solved = solve_group(run, group, originals, statistics.centered() if statistics and free else statistics)
            for layer, weight in solved.items():
                linear, values = skeleton.get_submodule(layer), dequantize(weight)
                if statistics is not None and free:
                    changed[f"{layer}.bias"] = _corrected_bias(layer, originals, values, statistics)
                    _set(linear, "bias", changed[f"{layer}.bias"])
                # The walk has passed the norm already, and keeps its old weight.
                _set(linear, "weight", values if s_K is None else values / s_K)
            weights |= solved
        if not stream.is_last(index) or watch is not None:
            stream.leave(observer)
    if index >= run.plan.tower_blocks:  # the tower is still to be looked through
        release(module)
    return_memory()
    if watch is not None and block.caches:
        changed |= _cache_scales(run, block.caches[1], watch, key_heads(skeleton))
    if not run.plan.config.scheme.target.dynamic_activations:
        weights = _with_input_scales(block, weights, observer.absmax)
    return weights, changed


def _look_at_routing(
    run: Run, observer: Observer, block: BlockPlan, bank: str, module: nn.Module, original: nn.Module | None
) -> None:
    """See that no expert goes without tokens to calibrate on; or that each gets all, if that is asked for."""
    path = bank.removeprefix(block.prefix)
    experts, beside = module.get_submodule(path), None if original is None else original.get_submodule(path)
    assert isinstance(experts, Experts)
    assert beside is None or isinstance(beside, Experts)
    if run.plan.config.calibrate_all_experts:
        experts.shown_all = frozenset(range(experts.count))
        if beside is not None:
            beside.shown_all = experts.shown_all
        return
    starved = observer.show_starved(bank, experts, beside)
    note = f"{bank}: {starved} of {experts.count} experts got fewer than {FEW_TOKENS} calibration tokens and were shown all"
    if starved and note not in run.report.notes:
        run.report.notes.append(note)


def _corrected_bias(layer: str, originals: dict[str, Tensor], v_NK: Tensor, statistics: Statistics) -> Tensor:
    """The bias that keeps the mean output the original's, in the BF16 it is stored in."""
    w_NK = originals[f"{layer}.weight"].to(v_NK.device, torch.float32)
    bias_N = originals[f"{layer}.bias"].to(v_NK.device, torch.float32)
    return (bias_N + bias_shift(w_NK, v_NK, statistics)).to(torch.bfloat16)


def _set(linear: nn.Module, name: str, value: Tensor) -> None:
    """Put a value in a parameter's place, in the parameter's dtype."""
    parameter = linear.get_parameter(name)
    parameter.data = value.to(parameter.dtype)


def _with_input_scales(block: BlockPlan, weights: dict[str, AnyWeight], absmax: dict[str, Tensor]) -> dict[str, AnyWeight]:
    """Add the static activation scale of each shared input, measured on the quantized block (activation scales come last)."""
    scaled: dict[str, AnyWeight] = {}
    for group in block.shared_inputs:
        for layer in group:
            scale = static_activation_scale(absmax[group[0]].amax(), weights[layer].scheme.target)
            scaled[layer] = dataclasses.replace(weights[layer], input_scale=scale)
    return scaled


def _cache_scales(run: Run, attention: str, watch: CacheWatch, heads: int) -> dict[str, Tensor]:
    """The scales of a layer's keys and values, of all that went by. Raises DuotoneError when they were not finite."""
    config = run.plan.config
    with run.phases("exchange" if run.ranks.size > 1 else "forward"):
        largest = watch.absmax(attention, heads, run.ranks)
    if config.kv_cache_strategy == "tensor":
        largest = tuple(of_heads.amax().reshape(1) for of_heads in largest)
    try:
        keys, values = (kv_scale(absmax, config.scheme.target) for absmax in largest)
    except ValueError:
        raise DuotoneError(f"{attention}: found NaN or infinite keys or values on the calibration text") from None
    return scale_tensors(attention, config.kv_cache_strategy, (keys, values))


def _measure_curvature(run: Run, skeleton: Any, stream: BlockStream, windows: Samples, tell: Callable[[int], None]) -> None:
    """Forward and backward through the original model; what it finds lies in a scratch folder beside the new checkpoint."""
    plan, dtype = run.plan, run.dtype
    assert run.curvatures is not None
    heads = [name for name in plan.outside if is_parameter(skeleton, name) and skeleton.get_parameter(name).is_meta]
    with run.phases("read"):
        fill(skeleton, load_finite(plan.source, tuple(heads)), dtype, run.device)
        skeleton.tie_weights()
    blocks = [skeleton.get_submodule(block.path) for block in plan.blocks]

    def load(index: int) -> None:
        with run.phases("read"):
            fill(skeleton, load_finite(plan.source, plan.blocks[index].tensors), dtype, run.device)

    backward = Backward(
        skeleton, blocks, [block.shared_inputs for block in plan.blocks], load, lambda index: release(blocks[index])
    )
    measure_curvature(backward, stream, windows.tensors["tokens"], plan.config.seed, run.curvatures.write, tell)
    release(skeleton, heads)


def _calibration_samples(plan: Plan) -> Samples:
    config, folder = plan.config, plan.source.path
    if are_tensors(config.calibration):
        return read_samples(config.calibration, plan.anatomy.inputs, config.samples, config.seed)
    if plan.anatomy.inputs[0] != "input_ids":
        raise DuotoneError(
            f"{folder}: the model reads {plan.anatomy.inputs[0]}, expected --calibration FILE.safetensors of them"
        )
    sources = calibration_sources(config.calibration, folder)
    return draw_samples(folder, sources, plan.seq_len, config.samples, config.seed, plan.image_tokens)


def _check_effort(plan: Plan, windows: Samples | None) -> None:
    """Raise DuotoneError where the curvature of the loss cannot be had."""
    if plan.config.high_effort and isinstance(windows, ImageTextPairs):
        raise DuotoneError("--effort high: found calibration on images, expected text alone, or no --effort")
    if plan.config.high_effort and (plan.anatomy.whole or windows is None or "tokens" not in windows.tensors):
        raise DuotoneError(
            f"--effort high: {plan.source.path} is no stack of blocks that reads tokens, expected one; leave --effort out"
        )


def _check_shared(config: QuantizeConfig, windows: Samples | None, ranks: Ranks) -> None:
    """Raise DuotoneError for what several processes cannot share."""
    if ranks.size > 1 and config.high_effort:
        raise DuotoneError(f"--effort high: found {ranks.size} processes, expected one: it cannot be shared yet")
    if windows is not None and len(windows) < ranks.size:
        raise DuotoneError(
            f"--samples: found {len(windows)} calibration windows for {ranks.size} processes, expected one for each"
        )
