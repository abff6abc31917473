"""Batch norms folded into what they read: in use they are a factor and a shift a channel, and cost a pass over memory."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from duotone.models.experts import put

_WRITERS = (nn.Linear, nn.Conv2d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


class _Uses(TorchDispatchMode):
    """Counts how many operations read each tensor's memory."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[int] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor):
                self.count[_place(tensor)] += 1
        return func(*args, **(kwargs or {}))


def fold_norms(module: nn.Module, positional: Sequence[Any], named: Mapping[str, Any]) -> list[str]:
    """Fold every batch norm that alone reads what a linear or a convolution gives; returns the norms' names.

    Which do is seen by calling the module. Norms and what they fold into must have run once. The module must be in eval mode.
    """
    gave: dict[int, str] = {}
    read: dict[str, list[tuple[str, int]]] = {}  # a norm's calls: who wrote what it read, and where that lies
    runs: Counter[str] = Counter()
    held: list[Tensor] = []  # a place that is freed is soon another tensor's
    uses = _Uses()
    handles: list[Any] = []

    def note_output(name: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Tensor) -> None:
            held.append(output)
            gave[_place(output)] = name
            uses.count[_place(output)] = 0  # what lay there before is gone
            runs[name] += 1

        return hook

    def note_input(name: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            held.append(inputs[0])
            place = _place(inputs[0])
            read.setdefault(name, []).append((gave.get(place, ""), place))

        return hook

    for name, child in module.named_modules():
        if type(child) in _WRITERS:
            handles.append(child.register_forward_hook(note_output(name)))
        elif type(child) in _NORMS and child.running_mean is not None:
            handles.append(child.register_forward_pre_hook(note_input(name)))
    try:
        with uses, torch.no_grad():
            module(*positional, **named)
    finally:
        for handle in handles:
            handle.remove()
    folded = [
        (name, writer)
        for name, ((writer, place), *more) in read.items()
        if not more and uses.count[place] == 1 and runs[writer] == 1
    ]
    for name, writer in folded:
        _fold(module, writer, name)
    return [name for name, _ in folded]


def _fold(module: nn.Module, writer: str, norm: str) -> None:
    before, behind = module.get_submodule(writer), module.get_submodule(norm)
    fuse: Any = fuse_conv_bn_eval if isinstance(before, nn.Conv2d) else fuse_linear_bn_eval
    for path, child in ((writer, fuse(before, behind)), (norm, nn.Identity())):
        put(module, path, child)


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
