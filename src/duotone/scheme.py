"""Intent: which arithmetic is aimed at (Target), at what granularity (Scheme), and which layers a rule names."""

import re
from dataclasses import dataclass

from duotone.errors import DuotoneError
from duotone.formats import E4M3, E4M3FN, INT4_LEVELS, FloatFormat


@dataclass(frozen=True)
class Target:
    """What an accelerator fixes in the arithmetic; ARCHITECTURE: one contract, two targets."""

    name: str
    #: format of both FP8 operands
    fp8: FloatFormat
    #: True: one activation scale per token, found at run time. False: one calibrated power of two per tensor.
    dynamic_activations: bool
    #: True: an FP32 outer scale per output channel, E4M3 group scales. False: a power of two per tensor, BF16 group scales.
    channel_outer_scale: bool

    @property
    def protective_range(self) -> float:
        """Largest FP8-domain weight magnitude whose INT4 scale 2*amax/15 keeps code -8 inside the format (DPQ.md section 1)."""
        return self.fp8.max - self.fp8.max / 15

    @property
    def smallest_activation_scale(self) -> float:
        """Lower clamp of the dynamic per-token scale, 1/229376 for E4M3FN."""
        return 1 / (self.fp8.max * 512)


HOPPER = Target("hopper", fp8=E4M3FN, dynamic_activations=True, channel_outer_scale=True)
GAUDI = Target("gaudi", fp8=E4M3, dynamic_activations=False, channel_outer_scale=False)
TARGETS = {target.name: target for target in (HOPPER, GAUDI)}


#: Which values of a layer's keys, or values, share one scale of the FP8 cache; compressed-tensors' and vLLM's names.
KV_CACHE_STRATEGIES = ("tensor", "attn_head")


@dataclass(frozen=True)
class Fp8Scheme:
    """How one weight is stored that 4 bits would hurt: an FP8 value each, for one target. W8A8 in the same arithmetic."""

    target: Target = HOPPER

    @property
    def label(self) -> str:
        """In words."""
        return f"w8a8 {self.target.name}"


@dataclass(frozen=True)
class Scheme:
    """How one weight is stored: 4-bit codes in groups along K, for one target."""

    target: Target = HOPPER
    group_size: int = 128
    symmetric: bool = True
    levels: tuple[float, ...] = INT4_LEVELS

    def __post_init__(self) -> None:
        if self.group_size < 8 or self.group_size % 8:
            raise DuotoneError(f"group_size: found {self.group_size}, expected a positive multiple of 8 (128 is usual)")
        if len(self.levels) != 16:
            raise DuotoneError(f"levels: found {len(self.levels)} values, expected 16")

    @property
    def peak_group_scale(self) -> float:
        """The row's largest group scale on a channel-scaled target: the largest E4M3 value that cannot overflow.

        Symmetric: 448 / 8 = 56, what vLLM's loader rebuilds. With zero points |level - zero| reaches 15: 28.
        """
        span = max(abs(level) for level in self.levels) if self.symmetric else self.levels[-1] - self.levels[0]
        largest = float(self.target.fp8.max / span)
        exponent = 0
        while 2.0 ** (exponent + 1) <= largest:
            exponent += 1
        step = 2.0 ** (exponent - self.target.fp8.mantissa_bits)
        return largest // step * step

    @property
    def smallest_outer_scale(self) -> float:
        """Lower clamp of the channel scale: vLLM clamps a row whose largest group scale is below 1/512 (FORMATS.md 1.4)."""
        return 1 / (512 * self.peak_group_scale)

    @property
    def label(self) -> str:
        """In words."""
        return f"w4a8 {self.target.name} g{self.group_size}" + ("" if self.symmetric else " asymmetric")

    def groups(self, in_features: int) -> int:
        """Number of groups along K; the last one may be short (its missing columns count as zero)."""
        return -(-in_features // self.group_size)


#: How a weight may be stored.
AnyScheme = Scheme | Fp8Scheme
#: What a rule may ask for.
CHOICES = ("w4a8", "w8a8", "bf16")


def matches(name: str, rule: str) -> bool:
    """Does a rule of `ignore` name this layer? `re:` starts a regular expression matched from the left, as in vLLM."""
    if rule.startswith("re:"):
        return re.match(rule[3:], name) is not None
    return name == rule


def check_rules(rules: tuple[str, ...], option: str = "--ignore") -> None:
    """Raise DuotoneError for a rule whose regular expression does not compile."""
    for rule in rules:
        if rule.startswith("re:"):
            try:
                re.compile(rule[3:])
            except re.error as error:
                raise DuotoneError(f"{option} {rule}: not a regular expression ({error})") from None


def choice_of(rule: str) -> tuple[str, str]:
    """Which layers `--rule PATTERN=SCHEME` names, and what they are to be. Raises DuotoneError for any other form."""
    pattern, _, choice = rule.rpartition("=")
    if not pattern or choice not in CHOICES:
        raise DuotoneError(f"--rule {rule}: expected NAME=SCHEME or re:PATTERN=SCHEME, SCHEME one of {', '.join(CHOICES)}")
    return pattern, choice
