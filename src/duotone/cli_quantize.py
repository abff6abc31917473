"""The command that quantizes: its options, and what it does of a run, of a dry run and of a run to a goal."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from duotone.cli_options import (
    Calibration,
    Device,
    GroupSize,
    Ignore,
    Json,
    Method,
    Model,
    Quiet,
    Rules,
    Samples,
    TargetName,
    print_result,
    progress_bar,
)
from duotone.errors import DuotoneError

quantize_app = typer.Typer()

_UNITS = {"kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 2**10, "mib": 2**20, "gib": 2**30, "": 1}

Out = Annotated[Path, typer.Argument(help="The folder to write; new or empty.")]
Effort = Annotated[
    str, typer.Option(help="default, or high: closer to the original, with gradients, in several times the time.")
]
SeqLen = Annotated[int, typer.Option(help="Tokens of a calibration window.")]
Damping = Annotated[float, typer.Option(help="Share of the Hessian's mean diagonal added to it.")]
Order = Annotated[str | None, typer.Option(help="gar, act, min-pivot or none; dpq and gptq take act, dpq-paper gar.")]
RefreshScales = Annotated[
    bool, typer.Option("--refresh-scales", help="dpq in order gar: search a group's scale anew when it is reached.")
]
Rotate = Annotated[
    bool, typer.Option("--rotate", help="Turn the residual stream by a random Hadamard matrix, folded into the weights.")
]
Equalize = Annotated[
    float | None,
    typer.Option(metavar="ALPHA", help="Move channel sizes from norms into linears: inputs^ALPHA / weights^(1 - ALPHA)."),
]
KvCache = Annotated[
    str | None, typer.Option(metavar="fp8", help="Measure scales for a cache of keys and values in FP8, half of BF16's.")
]
KvCacheStrategy = Annotated[
    str, typer.Option(help="With --kv-cache, what shares a scale: tensor (a layer's keys, or values) or attn_head.")
]
Asymmetric = Annotated[bool, typer.Option("--asymmetric", help="Zero points (vLLM does not load them).")]
Seed = Annotated[int, typer.Option(help="Draws the calibration windows and the rotation.")]
Dtype = Annotated[
    str, typer.Option(help="What calibration multiplies in: float32, bfloat16, or auto, the second where it is fast.")
]
QuantizeVision = Annotated[
    bool, typer.Option("--quantize-vision", help="The vision tower too, of a model that sees; it stays BF16 otherwise.")
]
CalibrateAllExperts = Annotated[
    bool, typer.Option("--calibrate-all-experts", help="Of a mixture: show every expert all tokens, not only its own.")
]
MemoryBudget = Annotated[
    float | None,
    typer.Option(help="GiB that calibration may hold in a block; less is slower, and gives the same bytes."),
]
Strict = Annotated[bool, typer.Option("--strict", help="A linear that must stay BF16 is an error.")]
Runtime = Annotated[
    str | None, typer.Option(help="What will serve it: refuse before the work if it would not load. See duotone check.")
]
Gpu = Annotated[str, typer.Option(help="With --runtime, where.")]
TensorParallel = Annotated[int, typer.Option(help="Ranks that will share each linear when served: scales are made for that.")]
MaxBytes = Annotated[
    str | None,
    typer.Option(help="For each linear 4 bits, FP8 or BF16: what is nearest the original in 900MB, 1.1GB, ..."),
]
TargetKl = Annotated[
    float | None, typer.Option(help="Or what is smallest and at most so far from it: mean KL in nats a token.")
]
Sensitivity = Annotated[
    Path | None, typer.Option(metavar="FILE", help="For these two, what duotone sensitivity wrote; measured without.")
]
Text = Annotated[
    list[str] | None, typer.Option(help="For these two, what KL is measured on; the calibration text without; repeatable.")
]
Windows = Annotated[int, typer.Option(help="For these two, windows of it.")]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on with a run on this output that was killed; begin where there is none.")
]
SaveEvery = Annotated[
    float,
    typer.Option(min=0, metavar="SECONDS", help="Work that a killed run may lose; 0 saves after every block."),
]
Offload = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Keep calibration's hidden states in files there, not in memory.")
]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Say what would be done, how long and how large (a hub model is downloaded first)."),
]


@quantize_app.command(
    epilog="Example: duotone quantize meta-llama/Llama-3.2-1B Llama-3.2-1B-W4AFP8 --calibration text.txt\n\n"
    "With transforms: duotone quantize meta-llama/Llama-3.2-1B out --rotate --equalize 0.5 --calibration text.txt"
)
def quantize(  # noqa: PLR0913 - every option of the command
    model: Model,
    out: Out,
    method: Method = "dpq",
    effort: Effort = "default",
    target: TargetName = "hopper",
    group_size: GroupSize = 128,
    ignore: Ignore = None,
    rule: Rules = None,
    calibration: Calibration = None,
    samples: Samples = 128,
    seq_len: SeqLen = 2048,
    damping: Damping = 0.01,
    order: Order = None,
    refresh_scales: RefreshScales = False,
    rotate: Rotate = False,
    equalize: Equalize = None,
    kv_cache: KvCache = None,
    kv_cache_strategy: KvCacheStrategy = "tensor",
    asymmetric: Asymmetric = False,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    quantize_vision: QuantizeVision = False,
    calibrate_all_experts: CalibrateAllExperts = False,
    memory_budget: MemoryBudget = None,
    strict: Strict = False,
    runtime: Runtime = None,
    gpu: Gpu = "h100",
    tensor_parallel: TensorParallel = 1,
    max_bytes: MaxBytes = None,
    target_kl: TargetKl = None,
    sensitivity: Sensitivity = None,
    text: Text = None,
    windows: Windows = 32,
    resume: Resume = False,
    save_every: SaveEvery = 60.0,
    offload: Offload = None,
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Quantize a model: its linears shrink to about a quarter. `torchrun -m duotone quantize ...` shares it among processes."""
    asked: dict[str, Any] = dict(locals())  # options are named as the config's fields; what is missing there is a KeyError
    from duotone.ranks import joined

    with joined() as ranks:  # around the checks too: of several processes only one tells what is wrong
        from duotone.settings import QuantizeConfig

        lists = {"ignore": tuple(ignore or ()), "rules": tuple(rule or ()), "calibration": tuple(calibration or ())}
        asked |= lists | {"symmetric": not asymmetric, "damping_frac": damping}
        config = QuantizeConfig(**{field.name: asked[field.name] for field in dataclasses.fields(QuantizeConfig)})
        saving = {"resume": resume, "save_every": save_every, "offload": offload}
        _check_goal(asked, ranks.size)
        if max_bytes is not None or target_kl is not None:
            result, render = _reached(model, out, config, asked, as_json or quiet)
        elif dry_run:
            result, render = _planned(model, out, config)
        else:
            result, render = _quantized(model, out, config, saving, as_json, quiet, ranks)
    if ranks.first:
        print_result(result, render, as_json)


def _check_goal(asked: dict[str, Any], processes: int) -> None:
    """Raise DuotoneError for options that a goal cannot have beside it, and for those that say nothing without one."""
    has_goal = asked["max_bytes"] is not None or asked["target_kl"] is not None
    unable = {"--resume": asked["resume"], "--offload": asked["offload"], "--dry-run": asked["dry_run"]}
    idle = {"--sensitivity": asked["sensitivity"], "--text": asked["text"]}
    for option, given in (unable | {"several processes": processes > 1} if has_goal else idle).items():
        if given and has_goal:
            raise DuotoneError(f"--max-bytes, --target-kl: found {option} beside it, which a choice cannot be made with")
        if given:
            raise DuotoneError(f"{option}: found neither --max-bytes nor --target-kl, expected one, which it is for")


def _reached(
    model: str, out: Path, config: Any, asked: dict[str, Any], hidden: bool
) -> tuple[dict[str, Any], Callable[[Any], Any]]:
    """A run to a goal as plain values, and what shows it to people. The sensitivity is read, or measured first."""
    from duotone.calibrate.sources import calibration_sources
    from duotone.checkpoint.hub import locate_model
    from duotone.goals import Goal, quantize_to
    from duotone.report_sensitivity import reached_summary
    from duotone.sensitivity import Sensitivity, check_fits, measure_sensitivity

    max_bytes, windows = asked["max_bytes"], asked["windows"]
    goal = Goal(None if max_bytes is None else nbytes_of(max_bytes), asked["target_kl"])
    text = asked["text"] or calibration_sources(config.calibration, locate_model(model))
    if asked["sensitivity"] is None:
        seq_len = min(512, config.seq_len)
        with progress_bar("measuring", hidden) as tell:
            found = measure_sensitivity(model, config, text, seq_len=seq_len, samples=windows, progress=tell)
    else:
        where = f"--sensitivity {asked['sensitivity']}"
        found = Sensitivity.from_json(_read(asked["sensitivity"]), where)
        check_fits(found, model, config, where)
    with progress_bar("quantizing", hidden) as tell:
        reached = quantize_to(model, out, config, goal, found, text, windows, tell)
    return dataclasses.asdict(reached), reached_summary


def _quantized(
    model: str, out: Path, config: Any, saving: dict[str, Any], as_json: bool, quiet: bool, ranks: Any
) -> tuple[dict[str, Any], Callable[[Any], Any]]:
    """The report of a run as plain values, and what shows it to people."""
    from duotone.floors import floor_seconds
    from duotone.phases import reuse_memory
    from duotone.pipeline import quantize as run
    from duotone.report import quantize_summary

    reuse_memory()
    with progress_bar("quantizing", quiet or as_json or not ranks.first) as tell:
        report = run(model, out, config, tell, ranks=ranks, **saving)
    floors = {"floor_seconds": floor_seconds(report)} if as_json and ranks.first else {}
    return report.to_json() | floors, quantize_summary


def _planned(model: str, out: Path, config: Any) -> tuple[dict[str, Any], Callable[[Any], Any]]:
    """What a run would do as plain values, and what shows it to people."""
    from duotone.checking import loading_notes
    from duotone.checkpoint.hub import locate_model
    from duotone.checkpoint.source import open_source
    from duotone.checkpoint.staging import check_output
    from duotone.device import resolve_device
    from duotone.estimate import estimate
    from duotone.plan import make_plan
    from duotone.report import plan_summary

    check_output(out)
    device = resolve_device(config.device)
    plan = make_plan(open_source(locate_model(model)), config)
    foreseen = dataclasses.asdict(estimate(plan, device))
    result = foreseen | {
        "linears": len(plan.layers),
        "quantized_macs_share": plan.quantized_macs_share,
        "bits_per_weight": plan.bits_per_weight,
        "kept": plan.kept,
        "notes": [*plan.transforms, *loading_notes(plan), *foreseen["notes"]],
    }
    return result, plan_summary


def nbytes_of(text: str) -> int:
    """`1.1GB`, `600 MiB` or a plain number as bytes. Raises DuotoneError for anything else."""
    number = text.rstrip("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ ")
    unit = text[len(number) :].strip().lower()
    try:
        return int(float(number) * _UNITS[unit])
    except (KeyError, ValueError, OverflowError):
        raise DuotoneError(f"--max-bytes: found {text!r}, expected a number of bytes, as in 900MB or 1.1GB") from None


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DuotoneError(f"--sensitivity {path}: cannot be read ({error})") from None
