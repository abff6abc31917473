"""The command line: glue over the Python interface. Heavy imports happen inside commands, so that --help is instant."""

import dataclasses
import json
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from duotone.errors import DuotoneError

app = typer.Typer(
    name="duotone",
    help="Dual-precision quantization: weights stored as INT4, arithmetic in FP8, outputs in BF16.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
bench_app = typer.Typer(help="Measure, and append records.", no_args_is_help=True)
app.add_typer(bench_app, name="bench")

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bar.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Model = Annotated[str, typer.Argument(help="A model folder or a hub id.")]


@app.command(epilog="Example: duotone quantize meta-llama/Llama-3.2-1B Llama-3.2-1B-W4AFP8 --calibration text.txt")
def quantize(  # noqa: PLR0913 - every option of the command
    model: Model,
    out: Annotated[Path, typer.Argument(help="The folder to write; new or empty.")],
    method: Annotated[str, typer.Option(help="dpq, dpq-paper, gptq or rtn (rtn needs no calibration text).")] = "dpq",
    effort: Annotated[
        str, typer.Option(help="default, or high: closer to the original, with gradients, in several times the time.")
    ] = "default",
    target: Annotated[str, typer.Option(help="hopper (what vLLM runs) or gaudi (the paper's).")] = "hopper",
    group_size: Annotated[int, typer.Option(help="Weights along K that share a scale.")] = 128,
    ignore: Annotated[list[str] | None, typer.Option(help="A linear to leave in BF16, or re:PATTERN; repeatable.")] = None,
    calibration: Annotated[
        list[str] | None,
        typer.Option(help="A text file, FILE.jsonl#field, or a hub data set owner/name:split; repeatable, in equal shares."),
    ] = None,
    samples: Annotated[int, typer.Option(help="Calibration windows.")] = 128,
    seq_len: Annotated[int, typer.Option(help="Tokens of a calibration window.")] = 2048,
    damping: Annotated[float, typer.Option(help="Share of the Hessian's mean diagonal added to it.")] = 0.01,
    order: Annotated[str | None, typer.Option(help="gar, act or none; dpq and gptq take act, dpq-paper gar.")] = None,
    asymmetric: Annotated[bool, typer.Option("--asymmetric", help="Zero points (vLLM does not load them).")] = False,
    seed: Annotated[int, typer.Option(help="Draws the calibration windows.")] = 0,
    device: Device = "auto",
    strict: Annotated[bool, typer.Option("--strict", help="A linear that must stay BF16 is an error.")] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Say what would be done, how long and how large (a hub model is downloaded first)."),
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Quantize a model: its linears shrink to about a quarter."""
    from duotone.plan import QuantizeConfig
    from duotone.report import plan_summary, quantize_summary

    config = QuantizeConfig(
        method=method,
        target=target,
        group_size=group_size,
        symmetric=not asymmetric,
        ignore=tuple(ignore or ()),
        calibration=tuple(calibration or ()),
        samples=samples,
        seq_len=seq_len,
        damping_frac=damping,
        order=order,
        effort=effort,
        seed=seed,
        device=device,
        strict=strict,
    )
    if dry_run:
        _print(_dry_run(model, out, config), plan_summary, as_json)
        return
    from duotone.pipeline import quantize as run

    with _progress("quantizing", quiet or as_json) as tell:
        report = run(model, out, config, tell)
    _print(report.to_json(), quantize_summary, as_json)


def _dry_run(model: str, out: Path, config: Any) -> dict[str, Any]:
    from duotone.checkpoint.hub import locate_model
    from duotone.checkpoint.source import open_source
    from duotone.checkpoint.writer import check_output
    from duotone.estimate import estimate
    from duotone.loadability import vllm_warnings
    from duotone.plan import make_plan

    check_output(out)
    plan = make_plan(open_source(locate_model(model)), config)
    return dataclasses.asdict(estimate(plan)) | {
        "linears": len(plan.layers),
        "quantized_macs_share": plan.quantized_macs_share,
        "bits_per_weight": plan.bits_per_weight,
        "kept": plan.kept,
        "notes": vllm_warnings(config.scheme, plan.shapes, plan.split_groups),
    }


@app.command("eval", epilog="Example: duotone eval Llama-W4AFP8 --reference meta-llama/Llama-3.2-1B --text held_out.txt")
def evaluate(  # noqa: PLR0913 - every option of the command
    model: Model,
    text: Annotated[list[str], typer.Option(help="Text the model has not seen: FILE or FILE.jsonl#field; repeatable.")],
    reference: Annotated[str | None, typer.Option(help="The original model, to measure the distance from.")] = None,
    seq_len: Annotated[int, typer.Option(help="Tokens of a window.")] = 512,
    samples: Annotated[int | None, typer.Option(help="Windows drawn from the text; all by default.")] = None,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16, for all but the quantized linears.")] = "float32",
    device: Device = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure perplexity, and the distance from the original: KL divergence and top-1 agreement."""
    from duotone.device import resolve_dtype
    from duotone.evaluation import evaluate as run
    from duotone.report import evaluation_summary

    with _progress("evaluating", quiet or as_json) as tell:
        result = run(
            model,
            text,
            reference=reference,
            seq_len=seq_len,
            samples=samples,
            dtype=resolve_dtype(dtype),
            device=device,
            progress=lambda done, total: tell(done, total, "windows"),
        )
    _print(dataclasses.asdict(result), evaluation_summary, as_json)


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

    _print(dataclasses.asdict(inspect_model(model)), inspection_summary, as_json)


@bench_app.command("accuracy", epilog="Example: duotone bench accuracy MODEL --text eval.txt --calibration calib.txt")
def bench_accuracy(  # noqa: PLR0913 - every option of the command
    model: Model,
    text: Annotated[list[str], typer.Option(help="Text to judge on; repeatable.")],
    calibration: Annotated[list[str], typer.Option(help="Text to calibrate on; repeatable.")],
    method: Annotated[list[str] | None, typer.Option(help="Methods; all by default.")] = None,
    target: Annotated[list[str] | None, typer.Option(help="Targets; both by default.")] = None,
    group_size: Annotated[int, typer.Option()] = 128,
    samples: Annotated[int, typer.Option(help="Calibration windows.")] = 128,
    seq_len: Annotated[int, typer.Option(help="Tokens of a window.")] = 256,
    eval_samples: Annotated[int, typer.Option(help="Evaluation windows.")] = 128,
    seed: Annotated[int, typer.Option()] = 0,
    records: Annotated[Path, typer.Option(help="File to append to.")] = Path("bench/records/accuracy.jsonl"),
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Quantize with several methods and targets and measure each against the original."""
    from duotone.bench import AccuracyBench, accuracy_rows, append_records
    from duotone.report import accuracy_table

    defaults = AccuracyBench(model, tuple(text), tuple(calibration))
    bench = dataclasses.replace(
        defaults,
        methods=tuple(method or defaults.methods),
        targets=tuple(target or defaults.targets),
        group_size=group_size,
        samples=samples,
        seq_len=seq_len,
        eval_samples=eval_samples,
        seed=seed,
    )
    rows: list[dict[str, Any]] = []
    total = len(bench.methods) * len(bench.targets)
    with _progress("measuring", quiet or as_json) as tell:
        tell(0, total, "")
        for row in accuracy_rows(bench):
            append_records(records, [row])
            rows.append(row)
            tell(len(rows), total, f"{row['method']} {row['target']}")
    _print(rows, lambda values: accuracy_table(values), as_json)


@bench_app.command("linear", epilog="Example: duotone bench linear --shape 4096x14336 --tokens 1 --tokens 16 --threads 2")
def bench_linear(
    shape: Annotated[list[str] | None, typer.Option(help="NxK; those of Llama-3-8B by default. Repeatable.")] = None,
    tokens: Annotated[list[int] | None, typer.Option(help="Tokens of a call; repeatable.")] = None,
    rounds: Annotated[int, typer.Option(help="How often each candidate takes its turn.")] = 15,
    threads: Annotated[int | None, typer.Option(help="torch's own number by default.")] = None,
    records: Annotated[Path, typer.Option(help="File to append to.")] = Path("bench/records/linear.jsonl"),
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Time the W4A8 linear beside torch's BF16 and INT4 ones, and beside what memory and arithmetic allow."""
    import torch

    from duotone.bench import append_records
    from duotone.report import speed_table
    from duotone.speed import SpeedBench, linear_rows

    if threads is not None:
        torch.set_num_threads(max(1, threads))
    defaults = SpeedBench()
    bench = SpeedBench(
        tuple(_shape(text) for text in shape) if shape else defaults.shapes, tuple(tokens or defaults.tokens), rounds
    )
    rows: list[dict[str, Any]] = []
    with _progress("measuring", quiet or as_json) as tell:
        for row in linear_rows(bench):
            append_records(records, [row])
            rows.append(row)
            tell(len(rows), 3 * len(bench.shapes) * len(bench.tokens), row["kernel"])
    _print(rows, lambda values: speed_table(values), as_json)


@bench_app.command("generate", epilog="Example: duotone bench generate Llama-3.2-1B-W4AFP8 --prompt-tokens 128 --new-tokens 32")
def bench_generate(
    model: Annotated[str | None, typer.Argument(help="A quantized checkpoint; a random one of 1.1 billion parameters.")] = None,
    prompt_tokens: Annotated[int, typer.Option(help="Length of the prompt.")] = 128,
    new_tokens: Annotated[int, typer.Option(help="Tokens to write in a turn.")] = 32,
    rounds: Annotated[int, typer.Option(help="How often each candidate takes its turn.")] = 5,
    threads: Annotated[int | None, typer.Option(help="torch's own number by default.")] = None,
    records: Annotated[Path, typer.Option(help="File to append to.")] = Path("bench/records/generate.jsonl"),
    as_json: Json = False,
) -> None:
    """Time a whole model beside itself in BF16 and with torch's INT4 linears, in one process and in turns."""
    import torch

    from duotone.bench import append_records
    from duotone.report import generate_table
    from duotone.speed_model import GenerateBench, generate_rows

    if threads is not None:
        torch.set_num_threads(max(1, threads))
    rows = list(generate_rows(GenerateBench(model, prompt_tokens, new_tokens, rounds)))
    append_records(records, rows)
    _print(rows, lambda values: generate_table(values), as_json)


def _shape(text: str) -> tuple[int, int]:
    rows, _, columns = text.partition("x")
    if not (rows.isdecimal() and columns.isdecimal()):
        raise DuotoneError(f"--shape: found {text!r}, expected NxK such as 4096x14336")
    return int(rows), int(columns)


def _print(value: Any, render: Callable[[Any], Any], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(value, allow_nan=False))
    else:
        from duotone.report import show

        show(render(value))


@contextmanager
def _progress(title: str, hidden: bool) -> Iterator[Callable[[int, int, str], None]]:
    """A bar with the time left, on standard error."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"))
    with Progress(
        *columns, TimeRemainingColumn(), console=console, disable=hidden or not console.is_terminal, transient=True
    ) as bar:
        task = bar.add_task(title, total=None)

        def tell(done: int, total: int, what: str) -> None:
            bar.update(task, completed=done, total=total, description=f"{title} {what}")

        yield tell


def main() -> None:
    """Entry point: a DuotoneError becomes one sentence on standard error and exit code 2."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        app()
    except DuotoneError as error:
        # Names come from strangers' files: nothing in them may move the cursor or forge a second line.
        typer.echo("duotone: " + "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(error)), err=True)
        sys.exit(2)
