# Shapes: E experts, N out_features, K in_features, I width inside an expert.
"""A model folder under the names that its modules have here.

Hub files often name tensors otherwise than today's transformers does, hold experts in one tensor or one by one, and GPT-2's
weights transposed. transformers knows how to rename them; here its rules are applied to names only, and every tensor is cut out
when it is loaded. What is written goes back under the folder's own names, so that other runtimes find it.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from duotone.checkpoint.headers import TensorSpec
from duotone.checkpoint.source import Source
from duotone.models.convolutions import UnfoldedConv2d
from duotone.models.experts import Experts, find_experts
from duotone.models.rewrite import STORED_TRANSPOSED
from duotone.models.skeleton import expected_tensors

#: What a bank's tensors are called when they lie in one piece, with the linears they are made of.
_BANK_TENSORS = {"gate_up_proj": ("gate_proj", "up_proj"), "up_proj": ("up_proj",), "down_proj": ("down_proj",)}
_PARTS = ("packed", "scale", "shape", "zero_point")
_EXPERT = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True)
class Cut:
    """Where a tensor comes from. stored: the folder's tensor. expert: which of its first dimension, if it is a bank's.

    rows: of [N, K] those that are meant, from, to and step; None: all. transposed: it lies as [K, N]. shape: in which it lies,
    if it is a convolution's.
    """

    stored: str
    expert: int | None = None
    rows: tuple[int, int, int] | None = None
    transposed: bool = False
    shape: tuple[int, ...] | None = None

    def of(self, tensor: Tensor) -> Tensor:
        """The part that is meant, [N, K] or [N]."""
        if self.expert is not None:
            tensor = tensor[self.expert]
        if self.transposed:
            tensor = tensor.mT
        if self.shape is not None:
            tensor = tensor.flatten(1)
        return tensor if self.rows is None else tensor[slice(*self.rows)]


@dataclass(frozen=True)
class NamedSource:
    """A model folder whose tensors have the model's own names. cuts: of those that are stored otherwise."""

    original: Source
    tensors: dict[str, TensorSpec]
    cuts: dict[str, Cut]

    @property
    def path(self) -> Path:
        """The folder."""
        return self.original.path

    @property
    def config(self) -> dict[str, Any]:
        """config.json."""
        return self.original.config

    @property
    def weight_bytes(self) -> int:
        """Bytes of all tensors of the folder."""
        return self.original.weight_bytes

    def load(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Tensors by the model's names. Raises DuotoneError as `Source` does."""
        names = list(names)
        stored = self.original.load(dict.fromkeys(self.cuts[name].stored if name in self.cuts else name for name in names))
        return {
            name: self.cuts[name].of(stored[self.cuts[name].stored]).contiguous() if name in self.cuts else stored[name]
            for name in names
        }

    def written_as(self, name: str) -> str:
        """The name a tensor, or a part of a quantized weight, goes by in a new folder: the folder's own where it has one."""
        module, _, leaf = name.rpartition(".")
        ends = (leaf, "weight", "bias")
        of_module = next((f"{module}.{end}" for end in ends if f"{module}.{end}" in self.cuts), None)
        if of_module is None:
            return name
        return f"{_stored_module(self.cuts[of_module], of_module)}.{leaf}"

    def as_stored(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor in the form in which a new folder holds it when it is not quantized."""
        cut = self.cuts.get(name)
        if cut is not None and cut.shape is not None:
            return tensor.view(cut.shape)
        return tensor.mT.contiguous() if cut is not None and cut.transposed and cut.expert is None else tensor


def named_source(source: Source, model: PreTrainedModel) -> Source:
    """A folder under the names of a model's modules; the folder itself when it has them already."""
    wanted, banks = expected_tensors(model), dict(find_experts(model))
    bank_tensors = {f"{path}.{leaf}{end}" for path in banks for leaf in _BANK_TENSORS for end in ("", "_bias")}
    inside = {path: f"{path}.linear" for path, module in model.named_modules() if isinstance(module, UnfoldedConv2d)}
    aliases = {f"{path}.{leaf}": f"{linear}.{leaf}" for path, linear in inside.items() for leaf in ("weight", "bias")}
    known = dict.fromkeys([*wanted, *aliases, *(name for name, _ in model.named_buffers()), *bank_tensors], True)
    known_to_transformers = isinstance(model, PreTrainedModel)
    rules = get_model_conversion_mapping(model) if known_to_transformers else []
    prefix = model.base_model_prefix if known_to_transformers else ""
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    cuts: dict[str, Cut] = {}
    for stored in source.tensors:
        name, end = _split(stored)
        renamed, pattern = name, None
        if name not in known or name in bank_tensors:
            renamed, pattern = rename_source_key(name, renamings, converters, prefix, known)
        renamed = aliases.get(renamed, renamed)
        bank, _, leaf = renamed.rpartition(".")
        if bank in banks:
            found = _of_bank(stored, bank, banks[bank], leaf, name, _place(pattern, converters))
        else:
            shape = source.tensors[stored].shape
            is_conv = not end and renamed in aliases.values() and leaf == "weight"
            found = {renamed: Cut(stored, shape=shape if is_conv else None)} if renamed in known and renamed != name else {}
        cuts |= {f"{key.removesuffix('.weight')}{end}" if end else key: cut for key, cut in found.items()}
    for path, linear in model.named_modules():
        if getattr(linear, STORED_TRANSPOSED, False):
            name = f"{path}.weight"
            stored = cuts[name].stored if name in cuts else name
            if stored in source.tensors and source.tensors[stored].dtype != "F8_E4M3":  # what we have quantized lies as [N, K]
                cuts[name] = Cut(stored, transposed=True)
    if not cuts:
        return source
    used = {cut.stored for cut in cuts.values()}
    tensors = {name: spec for name, spec in source.tensors.items() if name not in used}
    return NamedSource(source, tensors | {name: _spec(source, cut) for name, cut in cuts.items()}, cuts)


def _split(stored: str) -> tuple[str, str]:
    """A stored name as that of the weight it is of, and what it ends in when it is a part of a quantized one."""
    module, _, leaf = stored.rpartition(".")
    return (f"{module}.weight", f".{leaf}") if leaf.startswith("weight_") and leaf[7:] in _PARTS else (stored, "")


def _place(pattern: str | None, converters: list[WeightConverter]) -> int | None:
    """Which of the tensors that a converter joins this is; None for one that is whole."""
    if pattern is None or ("*" not in pattern and r".*\." not in pattern):
        return None
    return next(rule.source_patterns.index(pattern) for rule in converters if pattern in rule.source_patterns)


def _of_bank(stored: str, path: str, bank: Experts, leaf: str, name: str, place: int | None) -> dict[str, Cut]:
    """The linears' tensors that a stored tensor of a bank holds: one expert's, or everybody's in one piece."""
    is_bias = leaf.endswith("_bias")
    linears = _BANK_TENSORS.get(leaf.removesuffix("_bias"), ())
    kind = "bias" if is_bias else "weight"
    if place is not None:
        expert = int(_EXPERT.findall(name)[-1])
        return {f"{path}.{expert}.{linears[place]}.{kind}": Cut(stored)}
    found: dict[str, Cut] = {}
    for expert in range(bank.count):
        width = bank.get_submodule(f"{expert}.{linears[-1]}").get_parameter("weight").shape[0] if linears else 0
        for place, linear in enumerate(linears):
            rows = None
            if len(linears) == 2:
                rows = (place, 2 * width, 2) if bank.interleaved else (place * width, (place + 1) * width, 1)
            found[f"{path}.{expert}.{linear}.{kind}"] = Cut(stored, expert, rows, bank.transposed and not is_bias)
    return found


def _spec(source: Source, cut: Cut) -> TensorSpec:
    """Dtype and shape of what is cut out."""
    spec = source.tensors[cut.stored]
    shape = spec.shape if cut.expert is None else spec.shape[1:]
    if cut.shape is not None:
        shape = shape[0], math.prod(shape[1:])
    if cut.transposed:
        shape = (*shape[:-2], *shape[:-3:-1])
    if cut.rows is not None:
        shape = (len(range(*cut.rows)), *shape[1:])
    return replace(spec, shape=shape)


def _stored_module(cut: Cut, name: str) -> str:
    """The stored path of the module that a tensor is of; of an expert in a bank, where vLLM looks for it."""
    if cut.expert is None:
        return cut.stored.rpartition(".")[0]
    return f"{cut.stored.rpartition('.')[0]}.{cut.expert}.{name.split('.')[-2]}"
