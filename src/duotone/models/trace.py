# Shapes: N out_features, K in_features.
"""Which linears of a model read the same input, found by running it.

The model that runs has no weights: its linears, convolutions and embeddings answer with zeros of the right shape, its other
parameters are one zero seen from everywhere. What is left is transformers' own forward, and who hands which tensor to whom.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from duotone.models.experts import find_experts

#: Modules that need not be run to know the shape of what they give.
_HOLLOW = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d)
#: What puts the same numbers elsewhere: what a linear gives may come out of the model by these.
_MOVES = {torch.ops.aten.clone.default, torch.ops.aten._to_copy.default, torch.ops.aten.pixel_shuffle.default}
#: What puts the same numbers elsewhere: what a linear gives may come out of the model by these.
_MOVES = {torch.ops.aten.clone.default, torch.ops.aten._to_copy.default, torch.ops.aten.pixel_shuffle.default}
#: Two tensors of one key are the same rows: where they lie, from where on and up to where, how long a row is and how far its
#: columns are apart, how much there is, the version.
Key = tuple[int, int, int, int, int, int, int]


@dataclass
class Trace:
    """What a forward pass did, in order.

    calls: each linear's calls, by name, as the key of what it read. readers: for each tensor, the modules that were called with
    it. added: for every sum of two, one a linear's output and one not, which linear's and which other. passed: of each module
    in `watched`, the keys of what it was called with first and of what it gave first; given: how many things it gave in a
    tuple, None if it gave one as it is; leaning: those called with something else that another one gave, as T5's are, or
    that gave sizes. answers: linears whose output the model gave, as it was or with its numbers in another order. written: by
    its place, the linear that a tensor is the output of; moved: the same of its numbers elsewhere. held: tensors that must
    stay, so that their keys stay theirs.
    """

    calls: dict[str, list[Key]] = field(default_factory=dict)
    readers: dict[Key, list[str]] = field(default_factory=dict)
    added: list[tuple[str, Key]] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)
    given: dict[str, int | None] = field(default_factory=dict)
    leaning: set[str] = field(default_factory=set)
    passed: dict[str, list[tuple[Key, Key]]] = field(default_factory=dict)
    written: dict[int, str] = field(default_factory=dict)
    moved: dict[int, str] = field(default_factory=dict)
    held: list[Tensor] = field(default_factory=list)

    def key(self, tensor: Tensor) -> Key:
        """A tensor's key; it is held from now on."""
        self.held.append(tensor)
        span = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        place = tensor.untyped_storage().data_ptr(), int(tensor.storage_offset()), span
        apart = tensor.stride(-1) if tensor.shape[-1] > 1 else 1
        return *place, tensor.shape[-1], apart, tensor.numel(), tensor._version


def trace(model: nn.Module, inputs: Mapping[str, Any], watched: Sequence[str] = ()) -> Trace:
    """Run a model without its weights, and tell what its linears read. Raises what the model's forward raises.

    watched: modules of which to note what goes in and what comes out.
    """
    return trace_call(_hollow(model), (), inputs, watched)


def trace_call(model: nn.Module, positional: Sequence[Any], named: Mapping[str, Any], watched: Sequence[str] = ()) -> Trace:
    """Run a model as it is, and tell what its linears read. Raises what the model's forward raises."""
    found = Trace()
    with _hooks(model, found, watched), _Sums(found), torch.no_grad():
        output = model(*positional, **named)
    given = output if isinstance(output, list | tuple) else output.values() if isinstance(output, Mapping) else [output]
    places = [tensor.untyped_storage().data_ptr() for tensor in given if isinstance(tensor, Tensor)]
    writers = found.moved | found.written
    found.answers = [writers[place] for place in places if place in writers]
    return found


class _Sums(TorchDispatchMode):
    """Notes sums of a linear's output and another tensor."""

    def __init__(self, found: Trace) -> None:
        super().__init__()
        self._found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in {torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor} and all(isinstance(x, Tensor) for x in args[:2]):
            for one, other in (args[:2], args[1::-1]):
                writer = self._found.written.get(one.untyped_storage().data_ptr())
                is_stream = other.untyped_storage().data_ptr() not in self._found.written
                in_order = one.is_contiguous() or (one.ndim == 4 and one.movedim(1, -1).is_contiguous())
                if writer is not None and is_stream and in_order and one.shape == other.shape:
                    self._found.added.append((writer, self._found.key(other)))
        if func in _MOVES and (writer := self._writer_of(args[0])) is not None:
            self._found.held.append(out)
            self._found.moved[out.untyped_storage().data_ptr()] = writer
        if func._schema.is_mutable and args and isinstance(args[0], Tensor):  # what a linear gave is something else from now on
            for places in (self._found.written, self._found.moved):
                places.pop(args[0].untyped_storage().data_ptr(), None)
        return out

    def _writer_of(self, tensor: Tensor) -> str | None:
        place = tensor.untyped_storage().data_ptr()
        return self._found.written.get(place, self._found.moved.get(place))


@contextmanager
def _hooks(model: nn.Module, found: Trace, watched: Sequence[str]) -> Iterator[None]:
    handles: list[Any] = []
    beside: set[int] = set()  # what watched modules gave behind the first thing

    def reading(name: str, is_linear: bool) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            if inputs and isinstance(inputs[0], Tensor) and inputs[0].numel():
                key = found.key(inputs[0])
                found.readers.setdefault(key, []).append(name)
                if is_linear:
                    found.calls.setdefault(name, []).append(key)

        return hook

    def written(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Tensor) -> None:
            found.held.append(output)
            found.written[output.untyped_storage().data_ptr()] = name

        return hook

    def passing(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
            if not beside.isdisjoint(_places([inputs[1:], list(named.values())])):
                found.leaning.add(name)
            more = list(output[1:]) if isinstance(output, tuple) else []
            if any(isinstance(leaf, int) for leaf in tree_leaves(more)):  # Swin v2's stages: the picture's size
                found.leaning.add(name)
            found.held.extend(part for part in more if isinstance(part, Tensor))
            beside.update(_places(more).difference(_places([inputs, list(named.values())])))
            first = output[0] if isinstance(output, tuple) else output
            found.given[name] = len(output) if isinstance(output, tuple) else None
            if inputs and isinstance(inputs[0], Tensor) and isinstance(first, Tensor):
                found.passed.setdefault(name, []).append((found.key(inputs[0]), found.key(first)))

        return hook

    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(reading(name, type(module) is nn.Linear)))
        if type(module) is nn.Linear:
            handles.append(module.register_forward_hook(written(name)))
        if name in watched:
            handles.append(module.register_forward_hook(passing(name), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _places(things: Any) -> set[int]:
    return {leaf.untyped_storage().data_ptr() for leaf in tree_leaves(things) if isinstance(leaf, Tensor)}


def _hollow(model: nn.Module) -> nn.Module:
    """A copy without weights that can run."""
    hollow = copy.deepcopy(model)
    for _, experts in find_experts(hollow):
        experts.shown_all = frozenset(range(experts.count))
    for module in hollow.modules():
        if type(module) in _HOLLOW:
            module.forward = _answering(module)
        for name, parameter in list(module.named_parameters(recurse=False)):  # a forward may ask any where it lies
            setattr(module, name, nn.Parameter(torch.zeros(()).expand(parameter.shape), requires_grad=False))
    return hollow


def _answering(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """A forward that gives zeros in the shape that the module's own would give."""
    if isinstance(module, nn.Linear):
        return lambda x: torch.zeros(*x.shape[:-1], module.out_features)
    shaped = copy.deepcopy(module).to("meta", torch.float32)
    own = type(module).forward

    def forward(x: Tensor, *rest: Any, **named: Any) -> Tensor:
        return torch.zeros(own(shaped, torch.empty(x.shape, device="meta"), *rest, **named).shape)

    return forward
