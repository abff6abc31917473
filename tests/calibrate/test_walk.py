# Shapes: T tokens of a window, K in_features, D hidden width.
"""Batches held inside a block: stops change nothing, new weights count from the stop on, and nothing stays behind."""

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from greenlet import greenlet
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from duotone.calibrate.data import token_batches
from duotone.calibrate.stream import start_stream
from duotone.calibrate.walk import Arrival, BlockWalk, Call
from duotone.errors import DuotoneError
from duotone.models.adapter import find_adapter
from duotone.models.table import Adapter
from duotone.phases import Phases
from duotone.runtime.load import load

ModelMaker = Callable[..., Path]
MODELS = pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "mistral", "bert"])
#: All of three batches wait at their stops, or only some, or none: the others walk anew.
WAITING = pytest.mark.parametrize("waiting", [None, 2, 0])


def first_block(
    tiny_model: ModelMaker, model_type: str, monkeypatch: pytest.MonkeyPatch
) -> tuple[nn.Module, list[Call], Adapter]:
    """The first block of a random model, called with three batches of 3, 3 and 1 windows as the model calls it."""
    monkeypatch.setattr("duotone.calibrate.data.BATCH_POSITIONS", 48)
    if model_type == "bert":
        torch.manual_seed(0)
        sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4}
        model = BertModel(BertConfig(vocab_size=256, max_position_embeddings=64, **sizes)).eval()
    else:
        model = load(tiny_model(model_type), torch.float32, "cpu")
    adapter = find_adapter({"model_type": model_type})
    blocks = list(model.get_submodule(adapter.blocks))
    tokens = torch.randint(0, 256, (7, 16), generator=torch.Generator().manual_seed(0))
    stream = start_stream(model, blocks, token_batches(tokens), Phases())
    calls = [Call(hidden, *stream.arguments[0][i]) for i, hidden in enumerate(stream.hidden)]
    assert [len(call.hidden) for call in calls] == [3, 3, 1]
    return blocks[0], calls, adapter


def walk_of(block: nn.Module, calls: list[Call], adapter: Adapter, waiting: int | None) -> BlockWalk:
    """A walk that stops before the first linear of each group and knows the streams."""
    return BlockWalk(
        block,
        calls,
        {group[0]: block.get_submodule(group[0]) for group in adapter.shared_inputs},
        {writer: block.get_submodule(reader) for writer, reader in adapter.streams},
        waiting,
    )


def run_whole(block: nn.Module, calls: list[Call], paths: Any) -> tuple[list[dict[str, Tensor]], list[Tensor]]:
    """For each batch the inputs of the modules at `paths`, and the block's output, from plain forwards."""
    seen: list[dict[str, Tensor]] = []
    handles = [
        block.get_submodule(path).register_forward_pre_hook(lambda _, x, path=path: seen[-1].update({path: x[0]}))
        for path in paths
    ]
    outputs = []
    for call in calls:
        seen.append({})
        with torch.no_grad():
            output = block(call.hidden, *call.positional, **call.named)
        outputs.append(output[0] if isinstance(output, tuple) else output)
    for handle in handles:
        handle.remove()
    return seen, outputs


def no_hook_is_left(block: nn.Module) -> bool:
    return not any(module._forward_pre_hooks or module._forward_hooks for module in block.modules())


@MODELS
@WAITING
def test_stops_change_nothing(
    tiny_model: ModelMaker, model_type: str, waiting: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inputs at each stop, residual streams where they are known, and outputs: bit for bit those of whole forwards."""
    block, calls, adapter = first_block(tiny_model, model_type, monkeypatch)
    readers = dict(adapter.streams)
    seen, outputs = run_whole(block, calls, {*readers.values(), *(group[0] for group in adapter.shared_inputs)})
    with walk_of(block, calls, adapter, waiting) as walk:
        for group in adapter.shared_inputs:
            arrivals = list(walk.until(group[0]))
            assert len(arrivals) == 3
            for arrival, expected in zip(arrivals, seen, strict=True):
                assert torch.equal(arrival.x, expected[group[0]])
                if group[0] in readers:
                    assert arrival.stream is not None and torch.equal(arrival.stream, expected[readers[group[0]]])
                else:
                    assert arrival.stream is None
        assert all(torch.equal(found, expected) for found, expected in zip(walk.finish(), outputs, strict=True))
    assert no_hook_is_left(block)
    assert len(readers) == 2, "the table knows no streams: nothing was tested"


@MODELS
@WAITING
def test_a_new_weight_counts_from_its_stop_on(
    tiny_model: ModelMaker, model_type: str, waiting: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each stop inputs are those of the block with the groups before it replaced; outputs, of one with all replaced."""
    block, calls, adapter = first_block(tiny_model, model_type, monkeypatch)
    firsts = [group[0] for group in adapter.shared_inputs]
    partly = copy.deepcopy(block)
    generator = torch.Generator().manual_seed(1)
    original, _ = run_whole(block, calls, firsts)
    with walk_of(block, calls, adapter, waiting) as walk:
        for i, group in enumerate(adapter.shared_inputs):
            expected, _ = run_whole(partly, calls, firsts)
            for batch, arrival in enumerate(walk.until(group[0])):
                assert torch.equal(arrival.x, expected[batch][group[0]])
                assert torch.equal(arrival.x, original[batch][group[0]]) == (i == 0)
            for name in group:
                new = torch.randn(block.get_submodule(name).weight.shape, generator=generator) * 0.1
                for where in (block, partly):
                    where.get_submodule(name).weight.data = new
        found = list(walk.finish())
    _, outputs = run_whole(partly, calls, ())
    assert all(torch.equal(a, b) for a, b in zip(found, outputs, strict=True))


# ---- a small block, whose forward can be looked at


class Three(nn.Module):
    """Three linears in a row; `guarded` runs them with its own grad mode, `fails_at` raises before the third, for one batch."""

    def __init__(self, guarded: bool | None = None, fails_at: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = (nn.Linear(8, 8) for _ in range(3))
        self.guarded, self.fails_at, self.begun, self.unwound = guarded, fails_at, 0, 0

    def forward(self, x: Tensor) -> Tensor:
        self.begun += 1
        try:
            if self.guarded is None:
                return self._run(x)
            with torch.set_grad_enabled(self.guarded):
                return self._run(x)
        except BaseException:
            self.unwound += 1
            raise

    def _run(self, x: Tensor) -> Tensor:
        y = self.b(self.a(x))
        if len(x) == self.fails_at:
            raise ZeroDivisionError("in the forward")
        return self.c(y)


def small_walk(block: Three, names: str = "abc", marks: dict[str, str] | None = None, waiting: int | None = None) -> BlockWalk:
    calls = [Call(torch.randn(n, 4, 8, generator=torch.Generator().manual_seed(n)), (), {}) for n in (3, 2, 1)]
    stops = {name: block.get_submodule(name) for name in names}
    return BlockWalk(block, calls, stops, {name: block.get_submodule(at) for name, at in (marks or {}).items()}, waiting)


def left_early(walk: BlockWalk) -> None:
    """Leave with the first batch at `b`, the second at `a`, and the third not begun."""
    with walk:
        at_a, at_b = walk.until("a"), walk.until("b")
        next(at_a), next(at_a), next(at_b)


def failed(walk: BlockWalk) -> None:
    with pytest.raises(KeyError, match="body"), walk:
        list(walk.until("b"))
        raise KeyError("body")


@pytest.mark.parametrize("end", [left_early, failed])
def test_an_abandoned_walk_leaves_no_trace(end: Callable[[BlockWalk], None]) -> None:
    """An error in the body, or nobody asks for the end: forwards are unwound, hooks removed, the block computes what it did."""
    block = Three()
    x = torch.randn(2, 4, 8)
    with torch.no_grad():
        before = block(x)
    walk = small_walk(block)
    end(walk)
    assert block.unwound == (2 if end is left_early else 3)
    assert no_hook_is_left(block)
    with torch.no_grad():
        assert torch.equal(block(x), before)
    with small_walk(block) as again:  # and it can be walked again
        assert len(list(again.until("c"))) == 3


def test_an_error_in_the_forward_comes_out_as_it_is() -> None:
    """Of the second batch: the first one, held before `c`, is unwound too."""
    block = Three(fails_at=2)
    with pytest.raises(ZeroDivisionError, match="in the forward"), small_walk(block) as walk:
        list(walk.until("c"))
    assert block.unwound == 2
    assert no_hook_is_left(block)


def test_a_stop_that_is_never_reached_is_named() -> None:
    """Because the forward does not come by, or because the walk is past it already."""
    block = Three()
    block.spare = nn.Linear(8, 8)
    stops = {"a": block.a, "model.layers.0.spare": block.spare}
    calls = [Call(torch.randn(2, 4, 8), (), {})]
    message = r"^model\.layers\.0\.spare: the forward pass never reached it, expected an input to calibrate on$"
    with pytest.raises(DuotoneError, match=message), BlockWalk(block, calls, stops, {}) as walk:
        list(walk.until("a"))
        list(walk.until("model.layers.0.spare"))
    with pytest.raises(DuotoneError, match=r"^a: the forward pass never reached it"), small_walk(block) as walk:
        list(walk.until("b"))
        list(walk.until("a"))
    assert no_hook_is_left(block)


def test_stops_may_be_passed_by() -> None:
    """Asking for a later stop walks through those before; a stop asked for twice gives the same; arrivals come in order."""
    block = Three()
    with small_walk(block) as walk:
        at_b = [arrival.x for arrival in walk.until("b")]
        assert [len(x) for x in at_b] == [3, 2, 1]
        assert all(torch.equal(again.x, x) for again, x in zip(walk.until("b"), at_b, strict=True))
        outputs = list(walk.finish())
        assert all(torch.equal(block.c(block.b(x)), y) for x, y in zip(at_b, outputs, strict=True))


def test_a_mark_may_be_a_stop_itself() -> None:
    """The stream is noted before its reader stops (BERT's first group reads the stream), and each batch has its own."""
    block = Three()
    with small_walk(block, "abc", {"b": "a", "c": "a"}) as walk:
        at_a = [arrival.x for arrival in walk.until("a")]
        for name in "bc":
            for arrival, x in zip(walk.until(name), at_a, strict=True):
                assert arrival.stream is x


def test_other_callers_are_not_stopped() -> None:
    """While batches wait, the block and its linears can be called as usual, from another greenlet too."""
    block, x = Three(), torch.randn(2, 4, 8)
    expected = block(x)
    with small_walk(block) as walk:
        list(walk.until("b"))
        assert torch.equal(block(x), expected)
        assert torch.equal(greenlet(block).switch(x), expected)
        assert len(list(walk.finish())) == 3


def test_two_walks_side_by_side() -> None:
    """Turn by turn through two blocks, as the quantized and the original prefix are: each batch goes on where it was."""
    one, other = Three(), Three()
    other.b.weight.data.neg_()
    with small_walk(one) as left, small_walk(other) as right:
        for name in "abc":
            pairs: Iterator[tuple[Arrival, Arrival]] = zip(left.until(name), right.until(name), strict=True)
            same = [torch.equal(a.x, b.x) for a, b in pairs]
            assert same == [name != "c"] * 3
        ends = list(left.finish()), list(right.finish())
    for block, outputs, walk in zip((one, other), ends, (left, right), strict=True):
        assert all(torch.equal(block(call.hidden), y) for call, y in zip(walk._calls, outputs, strict=True))


@pytest.mark.parametrize("waiting", [None, 0, 1])
def test_who_does_not_wait_begins_anew(waiting: int | None) -> None:
    """Forwards begun: one of each batch that waits; of the others one for each stop asked for, and one for the end.

    At most `waiting` batches, and the one that is looked at, hold activations at a time.
    """
    block, waits = Three(), 3 if waiting is None else waiting
    with small_walk(block, "abc", {"c": "b"}, waiting) as walk:
        for i, name in enumerate("bc", 1):
            held: list[weakref.ref[Tensor]] = []
            for n, arrival in enumerate(walk.until(name)):
                held.append(weakref.ref(arrival.x))
                del arrival
                assert [tensor() is not None for tensor in held] == [m < waits or m == n for m in range(n + 1)]
            assert block.begun == waits + i * (3 - waits)
        list(walk.finish())
    assert block.begun == waits + 3 * (3 - waits)
    assert block.unwound == 2 * (3 - waits)


@pytest.mark.parametrize("waiting", [None, 0])
@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("guarded", [None, True, False])
def test_grad_mode_is_the_callers(waiting: int | None, enabled: bool, guarded: bool | None) -> None:
    """In the body, between arrivals, after the end or an abandoned walk, even of a forward that sets its own."""
    for finish in (True, False):
        with torch.set_grad_enabled(enabled), small_walk(Three(guarded), waiting=waiting) as walk:
            for name in "abc":
                for arrival in walk.until(name):
                    assert torch.is_grad_enabled() == enabled
                    assert guarded or not arrival.x.requires_grad
            assert torch.is_grad_enabled() == enabled
            if finish:
                list(walk.finish())
            del arrival
            walk.__exit__()
            assert torch.is_grad_enabled() == enabled


@pytest.mark.parametrize("waiting", [None, 1, 0])
def test_activations_are_freed_at_once(waiting: int | None) -> None:
    """Without the garbage collector: nothing of a block, finished or abandoned, is held while the next one runs."""
    gc.disable()
    try:
        for finish in (True, False):
            with small_walk(Three(), "abc", {"c": "b"}, waiting) as walk:
                held = [weakref.ref(arrival.x) for arrival in walk.until("b")]
                held += [weakref.ref(arrival.x) for arrival in walk.until("c")]
                if finish:
                    held += [weakref.ref(output) for output in walk.finish()]
            del walk
            assert [tensor() for tensor in held] == [None] * (9 if finish else 6)
    finally:
        gc.enable()
