"""Where a model's blocks are, which of their linears read the same input, which are left alone: by table, or found out."""

import inspect
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from duotone.errors import DuotoneError
from duotone.models.adapter import find_adapter, has_adapter
from duotone.models.diffusion import input_names, is_diffusers, nested
from duotone.models.experts import find_experts
from duotone.models.skeleton import find_linears
from duotone.models.table import Adapter
from duotone.models.trace import Key, Trace, trace, trace_call

#: A stack of blocks that holds less than this of the weights between input and output is not taken for the model's body.
_BODY_SHARE, _TOWER_SHARE = 0.9, 0.2
_HEAD = "output head: the last projection stays BF16, as every W4A8 runtime expects"

#: Linears with fewer outputs decide something, such as whether an expert is used, and weigh nothing.
_FEW_OUTPUTS = 16


@dataclass(frozen=True)
class Block:
    """What runs as one: linears (full names) by the input they read, in running order.

    path: "" when the whole model is one block. streams: for linears whose output is added to the residual stream as it is, the
    module, by its path in the block, that reads the stream before. experts: full paths of banks of experts.
    """

    path: str
    shared_inputs: tuple[tuple[str, ...], ...]
    streams: Mapping[str, str]
    experts: tuple[str, ...] = ()

    @property
    def prefix(self) -> str:
        """What the full names of all that is in the block begin with."""
        return f"{self.path}." if self.path else ""


@dataclass(frozen=True)
class Anatomy:
    """Blocks in running order; keep: linears to leave in BF16 unless asked for, each with its reason.

    traced: by nobody's table. gives: how many things a block gives, hidden states first; None: these alone, in no tuple.
    writes_another: whether the model reads one text and writes another, as T5 does. inputs: the names of the forward's inputs,
    the main one first. tower: the part that sees, which runs before the blocks, if it is to be quantized. seeing: linears that
    run before the blocks when there is an image. tower_path: the part that sees, quantized or not; None where there is none.
    """

    blocks: tuple[Block, ...]
    keep: Mapping[str, str]
    traced: bool
    gives: int | None = None
    writes_another: bool = False
    inputs: tuple[str, ...] = ("input_ids",)
    tower: "Anatomy | None" = None
    seeing: frozenset[str] = frozenset()
    tower_path: str | None = None

    @property
    def all_blocks(self) -> tuple[Block, ...]:
        """The tower's blocks and the body's, in running order."""
        return (*(self.tower.blocks if self.tower is not None else ()), *self.blocks)

    @property
    def whole(self) -> bool:
        """Is the model one block, with no stack of them?"""
        return self.blocks[0].path == ""


def anatomy_of(config: dict[str, Any], model: PreTrainedModel, example: Mapping[str, Tensor] | None = None) -> Anatomy:
    """The anatomy of a model. Raises DuotoneError for one without a table that cannot be traced, saying what to write.

    example: inputs of the right names and shapes, where they are known; diffusers' configs do not tell them.
    """
    if has_adapter(config):
        return _from_table(find_adapter(config), model)
    if not is_diffusers(config):
        return _from_trace(model)
    if example is None:
        names = ", ".join(input_names(model)[:3])
        raise DuotoneError(
            f"{type(model).__name__}: reads {names}... in shapes that no config tells, expected --calibration FILE.safetensors"
        )
    return _from_trace(model, nested(example))


def linears_by_input(anatomy: Anatomy, linears: list[str]) -> list[tuple[str, ...]]:
    """Full names of linears that read the same input; single ones outside the blocks."""
    known = set(linears)
    found = [tuple(name for name in group if name in known) for block in anatomy.all_blocks for group in block.shared_inputs]
    inside = {name for names in found for name in names}
    return [names for names in found if names] + [(name,) for name in linears if name not in inside]


def anatomy_of_tower(tower: PreTrainedModel, inputs: Mapping[str, Tensor]) -> Anatomy:
    """The anatomy of a vision tower, traced alone. What merges its blocks' outputs for the text may outweigh the blocks."""
    return _from_trace(tower, inputs, _TOWER_SHARE)


def _from_table(adapter: Adapter, model: nn.Module) -> Anatomy:
    linears = find_linears(model)
    count = len(model.get_submodule(adapter.blocks))  # pyright: ignore[reportArgumentType]
    blocks = (_block_of_table(adapter, f"{adapter.blocks}.{index}", model, linears) for index in range(count))
    return Anatomy(tuple(blocks), dict(adapter.keep), traced=False)


def _block_of_table(adapter: Adapter, path: str, model: nn.Module, linears: Mapping[str, nn.Linear]) -> Block:
    banks = {f"{path}.{name}": experts.count for name, experts in find_experts(model.get_submodule(path))}
    groups: list[tuple[str, ...]] = []
    for group in adapter.shared_inputs:
        names = tuple(f"{path}.{name}" for name in group)
        groups.append(tuple(name for name in names if name in linears))
    for bank, count in banks.items():
        for index in range(count):
            groups += [(f"{bank}.{index}.gate_proj", f"{bank}.{index}.up_proj"), (f"{bank}.{index}.down_proj",)]
    groups = [tuple(name for name in group if name in linears) for group in groups]
    streams = {f"{path}.{writer}": reader for writer, reader in adapter.streams if f"{path}.{writer}" in linears}
    return Block(path, tuple(group for group in groups if group), streams, tuple(banks))


def anatomy_of_module(model: nn.Module, positional: Sequence[Any], named: Mapping[str, Any]) -> Anatomy:
    """The anatomy of any module, as one block: what it does when it is called with one calibration batch.

    Raises DuotoneError when that reaches no linear, and what its forward raises.
    """
    found = trace_call(model, positional, named)
    keep, body = _kept(model, find_linears(model), found, heads=set(found.answers))
    return Anatomy((_block_of_trace("", model, found, body),), keep, traced=True)


def _from_trace(model: PreTrainedModel, inputs: Mapping[str, Any] | None = None, share: float = _BODY_SHARE) -> Anatomy:
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    watched = [f"{path}.{index}" for path, blocks in lists.items() for index in range(len(blocks))]
    try:
        found = trace(model, example_inputs(model) if inputs is None else inputs, watched)
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise DuotoneError(
            f"{type(model).__name__}: has no table in duotone/models and its forward pass cannot be traced ({reason}); "
            "write a table, see docs/add-a-model.md"
        ) from None
    linears = find_linears(model)
    known = isinstance(model, PreTrainedModel)
    head = model.get_output_embeddings() if known else None
    heads = {name for name, linear in linears.items() if linear is head}.union(found.answers)
    keep, body = _kept(model, linears, found, heads)
    paths = _stack(lists, found, body, share)
    blocks = tuple(_block_of_trace(path, model, found, body) for path in paths)
    names = _input_names(model) if known else input_names(model)
    facts = found.given.get(paths[0]), known and _two_texts(model), names
    return Anatomy(blocks, keep, True, *facts)


def _two_texts(model: PreTrainedModel) -> bool:
    return bool(getattr(model.config, "is_encoder_decoder", False)) and model.main_input_name == "input_ids"


def _input_names(model: PreTrainedModel) -> tuple[str, ...]:
    names = [name for name in inspect.signature(model.forward).parameters if name not in {"args", "kwargs", "labels"}]
    return (model.main_input_name, *(name for name in names if name != model.main_input_name))


def _few(linear: nn.Linear) -> str:
    return f"only {linear.out_features} outputs: what it decides is worth more than its bytes"


def _kept(
    model: nn.Module, linears: Mapping[str, nn.Linear], found: Trace, heads: set[str]
) -> tuple[dict[str, str], dict[str, int]]:
    """Linears to leave alone, each with its reason, and the weights of all that are no heads. Raises DuotoneError: none."""
    called = {name: linears[name].weight.numel() for name in found.calls}
    if not called:
        raise DuotoneError(f"{type(model).__name__}: its forward pass reached no linear, expected some to quantize")
    body = {name: size for name, size in called.items() if name not in heads}
    keep = {name: _HEAD for name in called if name not in body}
    keep |= {name: _few(linears[name]) for name in body if linears[name].out_features < _FEW_OUTPUTS}
    keep |= {name: "the forward pass that was traced did not reach it" for name in linears if name not in called}
    often = [name for name, calls in found.calls.items() if len(calls) > 1]
    keep |= {name: f"runs {len(found.calls[name])} times in one forward pass" for name in often}
    return keep, body


def _stack(lists: Mapping[str, nn.ModuleList], found: Trace, body: Mapping[str, int], share: float) -> list[str]:
    """Paths of the blocks that hand the hidden states from one to the next; [""] where no stack holds most of the weights."""
    best, most = [""], share * sum(body.values())
    for path, blocks in lists.items():
        names = [f"{path}.{index}" for index in range(len(blocks))]
        held = sum(size for name, size in body.items() if name.startswith(f"{path}."))
        if held >= most and _is_chain(found, names):
            best, most = names, held + 1  # of nested lists the outer one comes first, and is kept
    return best


def _is_chain(found: Trace, names: list[str]) -> bool:
    passed = [found.passed.get(name, []) for name in names]
    if any(len(calls) != 1 for calls in passed) or not found.leaning.isdisjoint(names):
        return False
    return all(before[0][1] == after[0][0] for before, after in itertools.pairwise(passed))


def _block_of_trace(path: str, model: nn.Module, found: Trace, body: Mapping[str, int]) -> Block:
    prefix = f"{path}." if path else ""
    groups: dict[Key, list[str]] = {}
    for name, calls in found.calls.items():
        if name in body and name.startswith(prefix) and len(calls) == 1:
            groups.setdefault(calls[0], []).append(name)
    streams: dict[str, str] = {}
    for writer, stream in found.added:
        readers = [name for name in found.readers.get(stream, ()) if name.startswith(prefix) and name not in {path, writer}]
        if writer.startswith(prefix) and writer in body and readers:
            streams.setdefault(writer, readers[0].removeprefix(prefix))
    banks = tuple(f"{prefix}{name}" for name, _ in find_experts(model.get_submodule(path)))
    return Block(path, tuple(tuple(group) for group in groups.values()), streams, banks)


def example_inputs(model: PreTrainedModel, main: str | None = None) -> dict[str, Tensor]:
    """Inputs of the right names and shapes for a forward pass, all zeros. Raises DuotoneError for a kind that is not known.

    main: the first input's name, if it is not as the model says.
    """
    config, main = model.config, main or model.main_input_name
    inputs: dict[str, Tensor] = {}
    if main == "input_ids":
        inputs["input_ids"] = torch.zeros(1, 8, dtype=torch.long)
    elif main == "pixel_values":
        size = getattr(config, "image_size", 224)
        height, width = size if isinstance(size, list | tuple) else (size, size)
        inputs["pixel_values"] = torch.zeros(1, getattr(config, "num_channels", 3), height, width)
    elif main == "input_features":
        inputs["input_features"] = torch.zeros(1, config.num_mel_bins, 2 * config.max_source_positions)
    else:
        raise DuotoneError(f"{type(model).__name__}: reads {main!r}, expected input_ids, pixel_values or input_features")
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = torch.zeros(1, 8, dtype=torch.long)
    return inputs
