"""vLLM with Duotone's plugin (`vllm_plugin`): what vLLM has no W4A8 kernel for runs by ours.

Run: vLLM's CPU build, on one rank and on two (bench/records/vllm_plugin.jsonl), and the loading code on a CPU that vLLM takes
for an L40S (bench/records/vllm_load.jsonl). No GPU was there.
"""

from dataclasses import replace

from duotone.loadability.routes import Route, Runtime
from duotone.loadability.rules import Rule, capability, cut_columns, group_size, vendor

_CONFIG = "duotone vllm_plugin/config.py DuotoneConfig.override_quantization_method"
_LAYOUTS = ("compressed-tensors", "duotone-gaudi")
#: Duotone's own kernels on NVIDIA GPUs: what they ask for, and in words.
ON_GPU = (
    capability("duotone kernels/gpu/backend.py refuses", least=89),
    group_size("duotone kernels/gpu/backend.py _scheme_refuses", 32, 64, *range(128, 1025, 128)),
)
TRITON = "Duotone's Triton kernels: tested without a GPU, never run on one"
_TORCH = "torch's operations: right, not fast, and not run on a GPU"


def with_plugin(vllm: Runtime, loading: tuple[Rule, ...]) -> Runtime:
    """vLLM's own routes, and ours behind them. loading: what vLLM's fused linears and its cache ask of any checkpoint."""
    shares = (cut_columns("duotone vllm_plugin/shares.py Share", 8), *loading)
    asked = Route(
        "compressed-tensors",
        "w4a8",
        f"with --quantization duotone {TRITON}",
        (capability(_CONFIG, exactly=90), *shares),
    )
    cpu, gpu = vendor("duotone kernels/cpu.py", "cpu"), vendor(_CONFIG, "nvidia", "amd")
    on_cpu = [Route(name, "w4a8", "Duotone's CPU kernel", (cpu, *shares)) for name in _LAYOUTS]
    own = [Route(name, "w4a8", TRITON, (*ON_GPU, *shares)) for name in _LAYOUTS]
    on_gpu = [Route(name, "w4a8", _TORCH, (gpu, *shares)) for name in _LAYOUTS]
    unread = {layout: why for layout, why in vllm.unread.items() if layout not in _LAYOUTS}
    return replace(vllm, name="vllm-plugin", routes=(*vllm.routes, asked, *on_cpu, *own, *on_gpu), unread=unread, plugin=None)
