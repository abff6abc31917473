# Shapes: N out_features, K in_features.
"""What vLLM asks of a mixture's experts, which one kernel multiplies all at once."""

from collections.abc import Iterator

from duotone.loadability.rules import Finding, Rule, Situation
from duotone.loadability.subject import Linear

_VLLM = "vllm 0.33.0 model_executor/layers/quantization/compressed_tensors/compressed_tensors_moe"
#: What leaves the experts in BF16.
_LEAVE = r"--ignore 're:.*\.experts\..*'"


def experts_multiple(source: str, of: int) -> Rule:
    """Sizes of every expert's linears on a rank."""

    def findings(here: Situation) -> Iterator[Finding]:
        wrong: dict[tuple[str, float, float], list[str]] = {}
        for linear in _experts(here):
            rows, columns = linear.on_one_rank(here.ranks)
            if rows % of or columns % of:
                wrong.setdefault((linear.name.rpartition(".")[2], rows, columns), []).append(linear.name)
        share = f" of one rank of {here.ranks}" if here.ranks > 1 else ""
        for (name, rows, columns), names in wrong.items():
            yield Finding(f"the experts' {name}{share} is {rows:g} x {columns:g}", tuple(names), _LEAVE)

    return Rule(f"out_features and in_features of a rank's experts are multiples of {of}", source, findings)


def experts_alike(source: str) -> Rule:
    """All linears of a bank are stored in one way, or none is quantized."""

    def findings(here: Situation) -> Iterator[Finding]:
        banks = {linear.bank for linear in _experts(here)}
        others = [linear.name for fused in here.subject.fp8 for linear in fused if linear.bank in banks]
        others += [name for name in here.subject.kept if name.rsplit(".", 2)[0] in banks]
        if others:
            advice = "the same --rule for all experts"
            yield Finding(f"{others[0]} is not in 4 bits, other experts beside it are", tuple(others), advice)

    return Rule("all linears of a layer's experts are stored alike", source, findings)


def experts_unbiased(source: str) -> Rule:
    """Experts without biases."""

    def findings(here: Situation) -> Iterator[Finding]:
        biased = [linear.name for linear in _experts(here) if linear.bank in here.subject.biased]
        if biased:
            yield Finding("the experts have biases", tuple(biased), _LEAVE)

    return Rule("a mixture's experts have no biases", source, findings)


def _experts(here: Situation) -> Iterator[Linear]:
    return (linear for fused in here.subject.fused for linear in fused if linear.bank)


VLLM_EXPERTS = (
    experts_alike(f"{_VLLM}/compressed_tensors_moe.py CompressedTensorsMoEMethod.get_moe_method"),
    experts_multiple(f"{_VLLM}/compressed_tensors_moe_w4a8_fp8.py create_weights", 256),
    experts_unbiased(f"{_VLLM}/compressed_tensors_moe_w4a8_fp8.py create_weights (makes none)"),
)
