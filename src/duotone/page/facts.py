# Shapes: N out_features, K in_features.
"""All that a report tells of a checkpoint, gathered from its folder: plain values, the same for every way to write it."""

import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from duotone.card import base_name, recorded_tasks
from duotone.checking import check
from duotone.checkpoint.hub import locate_model
from duotone.checkpoint.reader import WeightReader, is_fp8_weight
from duotone.checkpoint.sidecar import EVALUATION_RECORD, RUN_RECORD, SIDECAR, read_record, read_sidecar
from duotone.checkpoint.source import SourceFolder, open_source
from duotone.errors import DuotoneError
from duotone.inspection import Inspection, inspect_source
from duotone.page.census import Census, take_census
from duotone.page.command import command_of
from duotone.page.measured import Comparison, Measured, measure
from duotone.version import VERSION

Progress = Callable[[int, int, str], None]
#: A linear's path: the block is its first number.
_IN_BLOCK = re.compile(r"(?P<before>.*?)\.(?P<block>\d+)\.(?P<path>.+)")


@dataclass(frozen=True)
class LinearFacts:
    """A quantized linear [rows, columns]. block and path: where it stands; block None: outside the blocks.

    weight_error, output_error: relative and squared. code_bits: entropy of its codes. The rest as in `methods.LayerReport`.
    """

    layer: str
    block: int | None
    path: str
    rows: int
    columns: int
    nbytes: int
    code_bits: float
    weight_error: float | None = None
    output_error: float | None = None
    tokens: int | None = None
    damping_frac: float | None = None
    dead_columns: int | None = None
    condition_number: float | None = None


@dataclass(frozen=True)
class KeptFacts:
    """A matrix that is stored as floats, and why. dtype `tied`: it is another matrix by a second name, and takes no bytes."""

    layer: str
    rows: int
    columns: int
    dtype: str
    nbytes: int
    reason: str


@dataclass(frozen=True)
class Sizes:
    """Bytes of all tensors. original: before; estimated: it is what the same tensors take in BF16, since no record tells.

    codes, scales: of the quantized linears. kept: matrices that are not quantized. other: norms, biases and the like.
    """

    original: int
    estimated: bool
    codes: int
    scales: int
    kept: int
    other: int
    bits_per_weight: float
    quantized_macs_share: float | None

    @property
    def total(self) -> int:
        """Bytes of the checkpoint's tensors."""
        return self.codes + self.scales + self.kept + self.other


@dataclass(frozen=True)
class Place:
    """A runtime on a device. outcome: `w4a8`, `w4a16` or `refused`; runs: by what. instead: the layout to export that loads."""

    runtime: str
    version: str
    gpu: str
    outcome: str
    runs: str | None
    reasons: tuple[str, ...]
    advice: tuple[str, ...]
    instead: str | None


@dataclass(frozen=True)
class Facts:
    """A report. sidecar: what duotone.json says beside its layers; run: duotone-run.json; both None for another tool's.

    measured: figures against the original; recorded: they are those of `duotone eval --card`. tasks: what that recorded of
    tasks, see `examining.TaskFigures`. refusal: why no place is judged.
    """

    name: str
    base: str
    scheme: str
    written_by: str
    sizes: Sizes
    linears: tuple[LinearFacts, ...]
    kept: tuple[KeptFacts, ...]
    census: Census
    places: tuple[Place, ...]
    refusal: str | None
    settings: dict[str, Any] | None
    calibration: dict[str, Any] | None
    producer: str | None
    notes: tuple[str, ...]
    run: dict[str, Any] | None
    measured: Measured | None
    recorded: bool
    command: str | None
    tasks: tuple[dict[str, Any], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The facts as plain values."""
        return asdict(self)


def gather(model: str, asked: Comparison, progress: Progress) -> Facts:
    """Read a checkpoint's headers, records and codes; measure it where that is asked for.

    Raises DuotoneError for a folder that holds no W4A8 checkpoint or a damaged one, and as `measure` does.
    """
    source = open_source(locate_model(model))
    if source.config.get("quantization_config") is None:
        raise DuotoneError(f"{source.path}: is not quantized, expected a checkpoint of duotone quantize to report on")
    inspection = inspect_source(source)
    sidecar, run = read_sidecar(source.path), read_record(source.path, RUN_RECORD)
    _check_records(source.path, sidecar, run)
    measured = measure(model, asked, progress) if asked.is_asked else _recorded(source.path)
    census = take_census(source, progress)
    places, refusal = _places(model)
    settings = (sidecar or {}).get("settings")
    name = base_name(model)[0].rpartition("/")[2]
    base = str((run or {}).get("model") or (base_name(asked.original)[0] if asked.original else "BASE"))
    scheme = WeightReader(source).scheme
    return Facts(
        name=name,
        base=base,
        scheme=f"{scheme.target.name}, groups of {scheme.group_size}" + ("" if scheme.symmetric else ", zero points"),
        written_by=f"duotone {VERSION}",
        sizes=_sizes(source, inspection, sidecar, run),
        linears=tuple(_linears(inspection, sidecar or {}, census)),
        kept=tuple(_kept(inspection, sidecar or {})),
        census=census,
        places=places,
        refusal=refusal,
        settings=settings,
        calibration=(sidecar or {}).get("calibration"),
        producer=(sidecar or {}).get("producer"),
        notes=tuple((sidecar or {}).get("notes", ())),
        run=run,
        measured=measured,
        recorded=measured is not None and not asked.is_asked,
        command=command_of(base, name, sidecar, run) if sidecar and settings else None,
        tasks=tuple(recorded_tasks(source.path)),
    )


#: What duotone.json says of a linear.
_FIGURES = ("weight_error", "output_error", "tokens", "damping_frac", "dead_columns", "condition_number")
#: What the page relies on in the records, which may be a stranger's: a path in each, and the kinds that its value may be.
_EXPECTED: tuple[tuple[str, str, str, type | tuple[type, ...]], ...] = (
    *((SIDECAR, "settings", name, (str, int)) for name in ("method", "effort", "group_size", "seed")),
    (SIDECAR, "calibration", "text", list),
    *((SIDECAR, "calibration", name, int) for name in ("tokens", "windows")),
    *((SIDECAR, "calibration", name, str) for name in ("sha256", "dtype")),
    *((RUN_RECORD, "", name, dict) for name in ("seconds", "phase_bytes", "machine", "versions", "asked")),
    (RUN_RECORD, "", "peak_bytes", int),
)


def _check_records(folder: Path, sidecar: dict[str, Any] | None, run: dict[str, Any] | None) -> None:
    """Raise DuotoneError where a record is there and does not hold what it should."""
    for file, part, name, kinds in _EXPECTED:
        record = sidecar if file == SIDECAR else run
        record = record.get(part) if record is not None and part else record
        if record is None:
            continue
        value = record.get(name) if isinstance(record, dict) else record
        if not isinstance(value, kinds):
            place = f"{part}.{name}" if part else name
            kind = "/".join(one.__name__ for one in (kinds if isinstance(kinds, tuple) else (kinds,)))
            raise DuotoneError(f"{folder / file}: found {value!r} as {place}, expected a value of type {kind}")
    numbers = {"seconds": (run or {}).get("seconds", {}), "phase_bytes": (run or {}).get("phase_bytes", {})}
    entries = (sidecar or {}).get("layers", {})
    for file, place, values in (
        *((RUN_RECORD, place, values) for place, values in numbers.items()),
        *((SIDECAR, layer, _told(entry)) for layer, entry in entries.items()),
    ):
        for name, value in values.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
                raise DuotoneError(f"{folder / file}: found {value!r} as {name} of {place}, expected a finite number from 0")


def _told(entry: dict[str, Any]) -> dict[str, Any]:
    """Of what duotone.json says of a linear, the figures that the page shows."""
    return {name: value for name, value in entry.items() if name in _FIGURES and value is not None}


def _linears(inspection: Inspection, sidecar: dict[str, Any], census: Census) -> Iterator[LinearFacts]:
    entries = sidecar.get("layers", {})
    place = {layer: i for i, layer in enumerate(entries)}  # the order in which they run; files are sorted by name
    for layer in sorted(inspection.layers, key=lambda layer: place.get(layer.layer, len(place))):
        if layer.is_quantized:
            found = _IN_BLOCK.fullmatch(layer.layer)
            block, path = (int(found["block"]), found["path"]) if found else (None, layer.layer)
            facts = _told(entries.get(layer.layer, {}))
            facts |= {"nbytes": layer.nbytes, "code_bits": census.code_bits[layer.layer]}
            yield LinearFacts(layer.layer, block, path, layer.shape[0], layer.shape[1], **facts)


def _kept(inspection: Inspection, sidecar: dict[str, Any]) -> Iterator[KeptFacts]:
    for layer in inspection.layers:
        if not layer.is_quantized:
            reason = layer.kept_because or "not a quantized linear"
            yield KeptFacts(layer.layer, layer.shape[0], layer.shape[1], layer.scheme, layer.nbytes, reason)
    stored = {layer.layer for layer in inspection.layers}
    for layer, reason in sidecar.get("kept", {}).items():
        if layer not in stored:
            yield KeptFacts(layer, 0, 0, "tied", 0, reason)


def _sizes(source: SourceFolder, inspection: Inspection, sidecar: dict[str, Any] | None, run: dict[str, Any] | None) -> Sizes:
    codes = sum(
        spec.nbytes for name, spec in source.tensors.items() if name.endswith(".weight_packed") or is_fp8_weight(source, name)
    )
    kept = sum(layer.nbytes for layer in inspection.layers if not layer.is_quantized)
    other = inspection.total_bytes - inspection.quantized_bytes - kept
    narrow = sum(2 * layer.shape[0] * layer.shape[1] for layer in inspection.layers if layer.is_quantized)
    original = int((run or {}).get("original_bytes") or 0)
    return Sizes(
        original=original or narrow + kept + other,
        estimated=not original,
        codes=codes,
        scales=inspection.quantized_bytes - codes,
        kept=kept,
        other=other,
        bits_per_weight=inspection.bits_per_weight,
        quantized_macs_share=(sidecar or {}).get("quantized_macs_share"),
    )


def _places(model: str) -> tuple[tuple[Place, ...], str | None]:
    """Every runtime on every device; none, and the sentence why, for an architecture that cannot be judged."""
    try:
        found = check(model)
    except DuotoneError as error:
        return (), str(error)
    places = [
        Place(
            one.runtime, one.version, one.gpu, one.outcome, one.runs, tuple(dict.fromkeys(one.reasons)), tuple(one.advice),
            next((advice.split()[3] for advice in one.advice if advice.startswith("duotone export")), None),
        )
        for one in found
    ]  # fmt: skip
    return tuple(places), None


def _recorded(folder: Path) -> Measured | None:
    record = read_record(folder, EVALUATION_RECORD)
    if record is None or ("figures" not in record and "tasks" in record):
        return None
    figures = record.get("figures")
    if not isinstance(figures, dict):
        raise DuotoneError(f"{folder / EVALUATION_RECORD}: found figures of {figures!r}, expected an object")
    return Measured(tuple(str(name) for name in record.get("text", ())), figures)
