"""Which runtimes will load a checkpoint. Rules with their source; they warn and never change what is quantized."""

from duotone.scheme import Scheme

#: vLLM 0.33.0, CutlassW4A8LinearKernel.can_implement (FORMATS.md 1.1)
_VLLM_GROUP, _VLLM_MULTIPLE = 128, 128


def vllm_warnings(scheme: Scheme, shapes: dict[str, tuple[int, int]], split_groups: list[str]) -> list[str]:
    """Why vLLM's native W4A8 path (SM90) would refuse this checkpoint; empty when it loads. One line a reason.

    shapes: [N, K] of each quantized linear. split_groups: linears kept in BF16 whose fused partners are quantized.
    """
    if not scheme.target.channel_outer_scale:
        return [f"will not load in vLLM: target {scheme.target.name} is read by Duotone only"]
    reasons: list[str] = []
    if scheme.group_size != _VLLM_GROUP:
        reasons.append(f"will not load in vLLM: group_size is {scheme.group_size}, its W4A8 kernel needs {_VLLM_GROUP}")
    if not scheme.symmetric:
        reasons.append("will not load in vLLM: its W4A8 kernel has no zero points (asymmetric)")
    odd = [(layer, n, k) for layer, (n, k) in shapes.items() if n % _VLLM_MULTIPLE or k % _VLLM_MULTIPLE]
    if odd:
        layer, n, k = odd[0]
        reasons.append(
            f"will not load in vLLM: {layer} is {n} x {k}, its kernel needs multiples of {_VLLM_MULTIPLE} ({len(odd)} layers)"
        )
    if split_groups:
        reasons.append(
            f"will not load in vLLM: {split_groups[0]} stays BF16, linears it is fused with do not: ignore all of them"
        )
    return reasons
