"""The command line: glue over the Python interface. Heavy imports happen inside commands, so that --help is instant."""

import dataclasses
import json
import logging
import sys
from typing import Annotated

import typer

from duotone.cli_advise import advise_app
from duotone.cli_bench import bench_app
from duotone.cli_eval import eval_app
from duotone.cli_hub import hub_app
from duotone.cli_layouts import layouts_app
from duotone.cli_options import Device, Json, Model, Quiet, print_result
from duotone.cli_quantize import quantize_app
from duotone.cli_report import report_app
from duotone.cli_sensitivity import sensitivity_app
from duotone.errors import DuotoneError, ToldError

app = typer.Typer(
    name="duotone",
    help="Dual-precision quantization: weights stored as INT4, arithmetic in FP8, outputs in BF16.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def _tell_version(asked: bool) -> None:
    if asked:
        from duotone.version import VERSION

        typer.echo(f"duotone {VERSION}")
        raise typer.Exit


@app.callback()
def about(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_tell_version, help="Show the version.")
    ] = False,
) -> None:
    """What every command has before it."""
    del version  # told by its callback


app.registered_commands += quantize_app.registered_commands  # --help begins with it


@app.command(epilog='Example: duotone generate Llama-W4AFP8 "The capital of France is" --max-new-tokens 32')
def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="The text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to add at most.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the sampling, with a temperature.")] = 0,
    device: Device = "auto",
    as_json: Json = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Only the text, no speed.")] = False,
) -> None:
    """Continue a prompt, printing as it goes."""
    from duotone.runtime.generate import generate as run

    def say(piece: str) -> None:
        if not as_json:
            typer.echo(piece, nl=False)

    result = run(model, prompt, max_new_tokens, temperature, seed, device, on_text=say)
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(result)))
        return
    typer.echo()
    if not quiet:
        typer.echo(f"[{result.new_tokens} tokens, {result.tokens_per_second:.1f} tokens/s]", err=True)


@app.command(epilog="Example: duotone inspect Llama-W4AFP8")
def inspect(model: Model, as_json: Json = False, quiet: Quiet = False) -> None:
    """Show each layer's scheme and bytes, and why any was left in BF16."""
    del quiet  # reads headers only: there is no progress to hide
    from duotone.inspection import inspect_model
    from duotone.report import inspection_summary

    print_result(dataclasses.asdict(inspect_model(model)), inspection_summary, as_json)


@app.command(epilog="Example: duotone explain Llama-W4AFP8 --device cpu")
def explain(model: Model, device: Device = "auto", as_json: Json = False, quiet: Quiet = False) -> None:
    """Say which kernel will run each layer here, how much of the work it does, and why nothing faster runs."""
    del quiet  # reads headers only: there is no progress to hide
    from duotone.explanation import explain_model
    from duotone.report import explanation_summary

    print_result(dataclasses.asdict(explain_model(model, device)), explanation_summary, as_json)


@app.command(epilog="Example: duotone serve Llama-3.2-1B-W4AFP8 --port 8000")
def serve(
    model: Model,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "localhost",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8000,
    device: Device = "auto",
) -> None:
    """Answer OpenAI-style requests: the server of transformers, with models run by duotone."""
    from duotone.runtime.serve import serve as run

    run(model, host, port, device)


# In the order of --help: making and running a checkpoint first, then measuring, converting and telling.
for commands in (advise_app, eval_app, layouts_app, report_app, sensitivity_app, hub_app):
    app.registered_commands += commands.registered_commands
app.add_typer(bench_app, name="bench")


def main() -> None:
    """Entry point: a DuotoneError becomes one sentence on standard error and exit code 2, and so does a lack of memory."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        app()
    except ToldError:
        sys.exit(2)
    except DuotoneError as error:
        _refuse(str(error))
    except (MemoryError, RuntimeError) as error:  # torch raises either, and says what it wanted
        if not isinstance(error, MemoryError) and "allocate memory" not in str(error):
            raise
        _refuse("out of memory; fewer --samples, a shorter --seq-len or --offload DIR take less of it")


def _refuse(sentence: str) -> None:
    # Names come from strangers' files: nothing in them may move the cursor or forge a second line.
    typer.echo("duotone: " + "".join(c if c.isprintable() else ascii(c)[1:-1] for c in sentence), err=True)
    sys.exit(2)
