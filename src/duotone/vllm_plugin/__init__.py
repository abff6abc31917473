# pyright: reportMissingImports=false
"""vLLM runs our checkpoints with Duotone's linear: an entry point of `vllm.general_plugins`, imported by nothing else here.

vLLM finds it by itself once both are installed; `VLLM_PLUGINS` without `duotone` leaves it out. It takes what vLLM has no
kernel for (`shares.is_left_to_vllm`), and all W4A8 checkpoints with `--quantization duotone`. The linear is `QuantizedLinear`,
so the kernel is what `kernels.dispatch` chooses for the device.
"""

NAME = "duotone"


def register() -> None:
    """Add the quantization `duotone` to vLLM's. Called in each of vLLM's processes; more than once does no harm."""
    from vllm.model_executor.layers.quantization import register_quantization_config

    from duotone.vllm_plugin.config import DuotoneConfig

    register_quantization_config(NAME)(DuotoneConfig)
