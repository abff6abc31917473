# Shapes: B sequences, H key heads, L tokens so far, D head size.
"""All layers of a decoder as one op, when each sequence of a batch gets one new token: csrc/decoder.cpp.

By its modules such a step is hundreds of torch's small ops, many of which cost more to call than to compute, the more so as
each layer's weights drive everything else out of the caches; and threads are woken for each. The op's threads stay together
to a layer's end.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import BaseModelOutputWithPast

from duotone.kernels import cpu
from duotone.runtime import attention
from duotone.runtime.cache import Room, room_of, rooms_of
from duotone.runtime.linear import QuantizedLinear, merged_weight

#: Between the two ways, relative to the largest output: BF16 has eight bits, and a few roundings differ.
_TOLERANCE = 0.02
#: And relative to each, where it is a sum: the last bit.
_ROUNDING = 2.0**-7
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
#: Options of a model's forward that ask for nothing.
_PLAIN = (("return_dict", True), ("use_cache", True))


@dataclass(frozen=True)
class Layer:
    """A layer's modules, and its weights as the op reads them: what it has been tried with."""

    block: Any
    linears: tuple[QuantizedLinear, ...]
    norms: tuple[Any, ...]
    weights: list[Tensor]
    facts: list[int]
    places: list[tuple[nn.Module, str, nn.Module]]  # (parent, name, module) of each
    packed: list[cpu.Packed]  # of each linear

    def is_whole(self) -> bool:
        """Whether these still are the layer's modules and weights, and nobody listens to them."""
        return all(
            parent._modules.get(name) is module and not module._forward_hooks and not module._forward_pre_hooks
            for parent, name, module in self.places
        ) and all(linear._packed is packed for linear, packed in zip(self.linears, self.packed, strict=True))


@dataclass(frozen=True)
class Stack:
    """All layers of a model."""

    layers: tuple[Layer, ...]
    weights: list[Tensor]
    facts: list[int]

    def is_whole(self, blocks: Any) -> bool:
        """Whether these still are the layers of a model."""
        mine = [layer.block for layer in self.layers]
        return [*blocks._modules.values()] == mine and all(layer.is_whole() for layer in self.layers)


def find_stack(model: Any, blocks: nn.ModuleList, norms: set[nn.Module]) -> Stack | None:
    """The layers of a model of Llama's build, where the op can read all of them."""
    parts = ("embed_tokens", "layers", "norm", "rotary_emb")
    if any(getattr(model, name, None) is None for name in parts) or model.layers is not blocks or not len(blocks):
        return None
    layers = [_layer(block, norms) for block in blocks]
    found = tuple(layer for layer in layers if layer is not None)
    if len(found) < len(layers) or len({_shared_facts(layer) for layer in found}) > 1:
        return None
    return Stack(found, [t for layer in found for t in layer.weights], [fact for layer in found for fact in layer.facts])


def _layer(block: nn.Module, norms: set[nn.Module]) -> Layer | None:
    """A layer of Llama's build, or of Qwen 3's, which norms its queries and keys."""
    names = [name for group in _LINEARS for name in group]
    found = {name: _found(block, name) for name in (*names, *_NORMS, *_HEAD_NORMS, "self_attn", "mlp")}
    own = [found[name] for name in _NORMS] + [norm for name in _HEAD_NORMS if (norm := found[name]) is not None]
    linears = tuple(linear for name in names if isinstance(linear := found[name], QuantizedLinear) and linear.backend is cpu)
    if len(linears) < len(names) or any(norm not in norms for norm in own) or len(own) == len(_NORMS) + 1:
        return None
    merged = [merged_weight([linear for linear in map(found.get, group) if isinstance(linear, QuantizedLinear)])
              for group in _LINEARS]  # fmt: skip
    weights = [weight for weight in merged if weight is not None]
    if len(weights) < len(_LINEARS) or not hasattr(found["self_attn"], "scaling"):
        return None
    none = torch.empty(0)
    return Layer(
        block,
        linears,
        tuple(own),
        [t for w in weights for t in (w.codes, w.index, w.table, w.outer_scale, _or(w.input_scale, none))],
        [fact for w in weights for fact in (w.in_features, w.group_size, w.bias)],
        [_place(block, name, module) for name, module in found.items() if module is not None],
        [linear._packed for linear in linears],
    )


def _place(block: nn.Module, name: str, module: nn.Module) -> tuple[nn.Module, str, nn.Module]:
    parent, _, leaf = name.rpartition(".")
    return block.get_submodule(parent), leaf, module


def _found(block: nn.Module, name: str) -> nn.Module | None:
    module: nn.Module | None = block
    for leaf in name.split("."):
        module = module._modules.get(leaf) if module is not None else None
    return module


def _shared_facts(layer: Layer) -> tuple[float, ...]:
    """What one call of the op takes for all its layers."""
    first, attention = layer.packed[0], layer.block.self_attn
    return (attention.scaling, attention.head_dim, len(layer.norms), first.fp8_max, first.smallest_scale, first.path)


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
    x, rooms = inputs_embeds, None
    if _is_step(self, input_ids, inputs_embeds, options) and stack.is_whole(self.layers):
        rooms = rooms_of(past_key_values, len(stack.layers))
    if rooms is not None and _sees_all(attention_mask, rooms[0].used + 1):
        x = self.embed_tokens(input_ids) if x is None else x
        positions = torch.full((1, 1), rooms[0].used) if position_ids is None else position_ids
        tables = self.rotary_emb(x, position_ids=positions)
        if all(t.dtype == torch.bfloat16 and t.is_contiguous() for t in (x, *tables)) and not differentiates(x):
            x = _run(stack.layers, stack.weights, stack.facts, x, tables, rooms)
            for room in rooms:
                room.show_new()
            return BaseModelOutputWithPast(last_hidden_state=self.norm(x), past_key_values=past_key_values)
    return self._long_way(
        input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, past_key_values=past_key_values,
        inputs_embeds=inputs_embeds, use_cache=use_cache, **options,
    )  # fmt: skip


def _is_step(model: Any, input_ids: Tensor | None, inputs_embeds: Tensor | None, options: dict[str, Any]) -> bool:
    """Whether a call asks for one more token of each sequence and nothing else."""
    given = input_ids if inputs_embeds is None else inputs_embeds
    config = model.config
    return (
        given is not None
        and (input_ids is None) != (inputs_embeds is None)
        and given.dim() == (2 if inputs_embeds is None else 3)
        and given.shape[1] == 1
        and not model.training
        and not torch.compiler.is_compiling()
        and config._attn_implementation in ("sdpa", attention.NAME)
        and not config.output_attentions
        and not config.output_hidden_states
        and config.return_dict
        and all(value is None or value is False or (name, value) in _PLAIN for name, value in options.items())
    )


def _sees_all(mask: Any, length: int) -> bool:
    """Whether a mask hides none of the tokens."""
    return mask is None or (isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] == length and bool(mask.all()))


def _run(
    layers: Sequence[Layer], weights: list[Tensor], facts: list[int], x: Tensor, tables: tuple[Tensor, Tensor],
    rooms: Sequence[Room],
) -> Tensor:  # fmt: skip
    """Layers one after the other, each new token's keys and values behind those in its room."""
    nothing = torch.empty(0, dtype=torch.bfloat16)
    first, attention = layers[0].packed[0], layers[0].block.self_attn
    norms = [norm for layer in layers for norm in layer.norms]
    return torch.ops.duotone.decoder_layers(
        x, *tables, [room.keys for room in rooms], [room.values for room in rooms], rooms[0].used,
        [norm.weight for norm in norms], weights,
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
    attention, (query, key, *_) = layer.block.self_attn, layer.linears
    size, number, x = attention.head_dim, int(attention.layer_idx), draw(2, 1, query.in_features)
    if size % 2 or key.out_features % size or query.out_features % key.out_features:
        return False
    angle = torch.rand(2, 1, size // 2, generator=generator).repeat(1, 1, 2) * 6
    tables = (angle.cos().bfloat16(), angle.sin().bfloat16())
    past = [draw(2, key.out_features // size, 5, size) for _ in range(2)]
    grown, expected = DynamicLayer(), DynamicCache()
    expected.update(past[0], past[1], number)
    grown.update(past[0], past[1])
    with torch.no_grad():
        long = layer.block(x, position_embeddings=tables, past_key_values=expected, use_cache=True)
        room = room_of(grown)
        short = _run([layer], layer.weights, layer.facts, x, tables, [room])
    held, nothing = (room.keys[:, :, :6], room.values[:, :, :6]), past[0][:, :, :0]
    return close(short, long, x) and all(map(close, held, expected.update(nothing, nothing, number)))


def close(short: Tensor, long: Tensor, base: Tensor | float = 0.0) -> bool:
    """Whether both ways agree on what they add to `base`, up to BF16's rounding of the sum."""
    short, long = short.float(), long.float()
    return bool(((short - long).abs() <= _TOLERANCE * (long - base).abs().max() + _ROUNDING * long.abs()).all())
