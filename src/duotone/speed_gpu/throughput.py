"""Tokens a second of whole requests: a batch of prompts is read, one after the other, then all of them are written to together.

Steps are measured at some batch sizes and lengths; a request's time is computed from these, each row saying so. The time of a
step grows with the cache as attention reads it: between two lengths, and beyond the last, along a line.
"""

import bisect
from collections.abc import Iterator, Sequence

from duotone.speed_gpu.budget import Deadline, Row
from duotone.speed_gpu.forms import OWN, Form
from duotone.speed_gpu.sizes import Sizes
from duotone.speed_gpu.steps import BF16_CACHE, DECODE, FP8_CACHE, PREFILL, Stage, Step

_HOW = "computed from measured steps: batch x the prompt alone + tokens x a step halfway, on a line through two lengths"


def throughput_rows(stage: Stage, deadline: Deadline) -> Iterator[Row]:
    """Of each model and form: its steps, then what follows from them for every batch, prompt and output of the plan."""
    plan = stage.bench.plan
    for sizes, images in ((plan.whole, 0), (plan.seeing, plan.image_tokens)):
        steps = [Step(PREFILL, 1, images + prompt, images) for prompt in plan.prompts]
        steps += [Step(DECODE, batch, context) for batch in plan.batches for context in plan.contexts]
        for form in OWN:
            measured: dict[Step, float] = {}
            for row in stage.rows(sizes, form, steps, deadline):
                step = Step(row["kind"], row["batch"], row["tokens"], row["image_tokens"])
                if "ms" in row:
                    measured[step] = row["ms"] / 1e3
                yield row
            yield from _computed(stage, sizes, form, images, measured)


def _computed(stage: Stage, sizes: Sizes, form: Form, images: int, measured: dict[Step, float]) -> Iterator[Row]:
    plan = stage.bench.plan
    linears = sum(form.nbytes(shape, plan.group_size) for shape in sizes.linears().values())
    weights = sizes.layers * linears + 2 * 2 * sizes.vocabulary * sizes.hidden
    for batch in plan.batches:
        points = sorted(
            (step.tokens, seconds) for step, seconds in measured.items() if (step.kind, step.batch) == (DECODE, batch)
        )
        for prompt in plan.prompts:
            reading = measured.get(Step(PREFILL, 1, images + prompt, images))
            for output in plan.outputs:
                length = images + prompt + output
                largest = [stage.largest_batch(sizes, weights, length, size) for size in (BF16_CACHE, FP8_CACHE)]
                row: Row = {
                    "kind": "throughput", "model": sizes.name, "kernel": form.name, "batch": batch, "prompt_tokens": prompt,
                    "image_tokens": images, "new_tokens": output, "weight_bytes": weights,
                    "kv_bytes": batch * length * sizes.cache_bytes(BF16_CACHE),
                    "kv_bytes_fp8": batch * length * sizes.cache_bytes(FP8_CACHE),
                    "largest_batch": largest[0], "largest_batch_fp8_cache": largest[1],
                }  # fmt: skip
                step = seconds_at(points, images + prompt + output / 2)
                if batch > largest[0]:
                    yield row | {"unmeasured": f"a batch of {batch} does not fit: {largest[0]} do, with a BF16 cache"}
                elif reading is None or step is None:
                    yield row | {"unmeasured": "the steps that it follows from were not measured"}
                else:
                    seconds = batch * reading + output * step
                    yield row | {"how": _HOW, "seconds": seconds, "tokens_per_second": batch * output / seconds}


def seconds_at(points: Sequence[tuple[int, float]], length: float) -> float | None:
    """Of a step at a length, on the line through the two measured ones (length, seconds) around it, or the nearest two."""
    if len(points) < 2:
        return next((seconds for at, seconds in points if at == length), None)
    right = min(max(1, bisect.bisect_left([at for at, _ in points], length)), len(points) - 1)
    (a, first), (b, second) = points[right - 1 : right + 1]
    return first + (second - first) * (length - a) / (b - a)
