"""The commands of `duotone bench`."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from duotone.cli_options import Json, Model, Quiet, print_result, progress_bar
from duotone.errors import DuotoneError

bench_app = typer.Typer(help="Measure, and append records.", no_args_is_help=True)


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
    from duotone.report_bench import accuracy_table

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
    with progress_bar("measuring", quiet or as_json) as tell:
        tell(0, total, "")
        for row in accuracy_rows(bench):
            append_records(records, [row])
            rows.append(row)
            tell(len(rows), total, f"{row['method']} {row['target']}")
    print_result(rows, lambda values: accuracy_table(values), as_json)


@bench_app.command("quantize", epilog="Example: duotone bench quantize MODEL --calibration text.txt --samples 32 --seq-len 512")
def bench_quantize(  # noqa: PLR0913 - every option of the command
    model: Model,
    calibration: Annotated[list[str], typer.Option(help="Text to calibrate on; repeatable.")],
    group_size: Annotated[int, typer.Option()] = 128,
    samples: Annotated[int, typer.Option(help="Calibration windows.")] = 128,
    seq_len: Annotated[int, typer.Option(help="Tokens of a window.")] = 256,
    rounds: Annotated[int, typer.Option(help="How often.")] = 3,
    seed: Annotated[int, typer.Option()] = 0,
    records: Annotated[Path, typer.Option(help="File to append to.")] = Path("bench/records/quantize_time.jsonl"),
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Time quantizing, phase by phase, beside what the arithmetic of each would take alone."""
    from duotone.bench import AccuracyBench, append_records, quantize_time_row
    from duotone.report_bench import phases_table

    bench = AccuracyBench(
        model, (), tuple(calibration), group_size=group_size, samples=samples, seq_len=seq_len, seed=seed
    )  # fmt: skip
    rows: list[dict[str, Any]] = []
    with progress_bar("quantizing", quiet or as_json) as tell:
        tell(0, rounds, "")
        for number in range(rounds):
            rows.append(quantize_time_row(bench, number))
            append_records(records, rows[-1:])
            tell(len(rows), rounds, f"{rows[-1]['seconds']:.1f} s")
    print_result(rows, lambda values: phases_table(values), as_json)


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
    from duotone.report_bench import speed_table
    from duotone.speed import SpeedBench, linear_rows

    if threads is not None:
        torch.set_num_threads(max(1, threads))
    defaults = SpeedBench()
    bench = SpeedBench(
        tuple(_shape(text) for text in shape) if shape else defaults.shapes, tuple(tokens or defaults.tokens), rounds
    )
    rows: list[dict[str, Any]] = []
    with progress_bar("measuring", quiet or as_json) as tell:
        for row in linear_rows(bench):
            append_records(records, [row])
            rows.append(row)
            tell(len(rows), 3 * len(bench.shapes) * len(bench.tokens), row["kernel"])
    print_result(rows, lambda values: speed_table(values), as_json)


@bench_app.command("gpu", epilog="Example: duotone bench gpu --out records.jsonl")
def bench_gpu(
    only: Annotated[
        list[str] | None,
        typer.Option(
            help="A part: correctness, linears-8b, linears-70b, end-to-end, throughput, quantizer, peers (by default "
            "all of these), quantizer-full (all blocks of Llama-3-8B's shape) or tiles (other ways to multiply), which take as "
            "long as they take; repeatable."
        ),
    ] = None,
    minutes: Annotated[float, typer.Option(help="Time for all parts; what it is not enough for has a row that says so.")] = 8.0,
    shape: Annotated[list[str] | None, typer.Option(help="NxK: only linears of this shape; repeatable.")] = None,
    tokens: Annotated[list[int] | None, typer.Option(help="Of a linear's call, 1 to 8192 by default; repeatable.")] = None,
    rounds: Annotated[int, typer.Option(help="How often each linear takes its turn.")] = 20,
    out: Annotated[Path, typer.Option(help="File to append to.")] = Path("bench/records/gpu.jsonl"),
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compare the kernels on a GPU with the contract, then time linears, whole models and the quantizer there."""
    from duotone.bench import append_records
    from duotone.speed_gpu import run
    from duotone.speed_gpu.tables import gpu_tables

    plan = dataclasses.replace(run.FULL, tokens=tuple(tokens or run.FULL.tokens), rounds=rounds)
    bench = run.GpuBench(minutes, tuple(only or ()), tuple(_shape(text) for text in shape or ()), plan=plan)
    rows: list[dict[str, Any]] = []
    with progress_bar("measuring", quiet or as_json) as tell:
        for row in run.gpu_rows(bench, lambda seconds, what: tell(int(seconds), int(60 * minutes), what)):
            append_records(out, [row])
            rows.append(row)
    print_result(rows, lambda values: gpu_tables(values), as_json)


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
    from duotone.report_bench import generate_table
    from duotone.speed_model import GenerateBench, generate_rows

    if threads is not None:
        torch.set_num_threads(max(1, threads))
    rows = list(generate_rows(GenerateBench(model, prompt_tokens, new_tokens, rounds)))
    append_records(records, rows)
    print_result(rows, lambda values: generate_table(values), as_json)


def _shape(text: str) -> tuple[int, int]:
    rows, _, columns = text.partition("x")
    if not (rows.isdecimal() and columns.isdecimal()):
        raise DuotoneError(f"--shape: found {text!r}, expected NxK such as 4096x14336")
    return int(rows), int(columns)
