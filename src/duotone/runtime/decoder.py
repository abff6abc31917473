"""The short way through a decoder of the Llama kind.

When each sequence gets one new token, all layers are one op (stack.py), and the output head, which stays BF16, is read at the
speed of memory; a prompt's norms and gates are one op each. A module takes the short way only if it is built like Llama's and
a trial at loading gives what the long way gives, and only where it applies; everywhere else transformers' own code runs.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import SiLUActivation

from duotone.device import has_bf16_units, is_x86
from duotone.kernels import native
from duotone.runtime.stack import close, differentiates, find_stack, layer_agrees, step

#: Tokens beyond which torch's own product of the output head is as fast, on x86 without and with BF16 units.
_HEAD_TOKENS, _HEAD_TOKENS_BF16 = 4, 1


def install(model: PreTrainedModel, blocks: nn.ModuleList) -> None:
    """Give a BF16 model on a CPU the short way, where it is right; without the compiled extension nothing changes."""
    if not native.available():
        return
    norms = {module for module in model.modules() if _is_norm(module)}
    for norm in norms:
        _replace(norm, _norm)
    for block in blocks:
        mlp = getattr(block, "mlp", None)
        if mlp is not None and _is_gated(mlp):
            _replace(mlp, _mlp)
    stack = find_stack(model.base_model, blocks, norms)  # as they are now: it knows their forwards
    if stack is not None and all(layer_agrees(layer) for layer in stack.layers):
        _replace(model.base_model, step, stack)
    head = model.get_output_embeddings()
    if model.dtype == torch.bfloat16 and is_x86() and _is_plain(head):
        _replace(head, _head, _HEAD_TOKENS_BF16 if has_bf16_units() else _HEAD_TOKENS)


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
        return close(torch.ops.duotone.rms_norm(x, weight, module.variance_epsilon), module(x))


def _norm(self: Any, hidden_states: Tensor) -> Tensor:
    fits = hidden_states.dtype == self.weight.dtype == torch.bfloat16 and hidden_states.is_contiguous()
    if not fits or differentiates(hidden_states, self.weight) or torch.compiler.is_compiling():
        return self._long_way(hidden_states)
    return torch.ops.duotone.rms_norm(hidden_states, self.weight, self.variance_epsilon)


def _is_gated(mlp: Any) -> bool:
    """Whether an MLP is down(silu(gate) * up), by its function and on a trial."""
    linears = [getattr(mlp, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    if None in linears or not isinstance(getattr(mlp, "act_fn", None), nn.SiLU | SiLUActivation):
        return False
    x = torch.randn(2, 1, mlp.gate_proj.in_features, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.no_grad():
        return close(_short_mlp(mlp, x), mlp(x))


def _mlp(self: Any, x: Tensor) -> Tensor:
    """The forward of LlamaMLP."""
    short = x.dtype == torch.bfloat16 and not differentiates(x) and not torch.compiler.is_compiling()
    return _short_mlp(self, x) if short else self._long_way(x)


def _short_mlp(mlp: Any, x: Tensor) -> Tensor:
    gate, up = mlp.gate_proj(x), mlp.up_proj(x)
    return mlp.down_proj(torch.ops.duotone.silu_multiply(gate, up))


def _is_plain(head: Any) -> bool:
    """Whether an output head is an ordinary linear without a bias, and the op gives what it gives."""
    if type(head) is not nn.Linear or head.bias is not None or head.weight.dtype != torch.bfloat16:
        return False
    if head.weight.device.type != "cpu":
        return False
    x = torch.randn(1, head.in_features, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.no_grad():
        return close(torch.ops.duotone.dense(x, head.weight), head(x))


def _head(self: Any, most: int, x: Tensor) -> Tensor:
    """The forward of the output head, for at most so many tokens."""
    short = (
        x.numel() <= most * self.in_features
        and x.dtype == self.weight.dtype == torch.bfloat16
        and x.is_contiguous()
        and not differentiates(x, self.weight)
        and not torch.compiler.is_compiling()
    )
    return torch.ops.duotone.dense(x, self.weight) if short else self._long_way(x)
