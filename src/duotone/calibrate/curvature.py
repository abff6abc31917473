# Shapes: T tokens of a window, D hidden width, N out_features, V vocabulary.
"""The curvature of the model's loss in the outputs of its linears: one pass forward and one backward, a block at a time.

For KL(original || quantized) the curvature at the original is the Fisher information: the second moments of the gradients of
log p(y), y drawn from the original model's own predictions (Kronecker-factored, one factor for each group of linears that read
the same input; the other is their Hessian). An encoder without logits has its squared output error for a loss; its gradients
come from random projections of the last hidden states.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from duotone.calibrate.stream import BlockStream
from duotone.errors import DuotoneError
from duotone.solver.couple import row_parts
from duotone.solver.statistics import StatisticsAccumulator

#: Logits of one step of the head: 1 GiB in float32.
_HEAD_VALUES = 2**28
#: (name of a group's first linear, curvature of each of its parts): keeps them
Keep = Callable[[str, list[Tensor]], None]


@dataclass(frozen=True)
class Backward:
    """A model to go backward through. blocks: their modules. groups: for each, the linears that share an input, by full name.

    load and release: put a block's original weights into the model, and take them out again.
    """

    model: PreTrainedModel
    blocks: Sequence[nn.Module]
    groups: Sequence[Sequence[tuple[str, ...]]]
    load: Callable[[int], None]
    release: Callable[[int], None]


def measure_curvature(
    backward: Backward, stream: BlockStream, tokens: Tensor, seed: int, keep: Keep, tell: Callable[[int], None]
) -> None:
    """Go through all blocks and back; hand every group's curvature to `keep`, the last block's first.

    tokens: int64 [windows, T], those of the stream, whose hidden states are left where they are. tell: hears how many of the
    blocks are done, each counting twice.
    """
    entered = [list(stream.hidden)]
    for index, block in enumerate(backward.blocks):
        with _loaded(backward, index), stream.phases("curvature"), torch.no_grad():
            outputs = (block(states, *positional, **named) for states, positional, named in stream.calls(index, entered[-1]))
            entered.append(list(stream.entering(index + 1, (_hidden(output) for output in outputs))))
        tell(index + 1)
    with stream.phases("curvature"):
        gradients = _head_gradients(backward, entered.pop(), tokens, seed)
    for index in reversed(range(len(backward.blocks))):
        with _loaded(backward, index), stream.phases("curvature"):
            gradients = _block_gradients(backward, index, stream, entered.pop(), gradients, keep)
        tell(2 * len(backward.blocks) - index)


@contextmanager
def _loaded(backward: Backward, index: int) -> Iterator[None]:
    backward.load(index)
    try:
        yield
    finally:
        backward.release(index)


def _hidden(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _head_gradients(backward: Backward, states: Sequence[Tensor], tokens: Tensor, seed: int) -> list[Tensor]:
    """Gradients [windows, T, D] in the last block's outputs, batch by batch, of the log-likelihood of labels drawn from it."""
    # Labels are drawn on the CPU: the same on every device.
    generator = torch.Generator().manual_seed(seed)
    vocabulary = int(getattr(backward.model.config.get_text_config(), "vocab_size", 0) or 1)
    windows = max(1, _HEAD_VALUES // (tokens.shape[1] * vocabulary))
    gradients: list[Tensor] = []
    for batch, hidden in zip(tokens.split([len(hidden) for hidden in states]), states, strict=True):
        parts = zip(batch.split(windows), hidden.split(windows), strict=True)
        gradients.append(torch.cat([_head_gradient(backward, ids, part, generator) for ids, part in parts]))
    return gradients


def _head_gradient(backward: Backward, ids: Tensor, states: Tensor, generator: torch.Generator) -> Tensor:
    """One step of it: the model is called as ever, with blocks that hand the states through."""
    leaf, model = states.detach().requires_grad_(), backward.model
    for block in backward.blocks[:-1]:
        block.forward = _pass_on
    backward.blocks[-1].forward = _return_leaf(leaf)
    try:
        with torch.enable_grad():
            output = model(input_ids=ids.to(model.device), use_cache=False)
            logits = getattr(output, "logits", None)
            _loss(output.last_hidden_state if logits is None else logits, logits is not None, generator).backward()
    finally:
        for block in backward.blocks:
            del block.forward
    assert leaf.grad is not None
    return leaf.grad


def _return_leaf(leaf: Tensor) -> Callable[..., Tensor]:
    return lambda *_, **__: leaf


def _pass_on(hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
    return hidden_states


def _loss(output: Tensor, is_logits: bool, generator: torch.Generator) -> Tensor:
    """A scalar whose gradients have the loss's curvature for second moments."""
    if not is_logits:
        return (output * torch.randn(output.shape, generator=generator).to(output.device)).sum()
    logp = torch.log_softmax(output.float(), -1).flatten(0, -2)
    label = torch.multinomial(logp.detach().exp().cpu(), 1, generator=generator).to(logp.device)
    return -logp.gather(-1, label).sum()


def _block_gradients(
    backward: Backward, index: int, stream: BlockStream, states: list[Tensor], gradients: list[Tensor], keep: Keep
) -> list[Tensor]:
    """Go backward through one block: its groups' curvatures to `keep`, the gradients at its entrance returned."""
    groups, block = backward.groups[index], backward.blocks[index]
    linears = {name: backward.model.get_submodule(name) for group in groups for name in group}
    parts = {group[0]: row_parts([_rows(linears[name]) for name in group]) for group in groups}
    sums: dict[str, list[StatisticsAccumulator]] = {}
    entered: list[Tensor] = []
    for (hidden, positional, named), gradient in zip(stream.calls(index, states), gradients, strict=True):
        leaf = hidden.detach().requires_grad_()
        with torch.enable_grad(), _watching(linears) as seen:
            _hidden(block(leaf, *positional, **named)).backward(gradient)
        for group in groups:
            missing = next((name for name in group if name not in seen), None)
            if missing is not None:
                raise DuotoneError(f"{missing}: the loss has no gradient in its output, expected one to measure its curvature")
            cut = [
                torch.cat([seen[name][..., rows] for name, rows in zip(group, part, strict=True)], -1)
                for part in parts[group[0]]
            ]
            into = sums.setdefault(group[0], [StatisticsAccumulator(part.shape[-1], part.device) for part in cut])
            for total, part in zip(into, cut, strict=True):
                total.add(part)
        assert leaf.grad is not None
        entered.append(leaf.grad)
    for name, totals in sums.items():
        keep(name, [total.finish(name, "gradients of its outputs").hessian.cpu() for total in totals])
    return entered


def _rows(linear: nn.Module) -> int:
    return int(linear.get_parameter("weight").shape[0])


@contextmanager
def _watching(linears: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Collect the gradient in each linear's output while a backward pass runs."""
    seen: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[..., None]:
        def note(gradient: Tensor) -> None:
            seen[name] = gradient

        def hook(_: nn.Module, __: Any, output: Tensor) -> None:
            output.register_hook(note)

        return hook

    handles = [linear.register_forward_hook(watch(name)) for name, linear in linears.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
