# Shapes: B sequences, T tokens of each.
"""A whole model's steps: reading a prompt, and writing one token of each of a batch's sequences, as CUDA graphs."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from duotone.speed_gpu.budget import Deadline, Row
from duotone.speed_gpu.decoder import Between, Decoder
from duotone.speed_gpu.forms import OWN, Form
from duotone.speed_gpu.linears import Bench
from duotone.speed_gpu.sizes import Sizes

DECODE, PREFILL = "decode", "prefill"
#: Of a device's memory, what runtimes give to weights and cache.
_OF_MEMORY = 0.9
#: Of the plan's, at most: a model's steps are long.
_DECODE_ROUNDS, _PREFILL_ROUNDS = 10, 3
#: Bytes of a value in a BF16 cache, and in an FP8 one.
BF16_CACHE, FP8_CACHE = 2, 1


@dataclass(frozen=True)
class Step:
    """kind DECODE: one token more for each of `batch` sequences of so many tokens; PREFILL: so many tokens of each at once.

    image_tokens: how many of them come as embeddings, before the others.
    """

    kind: str
    batch: int
    tokens: int
    image_tokens: int = 0

    def cached(self) -> int:
        """Tokens in the cache at its end."""
        return self.batch * (self.tokens + (self.kind == DECODE))


class Stage:
    """Where models run: the bench, what lies between linears there, and memory."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.is_cuda = bench.device.type == "cuda"

    @cached_property
    def between(self) -> Between:
        """Made when the first model is."""
        return Between.on(self.bench.device)

    @cached_property
    def memory(self) -> int:
        """Bytes that weights and cache may take."""
        whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if self.is_cuda:
            whole = torch.cuda.get_device_properties(self.bench.device).total_memory
        return int(_OF_MEMORY * whole)

    def largest_batch(self, sizes: Sizes, weights: int, length: int, value_bytes: int) -> int:
        """Sequences of so many tokens whose cache fits beside weights, by arithmetic."""
        return max(0, self.memory - weights) // (length * sizes.cache_bytes(value_bytes))

    def rows(self, sizes: Sizes, form: Form, steps: Sequence[Step], deadline: Deadline) -> Iterator[Row]:
        """A row for each step of a model of one form."""
        made: list[Decoder] = []
        for step in steps:
            facts = {
                "kind": step.kind, "model": sizes.name, "kernel": form.name, "batch": step.batch, "tokens": step.tokens,
                "image_tokens": step.image_tokens,
            }  # fmt: skip

            def measure(step: Step = step) -> Iterator[Row]:
                if not made:
                    made.append(self._decoder(sizes, form))
                yield self._measured(made[0], step)

            yield from deadline.attempt(facts, measure)

    def _decoder(self, sizes: Sizes, form: Form) -> Decoder:
        if self.is_cuda:
            torch.cuda.empty_cache()
        with torch.no_grad():
            return Decoder.random(sizes, form, self.bench.plan.group_size, self.between, self.bench.device)

    def _measured(self, model: Decoder, step: Step) -> Row:
        sizes, kv_bytes = model.sizes, step.cached() * model.sizes.cache_bytes(BF16_CACHE)
        held = model.weight_bytes + model.table.nbytes
        if held + kv_bytes > self.memory:
            raise MemoryError(
                f"{kv_bytes / 1e9:.0f} GB of cache beside {held / 1e9:.0f} GB of weights: more than the "
                f"{self.memory / 1e9:.0f} GB that this device has for them"
            )
        if self.is_cuda:
            torch.cuda.reset_peak_memory_stats(self.bench.device)
        with torch.no_grad():
            seconds, least = self._seconds(model, step)
        written = step.batch if step.kind == DECODE else step.batch * step.tokens
        return {
            "group_size": self.bench.plan.group_size,
            "ms": 1e3 * seconds,
            "ms_min": 1e3 * least,
            "tokens_per_second": written / seconds,
            "weight_bytes": model.weight_bytes,
            "kv_bytes": kv_bytes,
            "gbytes_per_second": (model.weight_bytes + kv_bytes) / seconds / 1e9,
            "read_gbytes_per_second": self.bench.ceilings.bandwidth / 1e9,
            "peak_bytes": torch.cuda.max_memory_allocated(self.bench.device) if self.is_cuda else None,
            "between_linears": model.between.how,
            "largest_batch": self.largest_batch(sizes, held, step.tokens + 1, BF16_CACHE),
        }

    def _seconds(self, model: Decoder, step: Step) -> tuple[float, float]:
        """Median and least."""
        device, clock, rounds = self.bench.device, self.bench.clock, self.bench.plan.rounds
        if step.kind == DECODE:
            cache = model.cache(step.batch, step.tokens + 1)
            tokens = torch.zeros(step.batch, 1, dtype=torch.int64, device=device)
            write = lambda: model.next_tokens(model.embedded(tokens), cache, step.tokens)  # noqa: E731
            return clock.median(write, min(rounds, _DECODE_ROUNDS))
        cache = model.cache(step.batch, step.tokens)
        shape = (step.batch, step.image_tokens, model.sizes.hidden)
        image = torch.randn(shape, dtype=torch.bfloat16, device=device)
        tokens = torch.zeros(step.batch, step.tokens - step.image_tokens, dtype=torch.int64, device=device)
        read = lambda: model.next_tokens(torch.cat([image, model.embedded(tokens)], 1), cache, 0)  # noqa: E731
        return clock.median(read, min(rounds, _PREFILL_ROUNDS))


def end_to_end_rows(stage: Stage, deadline: Deadline) -> Iterator[Row]:
    """Decoding at a few batch sizes, and prompts, of the same model with linears of each form."""
    plan = stage.bench.plan
    steps = [Step(DECODE, batch, plan.goal_context) for batch in plan.batches[:3]]
    steps += [Step(PREFILL, 1, prompt) for prompt in plan.prompts[1:]]
    for form in OWN:
        yield from stage.rows(plan.whole, form, steps, deadline)
