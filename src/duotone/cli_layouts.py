"""The commands about where a checkpoint loads, and in which layout: check, export, import."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from duotone.cli_options import Json, Model, Quiet, print_result, progress_bar

layouts_app = typer.Typer()
_FORMATS = (
    "compressed-tensors (vLLM on Hopper), w4a16 (vLLM elsewhere), gptq, modelopt (TensorRT-LLM), sglang-w4afp8, gaudi-inc "
    "(Neural Compressor), dense-bf16, or gguf (llama.cpp)."
)
_RUNTIMES = "vllm, vllm-plugin (with Duotone in it), sglang, tensorrt-llm, transformers, gaudi-inc, llama.cpp, duotone; all."
_GPUS = "h100, h200, b200, l40s, a100, mi300x, gaudi2, gaudi3, cpu; all."


@layouts_app.command(epilog="Example: duotone check Llama-W4AFP8 --runtime vllm --gpu h100 --tensor-parallel 2")
def check(  # noqa: PLR0913 - every option of the command
    model: Model,
    runtime: Annotated[list[str] | None, typer.Option(help=_RUNTIMES)] = None,
    gpu: Annotated[list[str] | None, typer.Option(help=_GPUS)] = None,
    tensor_parallel: Annotated[int, typer.Option(help="Ranks that share each linear.")] = 1,
    group_size: Annotated[int, typer.Option(help="Of a model that is not quantized yet: how it would be.")] = 128,
    target: Annotated[str, typer.Option(help="The same.")] = "hopper",
    ignore: Annotated[list[str] | None, typer.Option(help="The same; repeatable.")] = None,
    asymmetric: Annotated[bool, typer.Option("--asymmetric", help="The same.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Say where a checkpoint will load and what each linear becomes there, before or after quantizing. Exit code 1: nowhere."""
    del quiet  # reads headers only: there is no progress to hide
    from duotone.checking import check as run
    from duotone.report import check_summary
    from duotone.settings import QuantizeConfig

    config = QuantizeConfig(target=target, group_size=group_size, symmetric=not asymmetric, ignore=tuple(ignore or ()))
    found = run(model, runtime or (), gpu or (), tensor_parallel, config)
    print_result([dataclasses.asdict(one) for one in found], check_summary, as_json)
    if not any(one.loads for one in found):
        raise typer.Exit(1)


@layouts_app.command(epilog="Example: duotone export Llama-W4AFP8 Llama-W4A16 --format w4a16")
def export(  # noqa: PLR0913 - every option of the command
    model: Model,
    out: Annotated[Path, typer.Argument(help="The folder to write; new or empty.")],
    layout: Annotated[str, typer.Option("--format", help=_FORMATS)],
    allow_lossy: Annotated[
        bool, typer.Option("--allow-lossy", help="Also what the layout holds only approximately, with its error.")
    ] = False,
    calibration: Annotated[
        list[str] | None,
        typer.Option(help="Text to find static activation scales with, for modelopt and SGLang's experts; repeatable."),
    ] = None,
    samples: Annotated[int, typer.Option(help="Windows of that text.")] = 64,
    seq_len: Annotated[int, typer.Option(help="Tokens of a window.")] = 256,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a quantized checkpoint in another layout: the same codes, and for each linear how exact that is."""
    from duotone.converting import Calibration, export_checkpoint

    found = Calibration(tuple(calibration or ()), samples, seq_len)
    _converted("exporting", lambda tell: export_checkpoint(model, out, layout, allow_lossy, tell, found), as_json, quiet)


@layouts_app.command("import", epilog="Example: duotone import TheBloke/Llama-2-7B-GPTQ Llama-2-7B-W4AFP8")
def import_(
    model: Annotated[str, typer.Argument(help="A symmetric 4-bit checkpoint: llm-compressor's, GPTQ, AutoRound or AWQ.")],
    out: Annotated[Path, typer.Argument(help="The folder to write; new or empty.")],
    allow_lossy: Annotated[
        bool, typer.Option("--allow-lossy", help="Also values that have no place in ours (-8 under a negative scale).")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Read another tool's 4-bit checkpoint into ours: the same codes, run in FP8."""
    from duotone.converting import import_checkpoint

    _converted("importing", lambda tell: import_checkpoint(model, out, allow_lossy, tell), as_json, quiet)


def _converted(title: str, convert: Callable[[Callable[[int, int, str], None]], Any], as_json: bool, quiet: bool) -> None:
    """Convert under a progress bar and show what became of each linear."""
    from duotone.report import conversion_summary

    with progress_bar(title, quiet or as_json) as tell:
        report = convert(tell)
    print_result(dataclasses.asdict(report), conversion_summary, as_json)
