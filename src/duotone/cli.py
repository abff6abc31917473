"""The command line: glue over the Python interface. Heavy imports happen inside commands, so that --help is instant."""

import dataclasses
import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from duotone.cli_advise import advise_app
from duotone.cli_bench import bench_app
from duotone.cli_eval import eval_app
from duotone.cli_hub import hub_app
from duotone.cli_layouts import layouts_app
from duotone.cli_options import Device, Json, Model, Quiet, print_result, progress_bar
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


@app.command(
    epilog="Example: duotone quantize meta-llama/Llama-3.2-1B Llama-3.2-1B-W4AFP8 --calibration text.txt\n\n"
    "With transforms: duotone quantize meta-llama/Llama-3.2-1B out --rotate --equalize 0.5 --calibration text.txt"
)
def quantize(  # noqa: PLR0913 - every option of the command
    model: Model,
    out: Annotated[Path, typer.Argument(help="The folder to write; new or empty.")],
    method: Annotated[str, typer.Option(help="dpq, dpq-paper, gptq or rtn (rtn needs no text, but for --kv-cache).")] = "dpq",
    effort: Annotated[
        str, typer.Option(help="default, or high: closer to the original, with gradients, in several times the time.")
    ] = "default",
    target: Annotated[str, typer.Option(help="hopper (what vLLM runs) or gaudi (the paper's).")] = "hopper",
    group_size: Annotated[int, typer.Option(help="Weights along K that share a scale.")] = 128,
    ignore: Annotated[list[str] | None, typer.Option(help="A linear to leave in BF16, or re:PATTERN; repeatable.")] = None,
    rule: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=SCHEME or re:PATTERN=SCHEME with w4a8, w8a8 (FP8 weights, for what 4 bits hurt) or bf16; the first that "
            "names a linear decides, also of one that stays BF16 by default; repeatable."
        ),
    ] = None,
    calibration: Annotated[
        list[str] | None,
        typer.Option(
            help="A text file, FILE.jsonl#field, or a hub data set owner/name:split; repeatable, in equal shares, or each with "
            "its weight, a.jsonl#question,answer:0.7,b.txt:0.3 (a last :NUMBER is a weight: a file named a:1 is a:1:1). For a "
            "model that sees also FILE.jsonl with an image and text or messages in a row, or a folder of images with captions."
        ),
    ] = None,
    samples: Annotated[int, typer.Option(help="Calibration windows.")] = 128,
    seq_len: Annotated[int, typer.Option(help="Tokens of a calibration window.")] = 2048,
    damping: Annotated[float, typer.Option(help="Share of the Hessian's mean diagonal added to it.")] = 0.01,
    order: Annotated[
        str | None, typer.Option(help="gar, act, min-pivot or none; dpq and gptq take act, dpq-paper gar.")
    ] = None,
    refresh_scales: Annotated[
        bool, typer.Option("--refresh-scales", help="dpq in order gar: search a group's scale anew when it is reached.")
    ] = False,
    rotate: Annotated[
        bool, typer.Option("--rotate", help="Turn the residual stream by a random Hadamard matrix, folded into the weights.")
    ] = False,
    equalize: Annotated[
        float | None,
        typer.Option(metavar="ALPHA", help="Move channel sizes from norms into linears: inputs^ALPHA / weights^(1 - ALPHA)."),
    ] = None,
    kv_cache: Annotated[
        str | None, typer.Option(metavar="fp8", help="Measure scales for a cache of keys and values in FP8, half of BF16's.")
    ] = None,
    kv_cache_strategy: Annotated[
        str, typer.Option(help="With --kv-cache, what shares a scale: tensor (a layer's keys, or values) or attn_head.")
    ] = "tensor",
    asymmetric: Annotated[bool, typer.Option("--asymmetric", help="Zero points (vLLM does not load them).")] = False,
    seed: Annotated[int, typer.Option(help="Draws the calibration windows and the rotation.")] = 0,
    device: Device = "auto",
    dtype: Annotated[
        str, typer.Option(help="What calibration multiplies in: float32, bfloat16, or auto, the second where it is fast.")
    ] = "auto",
    quantize_vision: Annotated[
        bool, typer.Option("--quantize-vision", help="The vision tower too, of a model that sees; it stays BF16 otherwise.")
    ] = False,
    calibrate_all_experts: Annotated[
        bool, typer.Option("--calibrate-all-experts", help="Of a mixture: show every expert all tokens, not only its own.")
    ] = False,
    memory_budget: Annotated[
        float | None,
        typer.Option(help="GiB that calibration may hold in a block; less is slower, and gives the same bytes."),
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="A linear that must stay BF16 is an error.")] = False,
    runtime: Annotated[
        str | None, typer.Option(help="What will serve it: refuse before the work if it would not load. See duotone check.")
    ] = None,
    gpu: Annotated[str, typer.Option(help="With --runtime, where.")] = "h100",
    tensor_parallel: Annotated[
        int, typer.Option(help="Ranks that will share each linear when served: scales are made for that.")
    ] = 1,
    max_bytes: Annotated[
        str | None,
        typer.Option(help="For each linear 4 bits, FP8 or BF16: what is nearest the original in 900MB, 1.1GB, ..."),
    ] = None,
    target_kl: Annotated[
        float | None, typer.Option(help="Or what is smallest and at most so far from it: mean KL in nats a token.")
    ] = None,
    sensitivity: Annotated[
        Path | None, typer.Option(metavar="FILE", help="For these two, what duotone sensitivity wrote; measured without.")
    ] = None,
    text: Annotated[
        list[str] | None, typer.Option(help="For these two, what KL is measured on; the calibration text without; repeatable.")
    ] = None,
    windows: Annotated[int, typer.Option(help="For these two, windows of it.")] = 32,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with a run on this output that was killed; begin where there is none.")
    ] = False,
    save_every: Annotated[
        float,
        typer.Option(min=0, metavar="SECONDS", help="Work that a killed run may lose; 0 saves after every block."),
    ] = 60.0,
    offload: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Keep calibration's hidden states in files there, not in memory.")
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Say what would be done, how long and how large (a hub model is downloaded first)."),
    ] = False,
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
        if max_bytes is not None or target_kl is not None:
            unable = {"--resume": resume, "--offload": offload, "--dry-run": dry_run, "several processes": ranks.size > 1}
            for option in [option for option, given in unable.items() if given]:
                raise DuotoneError(f"--max-bytes, --target-kl: found {option} beside it, which a choice cannot be made with")
            result, render = _reached(model, out, config, asked, as_json or quiet)
        elif dry_run:
            result, render = _planned(model, out, config)
        else:
            result, render = _quantized(model, out, config, saving, as_json, quiet, ranks)
    if ranks.first:
        print_result(result, render, as_json)


def _reached(
    model: str, out: Path, config: Any, asked: dict[str, Any], hidden: bool
) -> tuple[dict[str, Any], Callable[[Any], Any]]:
    """A run to a goal as plain values, and what shows it to people."""
    from duotone.cli_sensitivity import reach
    from duotone.report_sensitivity import reached_summary

    return dataclasses.asdict(reach(model, out, config, asked["max_bytes"], asked["target_kl"], asked, hidden)), reached_summary


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
    from duotone.estimate import estimate
    from duotone.plan import make_plan
    from duotone.report import plan_summary

    check_output(out)
    plan = make_plan(open_source(locate_model(model)), config)
    result = dataclasses.asdict(estimate(plan)) | {
        "linears": len(plan.layers),
        "quantized_macs_share": plan.quantized_macs_share,
        "bits_per_weight": plan.bits_per_weight,
        "kept": plan.kept,
        "notes": [*plan.transforms, *loading_notes(plan)],
    }
    return result, plan_summary


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
