"""The command that judges a calibration text before the work."""

import dataclasses
from typing import Annotated

import typer

from duotone.cli_options import Device, Json, Model, Quiet, print_result, progress_bar

advise_app = typer.Typer()


@advise_app.command(
    epilog="Example: duotone advise meta-llama/Llama-3.2-1B --calibration text.txt --text what_it_will_meet.txt"
)
def advise(  # noqa: PLR0913 - every option of the command
    model: Model,
    calibration: Annotated[
        list[str] | None, typer.Option(help="As duotone quantize takes it, weights too; what it would take by default.")
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(help="Text of the kind that the model will meet, or be evaluated on, to compare with; repeatable."),
    ] = None,
    samples: Annotated[int, typer.Option(help="Calibration windows.")] = 128,
    seq_len: Annotated[int, typer.Option(help="Tokens of a window.")] = 2048,
    read: Annotated[int, typer.Option(help="Windows of each text that the model reads at most; all are counted.")] = 32,
    seed: Annotated[int, typer.Option(help="Draws the windows.")] = 0,
    device: Device = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure whether a calibration text suits a model: enough of it, of the right kind, not known by heart. Writes nothing."""
    from duotone.advising import advise as run
    from duotone.report import advice_summary
    from duotone.settings import QuantizeConfig

    config = QuantizeConfig(calibration=tuple(calibration or ()), samples=samples, seq_len=seq_len, seed=seed, device=device)
    with progress_bar("reading", quiet or as_json) as tell:
        found = run(model, config, text or (), read, tell)
    print_result(dataclasses.asdict(found), advice_summary, as_json)
