# Shapes: B sequences, H key heads, L tokens so far, D head size.
"""The short way through a decoder of the Llama kind, when each sequence of a batch gets one new token.

Such a step is hundreds of torch's small ops, many of which cost more to call than to compute, and threads are woken for each.
Here a whole layer is one op, whose threads stay together to its end; a prompt's norms and gates are one op each, and the
output head, which stays BF16, is read at the speed of memory. A module takes the short way only if it is built like Llama's
and a trial at loading gives what the long way gives, and only where it applies; everywhere else transformers' own code runs.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.activations import SiLUActivation

from duotone.kernels import cpu, native
from duotone.runtime import attention
from duotone.runtime.cache import Room, growing_layer, room_of
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
#: Tokens beyond which torch's own product of the output head is as fast.
_HEAD_TOKENS = 4


def install(model: PreTrainedModel, blocks: nn.ModuleList) -> None:
    """Give a BF16 model on a CPU the short way, where it is right; without the compiled extension nothing changes."""
    if not native.available():
        return
    norms = {module for module in model.modules() if _is_norm(module)}
    for block in blocks:
        parts = _parts(block, norms)
        if parts is not None and _layer_agrees(block, parts):
            _replace(block, _layer, parts)
        mlp = getattr(block, "mlp", None)
        if mlp is not None and _is_gated(mlp):
            _replace(mlp, _mlp)
    for norm in norms:
        _replace(norm, _norm)
    head = model.get_output_embeddings()
    if attention.is_better(model.dtype, model.device) and _is_plain(head):
        _replace(head, _head)


def _replace(module: Any, forward: Any, *more: Any) -> None:
    module._long_way = module.forward
    module.forward = partial(forward, module, *more)  # which, unlike a method, is pickled with the model


def _is_norm(module: nn.Module) -> bool:
    """A module that does to a sample what an RMS norm does, in BF16."""
    weight = getattr(module, "weight", None)
    if not (isinstance(weight, Tensor) and hasattr(module, "variance_epsilon")):
        return False
    if weight.dtype != torch.bfloat16 or weight.dim() != 1 or weight.device.type != "cpu":
        return False
    x = torch.randn(3, len(weight), generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.no_grad():
        return _close(torch.ops.duotone.rms_norm(x, weight, module.variance_epsilon), module(x))


def _norm(self: Any, hidden_states: Tensor) -> Tensor:
    fits = hidden_states.dtype == self.weight.dtype == torch.bfloat16 and hidden_states.is_contiguous()
    if not fits or torch.compiler.is_compiling():
        return self._long_way(hidden_states)
    return torch.ops.duotone.rms_norm(hidden_states, self.weight, self.variance_epsilon)


def _is_gated(mlp: Any) -> bool:
    """Whether an MLP is down(silu(gate) * up), by its function and on a trial."""
    linears = [getattr(mlp, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    if None in linears or not isinstance(getattr(mlp, "act_fn", None), nn.SiLU | SiLUActivation):
        return False
    x = torch.randn(2, 1, mlp.gate_proj.in_features, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.no_grad():
        return _close(_short_mlp(mlp, x), mlp(x))


def _mlp(self: Any, x: Tensor) -> Tensor:
    """The forward of LlamaMLP."""
    return self._long_way(x) if x.dtype != torch.bfloat16 or torch.compiler.is_compiling() else _short_mlp(self, x)


def _short_mlp(mlp: Any, x: Tensor) -> Tensor:
    gate, up = mlp.gate_proj(x), mlp.up_proj(x)
    return mlp.down_proj(torch.ops.duotone.silu_multiply(gate, up))


def _is_plain(head: Any) -> bool:
    """Whether an output head is an ordinary linear without a bias, and the op gives what it gives."""
    if type(head) is not nn.Linear or head.bias is not None or head.weight.dtype != torch.bfloat16:
        return False
    x = torch.randn(1, head.in_features, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.no_grad():
        return _close(torch.ops.duotone.dense(x, head.weight), head(x))


def _head(self: Any, x: Tensor) -> Tensor:
    """The forward of the output head."""
    short = (
        x.numel() <= _HEAD_TOKENS * self.in_features
        and x.dtype == self.weight.dtype == torch.bfloat16
        and x.is_contiguous()
        and not _differentiates(x, self.weight)
        and not torch.compiler.is_compiling()
    )
    return torch.ops.duotone.dense(x, self.weight) if short else self._long_way(x)


@dataclass(frozen=True)
class _Parts:
    """A layer's modules: what it has been tried with. `linears` are those of one input together."""

    linears: tuple[tuple[QuantizedLinear, ...], ...]
    norms: tuple[Any, ...]
    within: tuple[nn.Module, ...]  # what holds these

    def are_of(self, layer: nn.Module) -> bool:
        """Whether they still are the layer's, and nobody listens to them."""
        names = [name for group in _LINEARS for name in group] + [*_NORMS, *_HEAD_NORMS][: len(self.norms)]
        mine = [linear for group in self.linears for linear in group] + [*self.norms]
        return all(_found(layer, name) is module for name, module in zip(names, mine, strict=True)) and not any(
            module._forward_hooks or module._forward_pre_hooks for module in (*mine, *self.within)
        )


def _found(layer: nn.Module, name: str) -> nn.Module | None:
    module: nn.Module | None = layer
    for leaf in name.split("."):
        module = module._modules.get(leaf) if module is not None else None
    return module


def _parts(layer: nn.Module, norms: set[nn.Module]) -> _Parts | None:
    """A layer's parts, where it has those of Llama's and the op can read them."""
    linears = tuple(tuple(_found(layer, name) for name in group) for group in _LINEARS)
    own = [_found(layer, name) for name in _NORMS] + [norm for name in _HEAD_NORMS if (norm := _found(layer, name))]
    if any(norm not in norms for norm in own) or len(own) == len(_NORMS) + 1:
        return None
    quantized = tuple(tuple(linear for linear in group if isinstance(linear, QuantizedLinear)) for group in linears)
    if quantized != linears or any(linear.backend is not cpu for group in quantized for linear in group):
        return None
    if any(merged_weight(group) is None for group in quantized):
        return None
    within = tuple(layer.get_submodule(name) for name in ("self_attn", "mlp"))
    return _Parts(quantized, tuple(own), within) if hasattr(within[0], "scaling") else None


def _layer(
    self: Any,
    parts: _Parts,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_values: Any = None,
    use_cache: bool | None = False,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    **options: Any,
) -> Tensor:
    """The forward of LlamaDecoderLayer, and of Qwen3's, which norms its queries and keys."""
    cache = growing_layer(past_key_values, self.self_attn.layer_idx)
    short = (
        hidden_states.shape[1] == 1
        and hidden_states.dtype == torch.bfloat16
        and hidden_states.is_contiguous()
        and attention_mask is None
        and cache is not None
        and position_embeddings is not None
        and position_embeddings[0].dtype == torch.bfloat16
        and not self.training
        and not torch.compiler.is_compiling()
        and not _differentiates(hidden_states, *position_embeddings)
        and self.self_attn.config._attn_implementation in ("sdpa", attention.NAME)
        and not options.get("output_attentions")
        and parts.are_of(self)
    )
    if not short or position_embeddings is None or cache is None:
        return self._long_way(
            hidden_states, attention_mask=attention_mask, position_ids=position_ids, past_key_values=past_key_values,
            use_cache=use_cache, position_embeddings=position_embeddings, **options,
        )  # fmt: skip
    room = room_of(cache)
    y = _short_layer(parts, self.self_attn, hidden_states, position_embeddings, room)
    room.show_new(cache)
    return y


def _short_layer(parts: _Parts, attention: Any, x: Tensor, position_embeddings: tuple[Tensor, Tensor], room: Room) -> Tensor:
    cosine, sine = (table.reshape(-1, table.shape[-1]) for table in position_embeddings)
    nothing = x.new_empty(0)
    weights = [weight for group in parts.linears if (weight := merged_weight(group)) is not None]
    tensors = [t for w in weights for t in (w.codes, w.index, w.table, w.outer_scale, _or(w.input_scale, nothing))]
    first = weights[0]
    return torch.ops.duotone.decoder_layer(
        x, cosine, sine, room.keys, room.values, room.used, [norm.weight for norm in parts.norms], tensors,
        [_or(linear.bias, nothing) for group in parts.linears for linear in group],
        [fact for w in weights for fact in (w.in_features, w.group_size, w.bias)],
        [norm.variance_epsilon for norm in parts.norms], attention.scaling, first.fp8_max, first.smallest_scale, first.path,
    )  # fmt: skip


def _or(tensor: Tensor | None, otherwise: Tensor) -> Tensor:
    return otherwise if tensor is None else tensor


def _differentiates(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _layer_agrees(layer: Any, parts: _Parts) -> bool:
    """Whether both ways agree on a trial: two sequences, a few tokens behind them."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator).bfloat16()  # noqa: E731
    attention, (query, key, _) = layer.self_attn, parts.linears[0]
    size, x = attention.head_dim, draw(2, 1, query.in_features)
    if size % 2 or key.out_features % size or query.out_features % key.out_features:
        return False
    angle = torch.rand(2, 1, size // 2, generator=generator).repeat(1, 1, 2) * 6
    tables = (angle.cos().bfloat16(), angle.sin().bfloat16())
    past = [draw(2, key.out_features // size, 5, size) for _ in range(2)]
    caches = [_filled(attention.layer_idx, *past) for _ in range(2)]
    grown, expected = (cache.layers[attention.layer_idx] for cache in caches)
    with torch.no_grad():
        long = layer(x, position_embeddings=tables, past_key_values=caches[1], use_cache=True)
        room = room_of(grown)
        short = _short_layer(parts, attention, x, tables, room)
        room.show_new(grown)
    return _close(short, long, x) and _close(grown.keys, expected.keys) and _close(grown.values, expected.values)


def _filled(number: int, keys: Tensor, values: Tensor) -> DynamicCache:
    """A cache whose layer `number` holds these."""
    cache = DynamicCache()
    cache.update(keys, values, number)
    return cache


def _close(short: Tensor, long: Tensor, base: Tensor | float = 0.0) -> bool:
    """Whether both ways agree on what they add to `base`, up to BF16's rounding of the sum."""
    short, long = short.float(), long.float()
    return bool(((short - long).abs() <= _TOLERANCE * (long - base).abs().max() + _ROUNDING * long.abs()).all())
