"""Everything a user may ask of `quantize`, checked before any work."""

from dataclasses import dataclass

from duotone.calibrate.sources import parse_sources
from duotone.device import check_seed
from duotone.errors import DuotoneError
from duotone.loadability import GPUS, RUNTIMES
from duotone.scheme import KV_CACHE_STRATEGIES, TARGETS, Fp8Scheme, Scheme, check_rules, choice_of
from duotone.solver.methods import METHODS, Method, SolverOptions

EFFORTS = ("default", "high")
DTYPES = ("auto", "float32", "bfloat16")


@dataclass(frozen=True)
class QuantizeConfig:
    """Everything a user may ask of `quantize`; field names are the command line's.

    order None: the method's own default; with refresh_scales, which is for dpq, gar. effort: `high` measures the curvature of
    the model's loss and searches codes for it. rotate: turn the residual stream before all else. equalize: move the sizes of
    channels from norms into the linears behind them, with this exponent of the inputs' size; None: leave them. calibration
    empty: the model folder's own text, else the default hub data set; weights behind the texts say the share of each
    (`sources.parse_sources`). ignore: names or `re:` patterns of linears left in BF16. rules: `NAME=SCHEME` or
    `re:PATTERN=SCHEME`, SCHEME w4a8, w8a8 or bf16: of those that name a linear, also one that stays BF16 by default, the first
    decides, after ignore. kv_cache: `fp8` measures scales for a cache of one byte a value, one for a layer's keys and one for
    its values or, with strategy attn_head, for each head's. dtype: of the calibration's forward; auto is bfloat16 where that is
    fast and the model is not small, else float32. strict: a linear that must stay BF16 is an error. quantize_vision: the vision
    tower too, of a model that sees. runtime: what is to serve the checkpoint, on gpu with tensor_parallel ranks; it is an error
    if that would not load it. None: nothing is promised.
    calibrate_all_experts: every expert of a mixture sees all calibration tokens; what goes on is the model's own routing.
    memory_budget: GiB that calibration may hold inside a block, the activations of batches that wait there and a group's
    second moments; with less, more batches walk the block anew for every group, and the numbers stay the same.
    """

    method: str = "dpq"
    target: str = "hopper"
    group_size: int = 128
    symmetric: bool = True
    ignore: tuple[str, ...] = ()
    rules: tuple[str, ...] = ()
    calibration: tuple[str, ...] = ()
    samples: int = 128
    seq_len: int = 2048
    damping_frac: float = 0.01
    order: str | None = None
    refresh_scales: bool = False
    effort: str = "default"
    rotate: bool = False
    equalize: float | None = None
    kv_cache: str | None = None
    kv_cache_strategy: str = "tensor"
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"
    strict: bool = False
    quantize_vision: bool = False
    calibrate_all_experts: bool = False
    memory_budget: float | None = None
    runtime: str | None = None
    gpu: str = "h100"
    tensor_parallel: int = 1

    def __post_init__(self) -> None:
        for name, value, known in (
            ("method", self.method, METHODS),
            ("target", self.target, TARGETS),
            ("effort", self.effort, EFFORTS),
            ("dtype", self.dtype, DTYPES),
            ("kv-cache", self.kv_cache, (None, "fp8")),
            ("kv-cache-strategy", self.kv_cache_strategy, KV_CACHE_STRATEGIES),
            ("runtime", self.runtime, (None, *RUNTIMES)),
            ("gpu", self.gpu, GPUS),
        ):
            if value not in known:
                raise DuotoneError(f"--{name}: found {value!r}, expected one of {', '.join(name for name in known if name)}")
        if self.high_effort and not self.method_facts.drift:
            raise DuotoneError(f"--effort high: found --method {self.method}, expected dpq, whose targets it starts from")
        if self.refresh_scales and self.method != "dpq":
            raise DuotoneError(f"--refresh-scales: found --method {self.method}, expected dpq, whose scales are searched")
        if self.equalize is not None and not 0 < self.equalize <= 1:
            raise DuotoneError(f"--equalize: found {self.equalize}, expected a number above 0 and at most 1 (0.5 is usual)")
        if self.equalize is not None and not self.needs_statistics:
            able = ", ".join(name for name, method in METHODS.items() if method.needs_statistics)
            raise DuotoneError(f"--equalize: found --method {self.method}, expected one that looks at its inputs: {able}")
        if self.calibrate_all_experts and not self.needs_calibration:
            raise DuotoneError(f"--calibrate-all-experts: found --method {self.method}, expected one that looks at its inputs")
        if self.tensor_parallel < 1:
            raise DuotoneError(f"--tensor-parallel: found {self.tensor_parallel}, expected at least 1")
        if self.tensor_parallel > 1 and self.refresh_scales:
            raise DuotoneError(
                "--refresh-scales: found --tensor-parallel beside it, whose ranks need scales that stay; drop one"
            )
        if self.memory_budget is not None and not self.memory_budget > 0:
            raise DuotoneError(f"--memory-budget: found {self.memory_budget}, expected more than 0 (GiB)")
        if self.samples < 1:
            raise DuotoneError(f"--samples: found {self.samples}, expected at least 1")
        if self.seq_len < 2:
            raise DuotoneError(f"--seq-len: found {self.seq_len}, expected at least 2 tokens")
        parse_sources(self.calibration)
        check_seed(self.seed)
        check_rules(self.ignore)
        check_rules(tuple(choice_of(rule)[0] for rule in self.rules), "--rule")
        _ = self.scheme, self.solver  # their own checks, before any work

    @property
    def scheme(self) -> Scheme:
        """Target, group size and symmetry as one value."""
        return Scheme(TARGETS[self.target], self.group_size, self.symmetric)

    @property
    def fp8_scheme(self) -> Fp8Scheme:
        """Of the linears that a rule puts into FP8."""
        return Fp8Scheme(TARGETS[self.target])

    @property
    def solver(self) -> SolverOptions:
        """The solver's share of the options."""
        order = self.order or ("gar" if self.refresh_scales else self.method_facts.order)
        return SolverOptions(order, self.damping_frac, refresh_scales=self.refresh_scales)

    @property
    def method_facts(self) -> Method:
        """What the method needs of the walk through the model."""
        return METHODS[self.method]

    @property
    def high_effort(self) -> bool:
        """Is a backward pass through the model and a longer search asked for?"""
        return self.effort == "high"

    @property
    def needs_statistics(self) -> bool:
        """Does the method look at Hessians?"""
        return self.method_facts.needs_statistics

    @property
    def needs_calibration(self) -> bool:
        """Is text needed: for Hessians, for static activation scales, or for those of a cache?"""
        return self.needs_statistics or not self.scheme.target.dynamic_activations or self.kv_cache is not None

    @property
    def kv_strategy(self) -> str | None:
        """Of the scales of an FP8 cache; None: the cache stays in BF16."""
        return self.kv_cache_strategy if self.kv_cache else None
