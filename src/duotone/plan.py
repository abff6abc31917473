# Shapes: N out_features, K in_features.
"""What will be done, decided from config and headers alone: which linears, which tensors, how long, how much."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from duotone.calibrate.samples import first_sample
from duotone.checkpoint.compressed_tensors import tensor_specs
from duotone.checkpoint.headers import TensorSpec
from duotone.checkpoint.kv_cache import scale_specs
from duotone.checkpoint.prequantized import original_weights
from duotone.checkpoint.source import Source
from duotone.choices import choose_schemes
from duotone.errors import DuotoneError
from duotone.models.adapter import find_adapter, normed_stream
from duotone.models.anatomy import Anatomy
from duotone.models.caching import caching_attentions, key_heads, written_attention
from duotone.models.names import named_source
from duotone.models.skeleton import build_skeleton, expected_tensors, find_linears, find_others, text_config
from duotone.models.table import NormedStream
from duotone.models.vision import full_anatomy, image_tokens
from duotone.scheme import AnyScheme, Fp8Scheme
from duotone.settings import QuantizeConfig
from duotone.transforms.rotated import rotate


@dataclass(frozen=True)
class BlockPlan:
    """One block: its path, the full names of linears to quantize grouped by shared input, and every tensor it holds.

    path: "" when the whole model is one block. streams: for linears that write to the residual stream, the module, by its
    path in the block, that reads it before. norms: for the first linear of each group to equalize, the norm in front of it
    and every linear that reads it. banks: for the first linear of each bank of experts, the bank. experts: all linears of
    such banks. caches: the module whose keys and values an FP8 cache is to hold, if one is asked for, and what the folder
    calls it.
    """

    path: str
    shared_inputs: tuple[tuple[str, ...], ...]
    tensors: tuple[str, ...]
    streams: dict[str, str]
    norms: dict[str, tuple[str, tuple[str, ...]]]
    banks: dict[str, str]
    experts: frozenset[str]
    caches: tuple[str, str] | None = None

    @property
    def stops(self) -> dict[str, str]:
        """The first linear of each group, where what all of the group read can be seen, with its path in the block.

        In front of a bank of experts also the module that sees which token goes where, under the bank's name.
        """
        names: dict[str, str] = {}
        for group in self.shared_inputs:
            if group[0] in self.banks:
                names[self.banks[group[0]]] = f"{self.banks[group[0]]}.routing"
            names[group[0]] = group[0]
        return {name: path.removeprefix(self.prefix) for name, path in names.items()}

    @property
    def prefix(self) -> str:
        """What the full names of all that is in the block begin with."""
        return f"{self.path}." if self.path else ""


@dataclass(frozen=True)
class Plan:
    """The whole job.

    kept: linears left in BF16 with their reason. shapes, schemes: of every linear to quantize. unseen: those of them that
    calibration does not pass, rounded to FP8 as they are. quantized_macs_share: of all linears' multiply-accumulates, the
    share that will run quantized. outputs: every tensor of the new checkpoint, in order. converted: those whose floats become
    BF16. transforms: what is done to the model before it is quantized, a line each. source: the model under its modules'
    names, and behind its rotation, if any. generates: whether the model writes text. text: what config.json says of the
    language model, defaults and all. image_tokens: those in whose places a model puts what it sees.
    """

    config: QuantizeConfig
    source: Source
    anatomy: Anatomy
    blocks: tuple[BlockPlan, ...]
    outside: tuple[str, ...]
    kept: dict[str, str]
    shapes: dict[str, tuple[int, int]]
    schemes: dict[str, AnyScheme]
    unseen: frozenset[str]
    quantized_macs_share: float
    outputs: dict[str, TensorSpec]
    converted: tuple[str, ...]
    transforms: tuple[str, ...] = ()
    generates: bool = False
    text: PreTrainedConfig | None = None
    image_tokens: tuple[int, ...] = ()

    @property
    def layers(self) -> list[str]:
        """Full names of all linears to quantize that calibration passes, in order."""
        return [layer for block in self.blocks for group in block.shared_inputs for layer in group]

    @property
    def ignored(self) -> list[str]:
        """Linears left in BF16 as a config names them: by the folder's names and, where those are others, by the modules'.

        A vision tower is named as a whole too: runtimes have further names for what is inside.
        """
        names = {*self.kept, *(self.written_layer(name) for name in self.kept)}
        if self.anatomy.tower_path is not None and self.anatomy.tower is None:
            names.add(rf"re:.*\b{self.anatomy.tower_path.rpartition('.')[2]}\..*")
        return sorted(names)

    @property
    def in_fp8(self) -> list[str]:
        """Linears that become FP8, as a config names them (`ignored`)."""
        names = [name for name, scheme in self.schemes.items() if isinstance(scheme, Fp8Scheme)]
        return sorted({*names, *(self.written_layer(name) for name in names)})

    def written_layer(self, layer: str) -> str:
        """A linear's name in the new folder."""
        return self.source.written_as(f"{layer}.weight").removesuffix(".weight")

    @property
    def weights(self) -> int:
        """How many values the linears to quantize have."""
        return sum(rows * columns for rows, columns in self.shapes.values())

    def shards(self, layer: str) -> int:
        """Ranks that will each have a part of this linear's columns: all that serve it, of one that writes to the stream."""
        groups = self.config.scheme.groups(self.shapes[layer][1])
        writes = any(layer in block.streams for block in self.blocks)
        writes |= layer.endswith(".down_proj") and any(layer in block.experts for block in self.blocks)
        return self.config.tensor_parallel if writes and groups % self.config.tensor_parallel == 0 else 1

    @property
    def waiting_bytes(self) -> int | None:
        """Of activations that may wait inside a block, of each prefix: the budget less a group's moments. None: no budget."""
        if self.config.memory_budget is None:
            return None
        widest = max(columns for _, columns in self.shapes.values())
        walks = 2 if self.config.method_facts.drift or not self.config.method_facts.sequential else 1
        moments = 6 * 4 * widest**2  # second moments and drift, as sums of 8 bytes and as what comes of them
        return max(0, int(self.config.memory_budget * 2**30) - moments) // walks

    @property
    def disk_bytes(self) -> int:
        """Bytes of all tensors of the new checkpoint."""
        return sum(spec.nbytes for spec in self.outputs.values())

    @property
    def bits_per_weight(self) -> float:
        """Bits on disk of everything a quantized weight is stored as, for each of its values."""
        stored = [
            spec for layer, shape in self.shapes.items() for spec in tensor_specs(layer, shape, self.schemes[layer]).values()
        ]
        return 8 * sum(spec.nbytes for spec in stored) / self.weights

    @property
    def seq_len(self) -> int:
        """Tokens of a calibration window: what was asked for, or the model's own limit if that is smaller."""
        return min(self.config.seq_len, int(getattr(self.text, "max_position_embeddings", self.config.seq_len)))

    @property
    def hidden_size(self) -> int:
        """The width of the hidden states between two blocks."""
        return int(getattr(self.text, "hidden_size", 0))

    @property
    def tower_blocks(self) -> int:
        """How many of the blocks, the first ones, are the vision tower's."""
        return len(self.blocks) - len(self.anatomy.blocks)


def make_plan(folder: Source, config: QuantizeConfig) -> Plan:
    """Decide everything that headers decide. Raises DuotoneError for a model that cannot be quantized as asked."""
    source = original_weights(folder)
    model = build_skeleton(source.config, torch.float32)
    anatomy = full_anatomy(source.config, model, config.quantize_vision, first_sample(config.calibration))
    return plan_of(named_source(source, model), model, anatomy, config)


def plan_of(source: Source, model: Any, anatomy: Anatomy, config: QuantizeConfig) -> Plan:
    """`make_plan` of a model that has been made, whose tensors are the source's."""
    linears, others = find_linears(model), find_others(model)
    choices = choose_schemes(model, anatomy, config)
    kept = choices.kept | {name: why for name, (why, _) in others.items()}
    calibrated = choices.schemes.keys() - choices.unseen
    wanted = expected_tensors(model)
    buffers = {name for name, _ in model.named_buffers()}
    _check_source(source, wanted, buffers)
    residual = normed_stream(source.config, "--equalize") if config.equalize is not None else None
    attentions = caching_attentions(anatomy, model, "--kv-cache") if config.kv_cache else [None] * len(anatomy.blocks)
    attentions = [*(None for _ in anatomy.all_blocks[len(anatomy.blocks) :]), *attentions]  # a tower keeps nothing
    blocks: list[BlockPlan] = []
    for part, attention in zip(anatomy.all_blocks, attentions, strict=True):
        groups = (tuple(name for name in group if name in calibrated) for group in part.shared_inputs)
        groups = tuple(group for group in groups if group)
        tensors = tuple(name for name in wanted if name.startswith(part.prefix))
        streams = {writer: reader for writer, reader in part.streams.items() if (writer,) in groups}
        norms = _norms_before(part.path, groups, residual)
        caches = (attention, written_attention(source, attention)) if attention else None
        blocks.append(BlockPlan(part.path, groups, tensors, streams, norms, *_experts_of(part.experts, groups), caches))
    if config.calibrate_all_experts and not any(block.banks for block in blocks):
        raise DuotoneError(f"--calibrate-all-experts: {source.path} has no experts to quantize, expected a mixture of them")
    walked = [layer for block in blocks for group in block.shared_inputs for layer in group]
    order = [*walked, *(name for name in linears if name in choices.unseen)]
    shapes = {layer: (linears[layer].out_features, linears[layer].in_features) for layer in order}
    schemes = {layer: choices.schemes[layer] for layer in order}
    if not shapes:
        raise DuotoneError(f"{source.path}: every linear is left in BF16, expected at least one to quantize (see --ignore)")
    transforms: list[str] = []
    if config.rotate:
        stream, paths = normed_stream(source.config, "--rotate"), [block.path for block in blocks]
        adapter = find_adapter(source.config)
        rotated = rotate(source, adapter, stream, paths, wanted, model.config.num_attention_heads, config.seed)
        source, transforms = rotated, [*rotated.notes]
    if config.equalize is not None:
        count = sum(len(block.norms) for block in blocks)
        transforms.append(
            f"equalized: channels between {count} norms and the linears that read them, exponent {config.equalize}"
        )
    in_blocks = dict.fromkeys(name for block in blocks for name in block.tensors)
    outside = tuple(name for name in source.tensors if name not in in_blocks)
    outputs, converted = _outputs(source, (*outside, *in_blocks), shapes, buffers, schemes)
    for block in blocks:
        if block.caches:
            outputs |= scale_specs(block.caches[1], config.kv_cache_strategy, key_heads(model))
    all_weights = sum(linear.weight.numel() for linear in linears.values()) + sum(size for _, size in others.values())
    share = sum(n * k for n, k in shapes.values()) / all_weights
    writes = isinstance(model, PreTrainedModel) and model.can_generate()
    facts = (kept, shapes, schemes, choices.unseen, share, outputs, converted, tuple(transforms), writes, text_config(model))
    return Plan(config, source, anatomy, tuple(blocks), outside, *facts, image_tokens(model) if writes else ())


def _norms_before(
    path: str, groups: tuple[tuple[str, ...], ...], residual: NormedStream | None
) -> dict[str, tuple[str, tuple[str, ...]]]:
    """For the first linear of each group behind a norm: that norm and all its readers, by full name."""
    found: dict[str, tuple[str, tuple[str, ...]]] = {}
    for norm, readers in residual.norms if residual is not None else ():
        names = tuple(f"{path}.{reader}" for reader in readers)
        found |= {group[0]: (f"{path}.{norm}", names) for group in groups if group[0] in names}
    return found


def _experts_of(banks: tuple[str, ...], groups: tuple[tuple[str, ...], ...]) -> tuple[dict[str, str], frozenset[str]]:
    """For the first linear of each bank, the bank; and all linears of banks."""
    first: dict[str, str] = {}
    inside: set[str] = set()
    for bank in banks:
        members = [name for group in groups for name in group if name.startswith(f"{bank}.")]
        first |= {members[0]: bank} if members else {}
        inside.update(members)
    return first, frozenset(inside)


def _check_source(source: Source, shapes: dict[str, tuple[int, ...]], buffers: set[str]) -> None:
    """Every tensor the architecture needs is there, with its shape; parameters are floats."""
    for name, shape in shapes.items():
        spec = source.tensors.get(name)
        if spec is None:
            raise DuotoneError(f"{source.path}: found no tensor {name!r}, expected it for this architecture")
        if spec.shape != shape:
            raise DuotoneError(
                f"{source.path / spec.file}: {name} has shape {list(spec.shape)}, expected {list(shape)} from config.json"
            )
        if not spec.is_float and name not in buffers:
            raise DuotoneError(f"{source.path / spec.file}: {name} is {spec.dtype}, expected BF16, F16 or F32 weights")


def _outputs(
    source: Source,
    names: tuple[str, ...],
    shapes: dict[str, tuple[int, int]],
    buffers: set[str],
    schemes: dict[str, AnyScheme],
) -> tuple[dict[str, TensorSpec], tuple[str, ...]]:
    """Specs of all tensors by the names they are written under, and the names of those whose float dtype becomes BF16."""
    outputs: dict[str, TensorSpec] = {}
    converted: list[str] = []
    for name in names:
        layer = name.removesuffix(".weight")
        spec = source.tensors[name]
        if layer in shapes:
            parts = tensor_specs(layer, shapes[layer], schemes[layer])
            outputs |= {source.written_as(part): part_spec for part, part_spec in parts.items()}
            continue
        narrows = spec.is_float and name not in buffers
        if narrows and spec.dtype != "BF16":
            converted.append(name)
        shape = source.as_stored(name, torch.empty(spec.shape, device="meta")).shape
        outputs[source.written_as(name)] = TensorSpec("BF16" if narrows else spec.dtype, tuple(shape))
    return outputs, tuple(converted)
