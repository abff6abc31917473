"""A checkpoint under a runtime's rules: whether it loads, what each linear becomes, and what else would load."""

from dataclasses import dataclass, replace

from duotone.errors import DuotoneError
from duotone.loadability.caches import CACHES
from duotone.loadability.routes import Route, Runtime
from duotone.loadability.rules import GPUS, Finding, Gpu, Rule, Situation
from duotone.loadability.runtimes import RUNTIMES
from duotone.loadability.subject import Subject

#: Layouts that `duotone export` makes of a checkpoint of ours, as they are advised: those that run as W4A8 first.
EXPORTED = ("compressed-tensors", "modelopt", "gaudi-inc", "w4a16", "gptq", "gguf", "sglang-w4afp8", "dense-bf16")
#: Ours.
_OWN = ("compressed-tensors", "duotone-gaudi")
#: Exports that have a place for the scales of an FP8 cache.
_WITH_CACHE = ("compressed-tensors", "w4a16")


@dataclass(frozen=True)
class LayerOutcome:
    """One linear: `w4a8`, `w4a16`, `w8a8` (FP8 blocks), `bf16`, or `refused`; why, and where the rule was read."""

    layer: str
    outcome: str
    reason: str | None = None
    source: str | None = None


@dataclass(frozen=True)
class Loadability:
    """What a runtime does with a checkpoint on a device.

    outcome: of all quantized linears, or `refused`. reasons: each with what was found and what was expected. advice: what else
    would load, and what to change.
    """

    runtime: str
    version: str
    gpu: str
    tensor_parallel: int
    layout: str
    outcome: str
    runs: str | None
    reasons: list[str]
    layers: list[LayerOutcome]
    advice: list[str]

    @property
    def loads(self) -> bool:
        """Does it load at all?"""
        return self.outcome != "refused"


def judge(subject: Subject, runtime: str, gpu: str, tensor_parallel: int = 1) -> Loadability:
    """Raises DuotoneError for a runtime, a device or a number of ranks that is not known."""
    if runtime not in RUNTIMES:
        raise DuotoneError(f"--runtime: found {runtime!r}, expected one of {', '.join(RUNTIMES)}")
    if gpu not in GPUS:
        raise DuotoneError(f"--gpu: found {gpu!r}, expected one of {', '.join(GPUS)}")
    if tensor_parallel < 1:
        raise DuotoneError(f"--tensor-parallel: found {tensor_parallel}, expected at least 1")
    here, kind = Situation(subject, GPUS[gpu], tensor_parallel), RUNTIMES[runtime]
    facts = (runtime, kind.version, gpu, tensor_parallel, subject.layout)
    if subject.library != "transformers" and runtime != "duotone":
        reason = f"{kind.name} was looked at with models of transformers alone, this one is of {subject.library}"
        return Loadability(*facts, "refused", None, [reason], _outcomes(subject, "refused", []), [])
    route, broken = _best(here, kind)
    if route is not None and not broken:
        layers, advice = _outcomes(subject, route.outcome, []), _exact_on_ranks(here, route)
        cache = CACHES.get(runtime, {}).get(subject.kv_cache or "")
        return Loadability(*facts, route.outcome, f"{route.runs}; {cache}" if cache else route.runs, [], layers, advice)
    reasons = [f"{finding.found}, expected: {rule.says} [{rule.source}]" for rule, finding in broken]
    if route is None:
        why = kind.unread.get(subject.layout, f"it reads {', '.join(dict.fromkeys(r.layout for r in kind.routes))}")
        reasons = [f"{kind.name} does not read the layout {subject.layout}: {why}"]
    layers = _outcomes(subject, "refused", broken)
    return Loadability(*facts, "refused", None, reasons, layers, _advice(here, kind, broken))


def _best(here: Situation, runtime: Runtime) -> tuple[Route | None, list[tuple[Rule, Finding]]]:
    """The first route for the layout that nothing breaks; else the one for this device, or the first, and what breaks it."""
    tried: list[tuple[Route, list[tuple[Rule, Finding]]]] = []
    for route in runtime.routes:
        if route.layout == here.subject.layout:
            broken = [(rule, finding) for rule in route.rules for finding in rule.findings(here)]
            if not broken:
                return route, []
            tried.append((route, broken))
    if not tried:
        return None, []
    return min(tried, key=lambda one: not _is_of_device(one[1], here.gpu) and len(tried) > 1)


def _is_of_device(broken: list[tuple[Rule, Finding]], gpu: Gpu) -> bool:
    """Whether the device itself was what the route wants."""
    return not any(finding.found.startswith(f"the device is {gpu.name}") for _, finding in broken)


def _outcomes(subject: Subject, outcome: str, broken: list[tuple[Rule, Finding]]) -> list[LayerOutcome]:
    """Of every linear. Where single ones are refused the others carry no reason, though the model does not load."""
    of_layer = {name: (rule, finding) for rule, finding in reversed(broken) for name in finding.linears}
    of_all = next(((rule, finding) for rule, finding in broken if not finding.linears), None)
    found = []
    for linear in (linear for fused in subject.fused for linear in fused):
        rule, finding = of_layer.get(linear.name) or of_all or (None, None)
        reason = None if rule is None or finding is None else f"{finding.found}, expected: {rule.says}"
        found.append(LayerOutcome(linear.name, outcome, reason, None if rule is None else rule.source))
    for linear in (linear for fused in subject.fp8 for linear in fused):
        rule, finding = of_layer.get(linear.name) or of_all or (None, None)
        reason = None if rule is None or finding is None else f"{finding.found}, expected: {rule.says}"
        whole = outcome if outcome in {"refused", "bf16"} else "w8a8"
        found.append(LayerOutcome(linear.name, whole, reason, None if rule is None else rule.source))
    return found + [LayerOutcome(name, "bf16", reason) for name, reason in subject.kept.items()]


def _exact_on_ranks(here: Situation, route: Route) -> list[str]:
    """Whether ranks that have a part of the columns rebuild the scales that were chosen (vLLM splits them at load)."""
    cut = [linear.name.rpartition(".")[2] for fused in here.subject.fused for linear in fused if linear.cut == "columns"]
    if not route.splits_scales or not cut or here.subject.made_for % here.ranks == 0:
        return []
    names = ", ".join(dict.fromkeys(cut))
    return [f"quantize by dpq with --tensor-parallel {here.ranks}: each rank rounds its part of {names} anew"]


def _advice(here: Situation, runtime: Runtime, broken: list[tuple[Rule, Finding]]) -> list[str]:
    """Layouts that would load here, and options of `quantize` that would mend what is broken."""
    found = _plugin_advice(here, runtime)
    if here.subject.layout in _OWN:
        for layout in (layout for layout in EXPORTED if layout != here.subject.layout):
            cache = here.subject.kv_cache if layout in _WITH_CACHE else None
            other = replace(here, subject=replace(here.subject, layout=layout, kv_cache=cache))
            route, wrong = _best(other, runtime)
            if route is not None and not wrong:
                found.append(f"duotone export --format {layout} loads there: {route.runs}")
                break
    changes = dict.fromkeys(finding.advice for _, finding in broken if finding.advice)
    return [f"quantize with {change}" if change.startswith(("--", "no ")) else change for change in changes] + found


def _plugin_advice(here: Situation, runtime: Runtime) -> list[str]:
    """Whether our plugin would load it in this runtime."""
    if runtime.plugin is None:
        return []
    route, wrong = _best(here, RUNTIMES[runtime.plugin])
    if route is None or wrong:
        return []
    return [f"with Duotone installed beside it ({runtime.plugin}) it loads there: {route.runs}"]
