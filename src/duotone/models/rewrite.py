# Shapes: N out_features, K in_features.
"""A model all of whose matrix products are `nn.Linear`: what the quantizer sees, solves and replaces."""

from torch import nn
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.pytorch_utils import Conv1D

from duotone.models.convolutions import unfold
from duotone.models.experts import linear_of, put, unfuse

#: Set on linears whose weight the checkpoint holds as [K, N].
STORED_TRANSPOSED = "stored_transposed"


def all_linears(model: nn.Module) -> None:
    """Put linears in the place of what is one by another name or shape, weights and all; the model computes what it did."""
    _straighten(model)
    unfuse(model)
    unfold(model)


def _straighten(model: nn.Module) -> None:
    """Conv1D, which holds its weight transposed, and Falcon's linear."""
    for path, module in list(model.named_modules()):
        if isinstance(module, Conv1D | FalconLinear):
            transposed = isinstance(module, Conv1D)
            weight = module.weight.data.T.contiguous() if transposed else module.weight.data
            linear = linear_of(weight, module.bias)
            setattr(linear, STORED_TRANSPOSED, transposed)
            put(model, path, linear)
