"""Other layouts than the one `quantize` writes: pure functions between a quantized weight and the tensors of a file."""

from duotone.checkpoint.layouts.compressed import COMPRESSED
from duotone.checkpoint.layouts.dense import DENSE
from duotone.checkpoint.layouts.gaudi_inc import GAUDI_INC
from duotone.checkpoint.layouts.gptq import GPTQ
from duotone.checkpoint.layouts.layout import Layout, Shared
from duotone.checkpoint.layouts.modelopt import MODELOPT
from duotone.checkpoint.layouts.q4_0 import GGUF
from duotone.checkpoint.layouts.sglang import SGLANG
from duotone.checkpoint.layouts.w4a16 import W4A16

#: What `duotone export --format` makes.
LAYOUTS: dict[str, Layout] = {
    layout.name: layout for layout in (COMPRESSED, W4A16, GPTQ, MODELOPT, SGLANG, GAUDI_INC, DENSE, GGUF)
}

__all__ = ["LAYOUTS", "Layout", "Shared"]
