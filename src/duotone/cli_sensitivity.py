"""The command that says which linears 4 bits hurt."""

import json
from pathlib import Path
from typing import Annotated

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

sensitivity_app = typer.Typer()


@sensitivity_app.command(
    epilog="Example: duotone sensitivity meta-llama/Llama-3.2-1B --calibration text.txt --text held_out.txt --out found.json"
    "\n\nThen: duotone quantize meta-llama/Llama-3.2-1B out --calibration text.txt --sensitivity found.json --max-bytes 1.1GB"
)
def sensitivity(  # noqa: PLR0913 - every option of the command
    model: Model,
    calibration: Calibration = None,
    text: Annotated[
        list[str] | None,
        typer.Option(help="What to measure on, FILE or FILE.jsonl#field; the calibration text without; repeatable."),
    ] = None,
    windows: Annotated[int, typer.Option(help="Windows to measure on.")] = 32,
    method: Method = "dpq",
    target: TargetName = "hopper",
    group_size: GroupSize = 128,
    ignore: Ignore = None,
    rule: Rules = None,
    samples: Samples = 128,
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


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise DuotoneError(f"{path}: cannot be written ({error.strerror})") from None
