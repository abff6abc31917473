"""Attention in float32 on CPUs that know no BF16 arithmetic, where torch emulates it at several times the cost.

Queries, keys and values stay BF16 where they are kept; only the product is wider, so it is nearer to the exact one too.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from duotone.device import has_bf16_units, is_x86

NAME = "duotone_float32"


def is_better(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a model of this dtype gains by it on this device: an x86 without BF16 units; of others nothing is known."""
    return dtype == torch.bfloat16 and device.type == "cpu" and is_x86() and not has_bf16_units()


def install(model: PreTrainedModel) -> None:
    """Have every attention of a model that runs torch's fused one run it in float32."""
    if model.config._attn_implementation != "sdpa":  # pyright: ignore[reportPrivateUsage]
        return
    _register()
    model.set_attn_implementation(NAME)


@contextmanager
def widened(config: Any) -> Iterator[None]:
    """Attention in float32 for a while, where torch's fused one runs: what to compare another attention with."""
    before = config._attn_implementation
    _register()
    try:
        config._attn_implementation = NAME if before == "sdpa" else before
        yield
    finally:
        config._attn_implementation = before


def _register() -> None:
    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """transformers' interface: query [B, H, T, D] -> [B, T, H, D]."""
    mask = attention_mask if attention_mask is None or attention_mask.dtype == torch.bool else attention_mask.float()
    output, _ = sdpa_attention_forward(module, query.float(), key.float(), value.float(), mask, **options)
    return output.to(query.dtype), None
