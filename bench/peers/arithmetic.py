# Shapes: N out_features, K in_features, G groups along K.
"""A peer's linears in the arithmetic of the runtime that serves them (`contract`), and as its tool means them (`nominal`).

- compressed-tensors W4AFP8 and GPTQ files, contract: vLLM's W4A8 on Hopper, that is its load-time scale split, FP8 weights, FP8
  activations per token. Nominal: weights level * scale, with FP8 activations per token (W4AFP8) or BF16 ones (GPTQ).
- ModelOpt W4A8_AWQ and AutoRound's fp8_to_int_sym, contract: FP8 weights under the tool's own scale of the tensor, and its
  static FP8 activations. Nominal: unrounded weights, the same activations.
- Neural Compressor's DPQ, contract: Gaudi's, that is FP8 up to 240 under the tensor's power of two, and static activations
  calibrated afterwards. Nominal: unrounded weights, BF16 activations.

GPTQ files are served as W4A16 today. In the contract they run as what they would be in W4A8, which is the comparison that
matters here; their nominal rows are what vLLM computes with them now.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from layers import PeerLinear
from layouts import other_tensors, read_peer
from torch import Tensor, nn

from duotone.contract import quantize_activations, split_scale, static_activation_scale
from duotone.formats import E4M3FN
from duotone.qweight import expand_groups
from duotone.scheme import GAUDI, HOPPER, Scheme

#: tool -> (FP8 weights of a linear, outer scale) in the arithmetic that serves it
Weights = Callable[[PeerLinear], Tensor]


class PeerModule(nn.Module):
    """A linear with a peer's weights [N, K] in float32 and its activations: per token, static, or left alone."""

    def __init__(self, weight: Tensor, linear: PeerLinear, bias: Tensor | None, activations: str) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight, self.bias, self.linear, self.activations = weight, bias, linear, activations
        self.input_scale = linear.input_scale
        self.absmax = torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N]."""
        if self.linear.pre_scale is not None:
            x = x * self.linear.pre_scale
        if self.activations == "token":
            x8, scale = quantize_activations(x, HOPPER)
            x = x8 * scale
        elif self.activations == "static" and self.input_scale is not None:
            x = E4M3FN.round(x / self.input_scale) * self.input_scale
        elif self.activations == "gaudi" and self.input_scale is not None:
            x8, scale = quantize_activations(x, GAUDI, self.input_scale)
            x = x8 * scale
        self.absmax = torch.maximum(self.absmax, x.abs().amax())
        return nn.functional.linear(x, self.weight, self.bias)


def split_weights(linear: PeerLinear) -> Tensor:
    """What vLLM multiplies: the two scales it rebuilds from the file's BF16 ones; the sign of a scale goes to the level."""
    scheme = Scheme(HOPPER, max(linear.group_size, 8))
    group, outer = split_scale(linear.scale.abs().to(torch.bfloat16), scheme)
    level = linear.level * _expand(linear.scale.sign(), linear)
    return E4M3FN.round(level * _expand(group, linear)) * outer[:, None]


def tensor_scaled_weights(linear: PeerLinear) -> Tensor:
    """FP8 weights under the tool's own scale of the tensor."""
    assert linear.outer_scale is not None
    return E4M3FN.round(linear.level * _expand(linear.scale / linear.outer_scale, linear)) * linear.outer_scale


def gaudi_weights(linear: PeerLinear) -> Tensor:
    """FP8 up to 240 of level * BF16 group scale, under the tensor's power of two."""
    assert linear.outer_scale is not None
    group = (linear.scale / linear.outer_scale).to(torch.bfloat16).float()
    return GAUDI.fp8.round(linear.level * _expand(group, linear)) * linear.outer_scale


def nominal_weights(linear: PeerLinear) -> Tensor:
    """level * scale, not rounded again."""
    return linear.level * _expand(linear.scale, linear)


#: quantizing tool -> arithmetic -> (weights, activations)
ARITHMETICS: dict[str, dict[str, tuple[Weights, str]]] = {
    "llm-compressor": {"contract": (split_weights, "token"), "nominal": (nominal_weights, "token")},
    "gptqmodel": {"contract": (split_weights, "token"), "nominal": (nominal_weights, "none")},
    "autoround": {"contract": (split_weights, "token"), "nominal": (nominal_weights, "none")},
    "autoround fp8": {"contract": (tensor_scaled_weights, "static"), "nominal": (nominal_weights, "static")},
    "modelopt": {"contract": (tensor_scaled_weights, "static"), "nominal": (nominal_weights, "static")},
    "inc": {"contract": (gaudi_weights, "gaudi"), "nominal": (nominal_weights, "none")},
}


def place(model: Any, folder: Path, tool: str, arithmetic: str, tokens: Tensor) -> None:
    """Put a peer's checkpoint into a loaded original: its linears, and every other tensor it may have changed.

    tokens: the calibration windows, for the static activation scales that Gaudi's flow measures after quantizing.
    """
    weights, activations = ARITHMETICS[tool][arithmetic]
    linears = read_peer(folder)
    with torch.no_grad():
        for name, tensor in other_tensors(folder).items():
            parent, _, leaf = name.rpartition(".")
            if _has(model, parent, leaf):
                getattr(model.get_submodule(parent), leaf).copy_(tensor)
    for name, linear in linears.items():
        parent, _, leaf = name.rpartition(".")
        before = getattr(model.get_submodule(parent), leaf)
        bias = linear.bias if linear.bias is not None else before.bias
        setattr(model.get_submodule(parent), leaf, PeerModule(weights(linear), linear, bias, activations))
    if activations == "gaudi":
        _calibrate_static(model, tokens)


def _calibrate_static(model: Any, tokens: Tensor) -> None:
    modules = [module for module in model.modules() if isinstance(module, PeerModule)]
    with torch.no_grad():
        for batch in tokens.split(16):
            model(input_ids=batch)
    for module in modules:
        module.input_scale = static_activation_scale(module.absmax, GAUDI)


def _expand(group_NG: Tensor, linear: PeerLinear) -> Tensor:
    return expand_groups(group_NG, linear.group_size, linear.level.shape[1])


def _has(model: nn.Module, parent: str, leaf: str) -> bool:
    try:
        return isinstance(getattr(model.get_submodule(parent), leaf, None), Tensor)
    except AttributeError:
        return False
