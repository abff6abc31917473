# Shapes: N out_features, K in_features, of one rank's share of all linears that a runtime fuses.
"""The forms that a rule can have. Each makes, of numbers and a source, a rule that finds what breaks it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from duotone.loadability.subject import Linear, Subject


@dataclass(frozen=True)
class Gpu:
    """An accelerator, or a CPU. capability: NVIDIA's compute capability times ten, 0 for others."""

    name: str
    vendor: str
    capability: int = 0


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("h100", "nvidia", 90), Gpu("h200", "nvidia", 90), Gpu("b200", "nvidia", 100), Gpu("l40s", "nvidia", 89),
        Gpu("a100", "nvidia", 80), Gpu("mi300x", "amd"), Gpu("gaudi2", "intel"), Gpu("gaudi3", "intel"), Gpu("cpu", "cpu"),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Situation:
    """Where a subject is to run."""

    subject: Subject
    gpu: Gpu
    ranks: int


@dataclass(frozen=True)
class Finding:
    """What breaks a rule: of these linears, or of the whole checkpoint where there is none; and what could be done."""

    found: str
    linears: tuple[str, ...] = ()
    advice: str | None = None


@dataclass(frozen=True)
class Rule:
    """says: what has to hold. source: where that was read."""

    says: str
    source: str
    findings: Callable[[Situation], Iterator[Finding]]


def vendor(source: str, *names: str) -> Rule:
    """Certain makers' devices, or a CPU."""

    def findings(here: Situation) -> Iterator[Finding]:
        if here.gpu.vendor not in names:
            yield Finding(f"the device is {here.gpu.name}")

    makers = " or ".join("a CPU" if name == "cpu" else f"made by {name}" for name in names)
    return Rule(f"the device is {makers}", source, findings)


def capability(source: str, exactly: int = 0, least: int = 0) -> Rule:
    """NVIDIA devices of a compute capability, times ten."""

    def findings(here: Situation) -> Iterator[Finding]:
        found = here.gpu.capability
        if here.gpu.vendor != "nvidia" or (found != exactly if exactly else found < least):
            yield Finding(f"the device is {here.gpu.name}" + (f" (compute capability {found / 10})" if found else ""))

    wanted = f"exactly {exactly / 10}" if exactly else f"at least {least / 10}"
    return Rule(f"an NVIDIA device of compute capability {wanted}", source, findings)


def group_size(source: str, *sizes: int) -> Rule:
    """Groups of certain sizes."""

    def findings(here: Situation) -> Iterator[Finding]:
        if here.subject.group_size not in sizes:
            yield Finding(f"group_size is {here.subject.group_size}", advice=f"--group-size {max(sizes)}")

    return Rule(f"group_size is {' or '.join(map(str, sizes))}", source, findings)


def symmetric(source: str) -> Rule:
    """No zero points."""

    def findings(here: Situation) -> Iterator[Finding]:
        if not here.subject.symmetric:
            yield Finding("weights have zero points", advice="no --asymmetric")

    return Rule("weights have no zero points", source, findings)


def dtype(source: str, *names: str) -> Rule:
    """The model's dtype."""

    def findings(here: Situation) -> Iterator[Finding]:
        if here.subject.dtype not in names:
            yield Finding(f"config.json has dtype {here.subject.dtype}", advice=f"serve it with --dtype {names[0]}")

    return Rule(f"the dtype is {' or '.join(names)}", source, findings)


def multiples(source: str, n: int, k: int) -> Rule:
    """Sizes of each rank's share of what is fused."""

    def findings(here: Situation) -> Iterator[Finding]:
        for fused in here.subject.fused:
            shares = [linear.on_one_rank(here.ranks) for linear in fused]
            rows, columns = sum(share[0] for share in shares), shares[0][1]
            if rows % n or columns % k:
                yield Finding(_share(fused, rows, columns, here.ranks), _names(fused), _ignoring(fused))

    return Rule(f"out_features of a rank is a multiple of {n}, in_features of {k}", source, findings)


def cut_columns(source: str, k: int) -> Rule:
    """Sizes of the parts that ranks have of a linear's columns, where they have parts."""

    def findings(here: Situation) -> Iterator[Finding]:
        for fused in here.subject.fused:
            columns = fused[0].on_one_rank(here.ranks)[1]
            if columns != fused[0].columns and columns % k:
                yield Finding(_share(fused, fused[0].rows, columns, here.ranks), _names(fused), _ignoring(fused))

    return Rule(f"in_features of a rank is a multiple of {k} where ranks cut it", source, findings)


def groups_stay_whole(source: str) -> Rule:
    """No group of weights lies on two ranks, and none is short."""

    def findings(here: Situation) -> Iterator[Finding]:
        for fused in here.subject.fused:
            rows, columns = sum(linear.on_one_rank(here.ranks)[0] for linear in fused), fused[0].on_one_rank(here.ranks)[1]
            if columns % here.subject.group_size:
                yield Finding(_share(fused, rows, columns, here.ranks), _names(fused), _ignoring(fused))

    return Rule("group_size divides in_features of a rank", source, findings)


def whole_fusions(source: str) -> Rule:
    """What a runtime fuses is quantized as a whole, or not at all."""

    def findings(here: Situation) -> Iterator[Finding]:
        in_fp8 = {linear.name for fused in here.subject.fp8 for linear in fused}
        for one, partners in here.subject.split.items():
            words = ("--rule {}=w8a8", "is in FP8", "are") if one in in_fp8 else ("--ignore {}", "stays BF16", "do")
            option, kind, verb = words
            yield Finding(
                f"{one} {kind}, linears it is fused with {verb} not",
                partners,
                " ".join(option.format(name) for name in partners),
            )

    return Rule("linears that are fused are all of one precision", source, findings)


def heads(source: str) -> Rule:
    """Ranks divide the heads."""

    def findings(here: Situation) -> Iterator[Finding]:
        queries, keys = here.subject.heads
        if queries and (queries % here.ranks or (keys % here.ranks and here.ranks % keys)):
            yield Finding(f"{queries} heads and {keys} of keys on {here.ranks} ranks", advice="another --tensor-parallel")

    return Rule("ranks divide the heads; heads of keys are divided or repeated evenly", source, findings)


def fp8_cache(source: str, tensor_least: int = 0, per_head: tuple[int, ...] = ()) -> Rule:
    """Scales of an FP8 cache, if any: of whole tensors on NVIDIA devices from a capability on, times ten; of heads on some."""

    def findings(here: Situation) -> Iterator[Finding]:
        kind, gpu = here.subject.kv_cache, here.gpu
        if kind == "attn_head" and gpu.capability not in per_head:
            yield Finding(
                f"the FP8 cache has a scale for each head, the device is {gpu.name}", advice="--kv-cache-strategy tensor"
            )
        if kind == "tensor" and gpu.vendor == "nvidia" and gpu.capability < tensor_least:
            yield Finding(f"the cache is FP8, the device is {gpu.name}", advice="no --kv-cache")

    heads_on = " or ".join(str(one / 10) for one in per_head)
    says = (
        f"scales of an FP8 cache are whole tensors', on NVIDIA from capability {tensor_least / 10} on, or heads' on {heads_on}"
    )
    return Rule(says, source, findings)


def experts(source: str) -> Rule:
    """A mixture's experts."""

    def findings(here: Situation) -> Iterator[Finding]:
        if not here.subject.experts:
            yield Finding("the quantized linears are no experts")

    return Rule("only experts of a mixture are 4-bit", source, findings)


def _share(fused: tuple[Linear, ...], rows: float, columns: float, ranks: int) -> str:
    names = "+".join(linear.name.rpartition(".")[2] for linear in fused)
    share = f" of one rank of {ranks}" if ranks > 1 else ""
    return f"{names}{share} is {rows:g} x {columns:g}"


def _names(fused: tuple[Linear, ...]) -> tuple[str, ...]:
    return tuple(linear.name for linear in fused)


def _ignoring(fused: tuple[Linear, ...]) -> str:
    """What leaves these linears, in every block, in BF16."""
    leaves = sorted({linear.name.rpartition(".")[2] for linear in fused})
    return f"--ignore 're:.*\\.({'|'.join(leaves)})$'" if len(leaves) > 1 else f"--ignore 're:.*\\.{leaves[0]}$'"
