"""The command that measures a model: on text, or on tasks."""

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from duotone.cli_options import Device, Json, Model, Quiet, print_result, progress_bar
from duotone.errors import DuotoneError

eval_app = typer.Typer()


@eval_app.command(
    "eval",
    epilog="Example: duotone eval Llama-W4AFP8 --reference meta-llama/Llama-3.2-1B --text held_out.txt\n\n"
    "On tasks: duotone eval Llama-W4AFP8 --reference meta-llama/Llama-3.2-1B --tasks piqa,arc_easy --card",
)
def evaluate(  # noqa: PLR0913 - every option of the command
    model: Model,
    text: Annotated[
        list[str] | None,
        typer.Option(help="Text the model has not seen, FILE or FILE.jsonl#field, or images with text; repeatable."),
    ] = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            help="Instead of text: piqa=FOLDER, gsm8k=FILE or stories=FILE, scored by likelihood; or tasks of lm-eval by name, "
            "hellaswag,arc_easy, or a task file of its own .yaml kind (which may run code); repeatable."
        ),
    ] = None,
    items: Annotated[int | None, typer.Option(min=2, help="The most questions of a task.")] = None,
    reference: Annotated[str | None, typer.Option(help="The original model, to measure the distance from.")] = None,
    seq_len: Annotated[int, typer.Option(help="Tokens of a window.")] = 512,
    samples: Annotated[int | None, typer.Option(help="Windows drawn from the text; all by default.")] = None,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16, for all but the quantized linears.")] = "float32",
    card: Annotated[bool, typer.Option("--card", help="Put the figures into the checkpoint's README.md and report.")] = False,
    device: Device = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure perplexity, and the distance from the original: KL divergence and top-1 agreement. Or accuracy on tasks."""
    from duotone.card import card_around, put_evaluation, put_tasks
    from duotone.device import resolve_dtype
    from duotone.evaluation import evaluate as run
    from duotone.examining import examine
    from duotone.report import evaluation_summary, tasks_summary

    if bool(text) == bool(tasks):
        raise DuotoneError("eval: expected --text FILE, or --tasks NAME=PATH or --tasks NAME by itself")
    if card:
        card_around(Path(model))  # a card without a place for them is found before the work
    if tasks or text is None:
        with progress_bar("tasks", quiet or as_json) as tell:
            found = examine(model, tasks or [], reference, items, dtype=resolve_dtype(dtype), device=device, progress=tell)
        rows = [dataclasses.asdict(one) for one in found]
        if card:
            put_tasks(Path(model), rows)
        print_result(rows, tasks_summary, as_json)
        return
    with progress_bar("evaluating", quiet or as_json) as tell:
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
    if card:
        put_evaluation(Path(model), text, dataclasses.asdict(result))
    print_result(dataclasses.asdict(result), evaluation_summary, as_json)
