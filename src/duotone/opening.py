"""How the calibration's samples come to the blocks: what lies before these is loaded and run."""

from typing import Any

from duotone.calibrate.samples import Samples
from duotone.calibrate.stream import BlockStream, start_stream
from duotone.checkpoint.source import load_finite
from duotone.errors import DuotoneError
from duotone.models.skeleton import expected_tensors, fill, release, tie_weights
from duotone.models.tokenizer import check_tokens
from duotone.run import Run


def open_stream(run: Run, skeleton: Any, samples: Samples, done: int) -> BlockStream:
    """Load what lies before the block to begin with and compute the hidden states at its entrance.

    done: blocks that an earlier run has behind it. Where a vision tower is to be quantized first, this is its stream. Raises
    DuotoneError for samples that the model cannot take.
    """
    plan = run.plan
    if hasattr(samples, "tokens"):
        check_tokens(samples.tokens, skeleton, plan.source.path)  # pyright: ignore[reportAttributeAccessIssue]
    if plan.tower_blocks and not _shows_images(samples):
        raise DuotoneError(
            f"--quantize-vision: found calibration without images ({samples.sources[0]}), expected --calibration FILE.jsonl "
            "whose rows have an image beside their text"
        )
    heads = {f"{layer}.{leaf}" for layer in plan.anatomy.keep.keys() - plan.anatomy.seeing for leaf in ("weight", "bias")}
    known = expected_tensors(skeleton)
    names = [name for name in plan.outside if name not in heads and name in known]
    names += [name for block in plan.blocks[: plan.tower_blocks] for name in block.tensors]
    with run.phases("read"):
        fill(skeleton, load_finite(plan.source, tuple(names)), run.dtype, run.device)
        tie_weights(skeleton)
    drift = plan.config.method_facts.drift
    if done < plan.tower_blocks:
        stream = _start(run, skeleton, samples, slice(plan.tower_blocks))
        stream.after = _start(run, skeleton, samples, slice(plan.tower_blocks, None)) if drift else None
    else:
        stream = _start(run, skeleton, samples, slice(plan.tower_blocks, None))
    if drift:
        stream.carry_original(stream if plan.tower_blocks else None)
    return stream


def behind_tower(run: Run, skeleton: Any, samples: Samples, tower: BlockStream) -> BlockStream:
    """The stream of the language model, whose images come through the quantized tower; beside it what the original saw."""
    stream = _start(run, skeleton, samples, slice(run.plan.tower_blocks, None))
    if tower.after is not None:
        stream.carry_original(tower.after)
    for block in run.plan.blocks[: run.plan.tower_blocks]:
        release(skeleton.get_submodule(block.path))
    return stream


def _start(run: Run, skeleton: Any, samples: Samples, which: slice) -> BlockStream:
    """The stream at the entrance of some of the blocks."""
    plan = run.plan
    part = plan.anatomy.tower if which.start is None and plan.anatomy.tower is not None else plan.anatomy
    written = plan.seq_len // 2 if plan.anatomy.writes_another else 0
    with run.phases("forward"):
        blocks = [skeleton.get_submodule(block.path) for block in plan.blocks[which]]
        batches = samples.batches(run.ranks.size, written)
        batches = batches[run.ranks.shares(len(batches))[run.ranks.rank]]
        shared = (run.phases, run.ranks, run.offload)
        stream = start_stream(skeleton, blocks, batches, *shared, part.gives, run.device)
    stream.first, stream.waiting_bytes = which.start or 0, plan.waiting_bytes
    return stream


def _shows_images(samples: Samples) -> bool:
    return any(name.startswith("pixel_values") for name in samples.batches()[0])
