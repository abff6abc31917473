"""The command that says which linears 4 bits hurt, and what `quantize` does to reach a goal with that."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from duotone.cli_options import Device, Json, Model, Quiet, print_result, progress_bar
from duotone.errors import DuotoneError

sensitivity_app = typer.Typer()

_UNITS = {"kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 2**10, "mib": 2**20, "gib": 2**30, "": 1}


@sensitivity_app.command(
    epilog="Example: duotone sensitivity meta-llama/Llama-3.2-1B --calibration text.txt --text held_out.txt --out found.json"
    "\n\nThen: duotone quantize meta-llama/Llama-3.2-1B out --calibration text.txt --sensitivity found.json --max-bytes 1.1GB"
)
def sensitivity(  # noqa: PLR0913 - every option of the command
    model: Model,
    calibration: Annotated[list[str] | None, typer.Option(help="As duotone quantize takes it; repeatable.")] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(help="What to measure on, FILE or FILE.jsonl#field; the calibration text without; repeatable."),
    ] = None,
    windows: Annotated[int, typer.Option(help="Windows to measure on.")] = 32,
    method: Annotated[str, typer.Option(help="Of the 4 bits: dpq, dpq-paper, gptq or rtn.")] = "dpq",
    target: Annotated[str, typer.Option(help="hopper or gaudi.")] = "hopper",
    group_size: Annotated[int, typer.Option(help="Weights along K that share a scale.")] = 128,
    ignore: Annotated[list[str] | None, typer.Option(help="A linear that stays BF16, or re:PATTERN; repeatable.")] = None,
    rule: Annotated[list[str] | None, typer.Option(help="A precision that is settled, as duotone quantize has it.")] = None,
    samples: Annotated[int, typer.Option(help="Calibration windows.")] = 128,
    seq_len: Annotated[int, typer.Option(help="Tokens of a window.")] = 512,
    out: Annotated[Path | None, typer.Option(help="Write what was found there, for duotone quantize --sensitivity.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write the curve of KL against bits there, FILE.svg.")] = None,
    device: Device = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure what each linear's 4 bits cost, and what FP8 or BF16 there would buy: KL to the original, and bytes."""
    from duotone.goals import curve
    from duotone.page.pareto import curve_svg
    from duotone.report_sensitivity import sensitivity_summary
    from duotone.sensitivity import measure_sensitivity
    from duotone.settings import QuantizeConfig

    config = QuantizeConfig(
        method=method,
        target=target,
        group_size=group_size,
        ignore=tuple(ignore or ()),
        rules=tuple(rule or ()),
        calibration=tuple(calibration or ()),
        samples=samples,
        seq_len=seq_len,
        device=device,
    )
    with progress_bar("measuring", quiet or as_json) as tell:
        found = measure_sensitivity(model, config, text or (), seq_len=seq_len, samples=windows, progress=tell)
    points = curve(found)
    if out is not None:
        _write(out, json.dumps(found.to_json(), indent=1))
    if plot is not None:
        _write(plot, curve_svg([(point.bits, point.kl) for point in points], found.kl_stderr or 0.0))
    shown = [{"bits": point.bits, "nbytes": point.nbytes, "kl": point.kl} for point in points]
    print_result(found.to_json() | {"curve": shown}, sensitivity_summary, as_json)


def nbytes_of(text: str) -> int:
    """`1.1GB`, `600 MiB` or a plain number as bytes. Raises DuotoneError for anything else."""
    number = text.rstrip("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ ")
    unit = text[len(number) :].strip().lower()
    try:
        return int(float(number) * _UNITS[unit])
    except (KeyError, ValueError, OverflowError):
        raise DuotoneError(f"--max-bytes: found {text!r}, expected a number of bytes, as in 900MB or 1.1GB") from None


def reach(
    model: str, out: Path, config: Any, max_bytes: str | None, target_kl: float | None, asked: dict[str, Any], hidden: bool
) -> Any:
    """`goals.quantize_to`, the sensitivity read or measured first. asked: sensitivity, text and windows of the command."""
    from duotone.calibrate.sources import calibration_sources
    from duotone.checkpoint.hub import locate_model
    from duotone.goals import Goal, quantize_to
    from duotone.sensitivity import Sensitivity, measure_sensitivity

    goal = Goal(None if max_bytes is None else nbytes_of(max_bytes), target_kl)
    text = asked["text"] or calibration_sources(config.calibration, locate_model(model))
    if asked["sensitivity"] is None:
        with progress_bar("measuring", hidden) as tell:
            found = measure_sensitivity(
                model, config, text, seq_len=min(512, config.seq_len), samples=asked["windows"], progress=tell
            )
    else:
        found = Sensitivity.from_json(_read(asked["sensitivity"]), str(asked["sensitivity"]))
        wanted = (config.method, config.target, config.group_size)
        if (found.method, found.target, found.group_size) != wanted:
            raise DuotoneError(
                f"--sensitivity {asked['sensitivity']}: is of {found.method}, {found.target}, groups of {found.group_size}, "
                f"expected {config.method}, {config.target}, groups of {config.group_size}"
            )
    with progress_bar("quantizing", hidden) as tell:
        return quantize_to(model, out, config, goal, found, text, asked["windows"], tell)


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DuotoneError(f"--sensitivity {path}: cannot be read ({error})") from None


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise DuotoneError(f"{path}: cannot be written ({error.strerror})") from None
