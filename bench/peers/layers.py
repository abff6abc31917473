# Shapes: N out_features, K in_features, G groups along K.
"""What a peer's checkpoint says of one linear, in one form for every layout, and the arithmetics it can be run in."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class PeerLinear:
    """One 4-bit linear of a peer's checkpoint, as the file stores it.

    level: signed integers minus zero point, float32 [N, K] in original column order. scale: float32 [N, G], the stored value.
    group_size: columns a scale covers. input_scale: static activation scale or None. pre_scale: float32 [K] that multiplies the
    input before it is quantized, or None. outer_scale: a second-level weight scale (float32 scalar or [N]) that divides `scale`
    before the FP8 rounding and multiplies the product after it, or None. bias: float32 [N] or None.
    """

    level: Tensor
    scale: Tensor
    group_size: int
    input_scale: Tensor | None = None
    pre_scale: Tensor | None = None
    outer_scale: Tensor | None = None
    bias: Tensor | None = None
