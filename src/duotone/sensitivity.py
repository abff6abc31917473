# Shapes: W windows of a text.
"""Which linears 4 bits hurt: the distance from the original with each alone in 4 bits or FP8, and with each alone given back.

What runtimes fuse is one unit: the linears that read one input, and all experts of a bank.
"""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from duotone.calibrate.data import TokenWindows
from duotone.calibrate.sources import calibration_sources, titles
from duotone.checkpoint.compressed_tensors import tensor_specs
from duotone.checkpoint.hub import locate_model
from duotone.checkpoint.source import open_source
from duotone.device import resolve_device
from duotone.errors import DuotoneError
from duotone.evaluation import score_windows, summarize, windows_for
from duotone.models.experts import put
from duotone.models.skeleton import check_causal
from duotone.models.tokenizer import load_tokenizer
from duotone.pipeline import quantize
from duotone.plan import Plan, make_plan
from duotone.runtime.linear import QuantizedLinear
from duotone.runtime.load import load
from duotone.scheme import choice_of, matches
from duotone.settings import QuantizeConfig
from duotone.solver.fp8 import round_fp8

Progress = Callable[[int, int, str], None]
#: The original's logits are kept between measurements, up to so many bytes.
_KEPT_LOGITS = 2 * 2**30


@dataclass(frozen=True)
class Unit:
    """Linears that get one precision together.

    nbytes: by precision, what they take on disk. alone: by precision, mean KL with these in 4 bits or FP8 and all others in
    BF16. kept: mean KL with these in BF16 and all others in 4 bits; what those behind them make up for is then made up for
    though it is not there.
    """

    layers: tuple[str, ...]
    nbytes: dict[str, int]
    alone: dict[str, float]
    kept: float


@dataclass(frozen=True)
class Sensitivity:
    """kl: with everything in 4 bits, with its standard error. fixed_bytes: of all tensors that are not up for choice.

    weights: of the linears that are. text: what was measured on, with windows and tokens of each.
    """

    model: str
    method: str
    target: str
    group_size: int
    kl: float
    kl_stderr: float | None
    fixed_bytes: int
    weights: int
    units: tuple[Unit, ...]
    text: tuple[str, ...]
    windows: int
    seq_len: int

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Any, where: str) -> "Sensitivity":
        """What `to_json` gave. Raises DuotoneError for anything else."""
        try:
            units = tuple(
                Unit(tuple(unit["layers"]), dict(unit["nbytes"]), dict(unit["alone"]), float(unit["kept"]))
                for unit in value["units"]
            )
            return cls(**(dict(value) | {"units": units, "text": tuple(value["text"])}))
        except (KeyError, TypeError, ValueError) as error:
            raise DuotoneError(f"{where}: is not what duotone sensitivity --json prints ({error!r})") from None


def measure_sensitivity(
    model: str | Path,
    config: QuantizeConfig,
    text: Sequence[str] = (),
    *,
    seq_len: int = 512,
    samples: int = 32,
    progress: Progress | None = None,
) -> Sensitivity:
    """Quantize a model by `config` and measure each unit. The original and the quantized model are in memory, once each.

    text: to measure on; the calibration text where there is none. Linears that a rule of `config` names, or it keeps, stay so.
    Raises DuotoneError for models that predict no text, for transforms, whose parts cannot be exchanged, and as `quantize`.
    """
    tell: Progress = progress or (lambda *_: None)
    if config.rotate or config.equalize is not None:
        raise DuotoneError("sensitivity: found --rotate or --equalize, expected neither: their linears do not fit the original")
    folder, place = locate_model(model), resolve_device(config.device)
    plan = make_plan(open_source(folder), config)
    units = units_of(plan)
    original = load(folder, torch.float32, config.device)
    check_causal(original, "sensitivity")
    sources = list(text) or list(calibration_sources(config.calibration, folder))
    windows = windows_for(folder, original, load_tokenizer(folder), sources, min(seq_len, plan.seq_len), samples)
    steps = 1 + len(units)
    with tempfile.TemporaryDirectory() as scratch:
        quantize(
            folder, Path(scratch) / "four", config, lambda done, total, what: tell(done, total * steps, f"quantizing {what}")
        )
        four = load(Path(scratch) / "four", torch.float32, config.device, shortcuts=False)
    bench = _Bench(plan, units, original, four, windows, place)
    whole = summarize(score_windows(four, windows, bench.reference, place), windows)
    assert whole.kl is not None
    found: list[Unit] = []
    for done, layers in enumerate(units, 1):
        tell(done, steps, layers[0])
        found.append(bench.measure(layers))
    tell(steps, steps, "done")
    chosen = [layer for layers in units for layer in layers]
    return Sensitivity(
        model=str(model),
        method=config.method,
        target=config.target,
        group_size=config.group_size,
        kl=whole.kl,
        kl_stderr=whole.kl_stderr,
        fixed_bytes=plan.disk_bytes - sum(unit.nbytes["w4a8"] for unit in found),
        weights=sum(rows * columns for rows, columns in (plan.shapes[layer] for layer in chosen)),
        units=tuple(found),
        text=tuple(titles(sources)),
        windows=len(windows),
        seq_len=windows.tokens.shape[1],
    )


def check_fits(found: Sensitivity, model: str | Path, config: QuantizeConfig, where: str) -> None:
    """Raise DuotoneError unless a sensitivity is of this model, quantized by these settings."""
    was, wanted = (found.method, found.target, found.group_size), (config.method, config.target, config.group_size)
    if was != wanted:
        told, expected = ("{}, {}, groups of {}".format(*facts) for facts in (was, wanted))
        raise DuotoneError(f"{where}: is of {told}, expected {expected}")
    units = units_of(make_plan(open_source(locate_model(model)), config))
    if [unit.layers for unit in found.units] != units:
        raise DuotoneError(f"{where}: holds other groups of linears than {model} has with these rules, expected the same")


def units_of(plan: Plan) -> list[tuple[str, ...]]:
    """Linears that are free to be in 4 bits or more, by what runtimes fuse, in running order: no rule names them."""
    settled = [choice_of(rule)[0] for rule in plan.config.rules]
    found: dict[str, list[str]] = {}
    for block in plan.blocks:
        for group in block.shared_inputs:
            for layer in group:
                if not any(matches(layer, pattern) for pattern in settled):
                    bank = max((name for name in block.banks.values() if layer.startswith(f"{name}.")), default=group[0])
                    found.setdefault(bank, []).append(layer)
    return [tuple(layers) for layers in found.values()]


class _Bench:
    """The quantized model, into which linears of the original are put; the original beside it, to measure from."""

    def __init__(
        self,
        plan: Plan,
        units: Sequence[tuple[str, ...]],
        original: PreTrainedModel,
        four: PreTrainedModel,
        windows: TokenWindows,
        place: torch.device,
    ) -> None:
        self.plan, self.four, self.windows, self.place = plan, four, windows, place
        self.reference: Any = _Remembered(original)
        layers = [layer for unit in units for layer in unit]
        self.whole = {layer: original.get_submodule(layer) for layer in layers}
        self.coded = {layer: four.get_submodule(layer) for layer in layers}

    def measure(self, layers: tuple[str, ...]) -> Unit:
        """One unit."""
        config, shapes = self.plan.config, {layer: self.plan.shapes[layer] for layer in layers}
        nbytes = {
            "w4a8": sum(_nbytes(layer, shapes[layer], config.scheme) for layer in layers),
            "w8a8": sum(_nbytes(layer, shapes[layer], config.fp8_scheme) for layer in layers),
            "bf16": sum(2 * rows * columns for rows, columns in shapes.values()),
        }
        others = {layer: module for layer, module in self.whole.items() if layer not in shapes}
        alone = {
            "w4a8": self._kl(others),
            "w8a8": self._kl(others | {layer: self._in_fp8(layer) for layer in layers}),
        }
        return Unit(layers, nbytes, alone, self._kl({layer: self.whole[layer] for layer in layers}))

    def _in_fp8(self, layer: str) -> nn.Module:
        """The original linear in FP8, each weight to the nearest; with the static scale of its input, if there is one."""
        linear, coded = self.whole[layer], self.coded[layer]
        assert isinstance(linear, nn.Linear) and isinstance(coded, QuantizedLinear)
        weight = replace(round_fp8(linear.weight.data, self.plan.config.fp8_scheme), input_scale=coded.input_scale)
        bias: Any = linear.bias
        return QuantizedLinear(weight, None if bias is None else bias.data, self.place)

    def _kl(self, modules: Mapping[str, nn.Module]) -> float:
        """With modules in their places; then all is as it was."""
        for layer, module in modules.items():
            put(self.four, layer, module)
        try:
            kl = score_windows(self.four, self.windows, self.reference, self.place).kl
        finally:
            for layer in modules:
                put(self.four, layer, self.coded[layer])
        assert kl is not None
        return float(kl.mean())


class _Remembered:
    """A model's logits, computed once as far as they fit."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.config, self._model = model.config, model
        self._known: dict[tuple[int, ...], Any] = {}
        self._room = _KEPT_LOGITS

    def __call__(self, input_ids: Tensor, **options: Any) -> Any:
        key = tuple(input_ids.flatten().tolist())
        if key in self._known:
            return self._known[key]
        answer = self._model(input_ids=input_ids, **options)
        size = answer.logits.numel() * answer.logits.element_size()
        if size <= self._room:
            self._known[key], self._room = answer, self._room - size
        return answer


def _nbytes(layer: str, shape: tuple[int, int], scheme: Any) -> int:
    return sum(spec.nbytes for spec in tensor_specs(layer, shape, scheme).values())
