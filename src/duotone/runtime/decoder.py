# Shapes: B sequences, T new tokens, H heads, L tokens so far, D head size.
"""The short way through a decoder of the Llama kind, when each sequence of a batch gets one new token.

Between its linears such a step is dozens of torch's small ops, each costing more to call than to compute. Here a norm is one
op, rotation is one, attention is one. A module takes the short way only if it is built like Llama's and a trial at loading
gives what the long way gives, and only where it applies; everywhere else transformers' own code runs.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import SiLUActivation

from duotone.kernels import native
from duotone.runtime.attention import NAME as FLOAT32

#: Between the two ways, relative to the outputs' size: BF16 has eight bits, and a few roundings differ.
_TOLERANCE = 0.02
#: What an attention has whose forward reads like LlamaAttention's.
_LLAMA_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj", "scaling", "head_dim", "layer_idx")

#: And what an MLP has.
_LLAMA_MLP = ("gate_proj", "up_proj", "down_proj", "act_fn")


def install(model: PreTrainedModel, blocks: nn.ModuleList) -> None:
    """Give a BF16 model on a CPU the short way, where it is right; without the compiled extension nothing changes."""
    if not native.available():
        return
    for module in model.modules():
        if _is_norm(module):
            _replace(module, _norm)
    for block in blocks:
        attention = getattr(block, "self_attn", None)
        if attention is not None and all(hasattr(attention, name) for name in _LLAMA_ATTENTION) and _tried(attention):
            _replace(attention, _attention)
        mlp = getattr(block, "mlp", None)
        if mlp is not None and all(hasattr(mlp, name) for name in _LLAMA_MLP) and _is_gated(mlp):
            _replace(mlp, _mlp)


def _replace(module: Any, forward: Any) -> None:
    module._long_way = module.forward
    module.forward = partial(forward, module)  # which, unlike a method, is pickled with the model


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
    if not isinstance(mlp.act_fn, nn.SiLU | SiLUActivation):
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


def _attention(
    self: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    attention_mask: Tensor | None = None,
    past_key_values: Any = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """The forward of LlamaAttention, and of Qwen3's, which norms its queries and keys."""
    short = (
        hidden_states.shape[1] == 1
        and hidden_states.dtype == torch.bfloat16
        and attention_mask is None
        and past_key_values is not None
        and position_embeddings is not None
        and position_embeddings[0].dtype == torch.bfloat16
        and not self.training
        and self.config._attn_implementation in ("sdpa", FLOAT32)
        and not options.get("output_attentions")
        and not torch.compiler.is_compiling()
    )
    if not short or position_embeddings is None or past_key_values is None:
        return self._long_way(
            hidden_states=hidden_states, position_embeddings=position_embeddings, attention_mask=attention_mask,
            past_key_values=past_key_values, **options,
        )  # fmt: skip
    batch, size = hidden_states.shape[0], self.head_dim
    query, key, value = self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states)
    if hasattr(self, "q_norm"):
        query, key = (norm(x.view(batch, 1, -1, size)) for norm, x in ((self.q_norm, query), (self.k_norm, key)))
    cosine, sine = (table.view(-1, size) for table in position_embeddings)
    for x in (query, key):
        torch.ops.duotone.rotate(x.view(batch, -1), cosine, sine)
    # One token: [B, 1, H, D] and [B, H, 1, D] are the same in memory.
    key, value = past_key_values.update(key.view(batch, -1, 1, size), value.view(batch, -1, 1, size), self.layer_idx)
    y = torch.ops.duotone.attend(query.view(batch, -1), key.contiguous(), value.contiguous(), self.scaling)
    return self.o_proj(y.view(batch, 1, -1)), None


class _Cache:
    """A layer's keys and values for a trial, always the same."""

    def __init__(self, key: Tensor, value: Tensor) -> None:
        self.key, self.value = key, value

    def update(self, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        """The trial's, and the new token's behind them."""
        return torch.cat((self.key, key), 2), torch.cat((self.value, value), 2)


def _tried(attention: Any) -> bool:
    """Whether both ways agree on a trial: two sequences, a few tokens behind them."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator).bfloat16()  # noqa: E731
    size, heads = attention.head_dim, attention.k_proj.out_features // attention.head_dim
    x, cache = draw(2, 1, attention.q_proj.in_features), _Cache(draw(2, heads, 5, size), draw(2, heads, 5, size))
    angle = torch.rand(2, 1, size // 2, generator=generator).repeat(1, 1, 2) * 6
    tables = (angle.cos().bfloat16(), angle.sin().bfloat16())
    with torch.no_grad():
        long = attention(hidden_states=x, position_embeddings=tables, attention_mask=None, past_key_values=cache)[0]
        short = _attention(attention, x, tables, None, cache)[0]
    return _close(short, long)


def _close(short: Tensor, long: Tensor) -> bool:
    return bool((short.float() - long.float()).abs().max() <= _TOLERANCE * long.float().abs().max())
