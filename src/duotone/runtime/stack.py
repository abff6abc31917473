# Shapes: B sequences, H key heads, L tokens so far, D head size.
"""All layers of a decoder as one op, when each sequence of a batch gets one new token: csrc/decoder.cpp.

By its modules such a step is hundreds of torch's small ops, many of which cost more to call than to compute, the more so as
each layer's weights drive everything else out of the caches; and threads are woken for each. The op's threads stay together
to a layer's end.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import BaseModelOutputWithPast

from duotone.kernels import cpu
from duotone.runtime import attention
from duotone.runtime.cache import Room, drop_rooms, growing_layers, room_of
from duotone.runtime.kv_cache import is_narrow
from duotone.runtime.linear import QuantizedLinear, merged_weight

#: Between the two ways, relative to the largest output: BF16 has eight bits, and a few roundings differ.
_TOLERANCE = 0.02
#: And relative to each, where it is a sum: the last bit.
_ROUNDING = 2.0**-7
#: Of what an FP8 cache keeps: a value beside the other way's.
_FP8_ROUNDING = 2.0**-3
#: A layer's linears, those of one input together.
_LINEARS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
_NORMS = ("input_layernorm", "post_attention_layernorm")
#: Of queries and keys, in some.
_HEAD_NORMS = ("self_attn.q_norm", "self_attn.k_norm")


class _Place(NamedTuple):
    """Where a module stood when a layer was tried, and its own forward, where it has one besides its class's."""

    parent: nn.Module
    name: str
    module: nn.Module
    forward: Any

    @classmethod
    def of(cls, root: nn.Module, path: str) -> "_Place":
        """The place of a module under another."""
        parent, _, name = path.rpartition(".")
        module = root.get_submodule(path)
        return cls(root.get_submodule(parent), name, module, module.__dict__.get("forward"))


@dataclass(frozen=True)
class Layer:
    """A layer's modules, and its weights as the op reads them: what it has been tried with."""

    block: Any
    linears: tuple[QuantizedLinear, ...]
    norms: tuple[Any, ...]
    weights: list[Tensor]
    facts: list[int]
    places: list[_Place]
    packed: list[cpu.Packed]  # of each linear

    @property
    def kept(self) -> torch.dtype:
        """What its cache holds."""
        return torch.float8_e4m3fn if is_narrow(self.block.self_attn) else torch.bfloat16

    def cache_scales(self) -> list[Tensor]:
        """Of keys and of values, float32 [H] each, where its cache holds FP8."""
        attention = self.block.self_attn
        return [attention.k_scale.float(), attention.v_scale.float()] if is_narrow(attention) else []

    def parameters(self) -> list[Tensor]:
        """What else it computes with: its norms' weights and its linears' biases."""
        return [norm.weight for norm in self.norms] + [bias for linear in self.linears if (bias := linear.bias) is not None]


@dataclass(frozen=True)
class Stack:
    """All layers of a model."""

    layers: tuple[Layer, ...]
    weights: list[Tensor]
    facts: list[int]
    places: list[_Place]

    def is_current(self, blocks: Any) -> bool:
        """Whether these still are the modules and weights of a model's layers."""
        return len(blocks) == len(self.layers) and all(
            parent._modules.get(name) is module and module.__dict__.get("forward") is forward
            for parent, name, module, forward in self.places
        ) and all(
            linear._packed is packed
            for layer in self.layers
            for linear, packed in zip(layer.linears, layer.packed, strict=True)
        )  # fmt: skip

    def is_heard(self) -> bool:
        """Whether anybody listens to one of these modules, or to all there are."""
        everybody = nn.modules.module
        return bool(everybody._global_forward_hooks or everybody._global_forward_pre_hooks) or any(
            place.module._forward_hooks or place.module._forward_pre_hooks for place in self.places
        )


def find_stack(model: Any, blocks: nn.ModuleList, norms: set[nn.Module]) -> Stack | None:
    """The layers of a model of Llama's build, where the op can read all of them."""
    parts = ("embed_tokens", "layers", "norm", "rotary_emb")
    if any(getattr(model, name, None) is None for name in parts) or model.layers is not blocks or not len(blocks):
        return None
    layers = [_layer(block, norms) for block in blocks]
    found = tuple(layer for layer in layers if layer is not None)
    if len(found) < len(layers) or len({_shared_facts(layer) for layer in found}) > 1:
        return None
    return Stack(
        found,
        [t for layer in found for t in layer.weights],
        [fact for layer in found for fact in layer.facts],
        [_Place.of(blocks, str(i)) for i in range(len(blocks))] + [place for layer in found for place in layer.places],
    )


def _layer(block: nn.Module, norms: set[nn.Module]) -> Layer | None:
    """A layer of Llama's build, or of Qwen 3's, which norms its queries and keys."""
    names = [name for group in _LINEARS for name in group]
    found = {name: _found(block, name) for name in (*names, *_NORMS, *_HEAD_NORMS, "self_attn", "mlp", "mlp.act_fn")}
    own = [found[name] for name in _NORMS] + [norm for name in _HEAD_NORMS if (norm := found[name]) is not None]
    linears = tuple(linear for name in names if isinstance(linear := found[name], QuantizedLinear) and linear.backend is cpu)
    if len(linears) < len(names) or any(norm not in norms for norm in own) or len(own) == len(_NORMS) + 1:
        return None
    merged = [merged_weight([linear for linear in map(found.get, group) if isinstance(linear, QuantizedLinear)])
              for group in _LINEARS]  # fmt: skip
    weights = [weight for weight in merged if weight is not None]
    if len(weights) < len(_LINEARS) or not hasattr(found["self_attn"], "scaling"):
        return None
    if len({(weight.path, weight.fp8_max, weight.smallest_scale) for weight in weights}) > 1:  # the op takes one for all
        return None
    none = torch.empty(0)
    return Layer(
        block,
        linears,
        tuple(own),
        [t for w in weights for t in (w.codes, w.index, w.table, w.outer_scale, _or(w.input_scale, none))],
        [fact for w in weights for fact in (w.in_features, w.group_size, w.bias)],
        [_Place.of(block, name) for name, module in found.items() if module is not None],
        [linear._packed for linear in linears],
    )


def _found(block: nn.Module, name: str) -> nn.Module | None:
    module: nn.Module | None = block
    for leaf in name.split("."):
        module = module._modules.get(leaf) if module is not None else None
    return module


def _shared_facts(layer: Layer) -> tuple[float, ...]:
    """What one call of the op takes for all its layers."""
    first, attention = layer.packed[0], layer.block.self_attn
    kind = is_narrow(attention), len(layer.norms)
    return (attention.scaling, attention.head_dim, *kind, first.fp8_max, first.smallest_scale, first.path)


def step(
    self: Any,
    stack: Stack,
    input_ids: Tensor | None = None,
    attention_mask: Any = None,
    position_ids: Tensor | None = None,
    past_key_values: Any = None,
    inputs_embeds: Tensor | None = None,
    use_cache: bool | None = None,
    **options: Any,
) -> Any:
    """The forward of LlamaModel and of those built like it."""
    held = None
    if not stack.is_current(self.layers):
        self.forward = self._long_way  # for good: whoever replaced a part does not need the old ones kept
    elif _is_step(self, input_ids, inputs_embeds, use_cache, options) and not stack.is_heard():
        held = growing_layers(past_key_values, len(stack.layers), stack.layers[0].kept)
    if held is not None and _sees_all(self.config, attention_mask, held[0].get_seq_length() + 1):
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        positions = torch.full((1, 1), held[0].get_seq_length()) if position_ids is None else position_ids
        tables = self.rotary_emb(x, position_ids=positions)
        others = [parameter for layer in stack.layers for parameter in layer.parameters()]
        if _is_plain_bf16(x, *tables, *others) and not differentiates(x, *others) and not _learns(held[0]):
            rooms = [room_of(layer) for layer in held]
            x = _run(stack.layers, stack.weights, stack.facts, x, tables, rooms)
            for room, layer in zip(rooms, held, strict=True):
                room.show(layer, room.used + 1)
            return BaseModelOutputWithPast(last_hidden_state=self.norm(x), past_key_values=past_key_values)
    drop_rooms(past_key_values)
    return self._long_way(
        input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, past_key_values=past_key_values,
        inputs_embeds=inputs_embeds, use_cache=use_cache, **options,
    )  # fmt: skip


def _is_step(
    model: Any, input_ids: Tensor | None, inputs_embeds: Tensor | None, use_cache: bool | None, options: dict[str, Any]
) -> bool:
    """Whether a call asks for one more token of each sequence and nothing else."""
    given = input_ids if inputs_embeds is None else inputs_embeds
    config = model.config
    return (
        given is not None
        and (input_ids is None) != (inputs_embeds is None)
        and given.dim() == (2 if inputs_embeds is None else 3)
        and given.shape[1] == 1
        and bool(config.use_cache if use_cache is None else use_cache)
        and not model.training
        and not torch.compiler.is_compiling()
        and config._attn_implementation in ("sdpa", attention.NAME)
        and not config.output_attentions
        and not config.output_hidden_states
        and bool(options.get("return_dict", getattr(config, "return_dict", True)))
        and not any(value for name, value in options.items() if name != "return_dict")
    )


def _sees_all(config: Any, mask: Any, length: int) -> bool:
    """Whether neither a window nor a mask hides any of the tokens."""
    window = getattr(config, "sliding_window", None)
    if window is not None and length > window:
        return False
    return mask is None or (isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] == length and bool(mask.all()))


def _learns(layer: DynamicLayer) -> bool:
    return layer.keys is not None and differentiates(layer.keys)


def _is_plain_bf16(*tensors: Tensor) -> bool:
    return all(tensor.dtype == torch.bfloat16 and tensor.is_contiguous() for tensor in tensors)


def _run(
    layers: Sequence[Layer], weights: list[Tensor], facts: list[int], x: Tensor, tables: tuple[Tensor, Tensor],
    rooms: Sequence[Room],
) -> Tensor:  # fmt: skip
    """Layers one after the other, each new token's keys and values behind those in its room."""
    nothing = torch.empty(0, dtype=torch.bfloat16)
    first, attention = layers[0].packed[0], layers[0].block.self_attn
    norms = [norm for layer in layers for norm in layer.norms]
    return torch.ops.duotone.decoder_layers(
        x, *tables, [room.keys for room in rooms], [room.values for room in rooms],
        [scale for layer in layers for scale in layer.cache_scales()], rooms[0].used, [norm.weight for norm in norms], weights,
        [_or(linear.bias, nothing) for layer in layers for linear in layer.linears],
        facts, [norm.variance_epsilon for norm in norms], attention.scaling, first.fp8_max, first.smallest_scale, first.path,
    )  # fmt: skip


def _or(tensor: Tensor | None, otherwise: Tensor) -> Tensor:
    return otherwise if tensor is None else tensor


def differentiates(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def layer_agrees(layer: Layer) -> bool:
    """Whether both ways agree on a trial: two sequences, a few tokens behind them."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator).bfloat16()  # noqa: E731
    module, (query, key, *_) = layer.block.self_attn, layer.linears
    size, number, x = module.head_dim, int(module.layer_idx), draw(2, 1, query.in_features)
    if size % 2 or key.out_features % size or query.out_features % key.out_features:
        return False
    angle = torch.rand(2, 1, size // 2, generator=generator).repeat(1, 1, 2) * 6
    tables = (angle.cos().bfloat16(), angle.sin().bfloat16())
    past = [draw(2, key.out_features // size, 5, size) for _ in range(2)]
    if layer.kept != past[0].dtype:
        past = [(50 * x).to(layer.kept) for x in past]
    grown, expected = DynamicLayer(), DynamicCache()
    expected.update(past[0], past[1], number)
    grown.update(past[0], past[1])
    with torch.no_grad(), attention.widened(module.config):  # in BF16 the long way's own error is past the tolerance
        long = layer.block(x, position_embeddings=tables, past_key_values=expected, use_cache=True)
        room = room_of(grown)
        short = _run([layer], layer.weights, layer.facts, x, tables, [room])
    held, nothing = (room.keys[:, :, :6], room.values[:, :, :6]), past[0][:, :, :0]
    rounding = _FP8_ROUNDING if is_narrow(module) else _ROUNDING
    alike = zip(held, expected.update(nothing, nothing, number), strict=True)
    return close(short, long, x) and all(close(ours, theirs, rounding=rounding) for ours, theirs in alike)


def close(short: Tensor, long: Tensor, base: Tensor | float = 0.0, rounding: float = _ROUNDING) -> bool:
    """Whether both ways agree on what they add to `base`, up to BF16's rounding of the sum, or another one."""
    short, long = short.float(), long.float()
    return bool(((short - long).abs() <= _TOLERANCE * (long - base).abs().max() + rounding * long.abs()).all())
