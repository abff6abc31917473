"""Other layouts than the one `quantize` writes: pure functions between a quantized weight and the tensors of a file."""

from duotone.checkpoint.layouts.dense import DENSE
from duotone.checkpoint.layouts.gptq import GPTQ
from duotone.checkpoint.layouts.layout import Layout
from duotone.checkpoint.layouts.w4a16 import W4A16

#: What `duotone export --format` makes.
LAYOUTS: dict[str, Layout] = {layout.name: layout for layout in (W4A16, GPTQ, DENSE)}

__all__ = ["LAYOUTS", "Layout"]
