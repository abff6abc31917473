"""What the commands share: options, a progress bar, and results as a table or as JSON."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bar.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Model = Annotated[str, typer.Argument(help="A model folder or a hub id.")]
Method = Annotated[str, typer.Option(help="dpq, dpq-paper, gptq or rtn (rtn needs no text, but for --kv-cache).")]
TargetName = Annotated[str, typer.Option(help="hopper (what vLLM runs) or gaudi (the paper's).")]
GroupSize = Annotated[int, typer.Option(help="Weights along K that share a scale.")]
Ignore = Annotated[list[str] | None, typer.Option(help="A linear to leave in BF16, or re:PATTERN; repeatable.")]
Rules = Annotated[
    list[str] | None,
    typer.Option(
        help="NAME=SCHEME or re:PATTERN=SCHEME with w4a8, w8a8 (FP8 weights, for what 4 bits hurt) or bf16; the first that "
        "names a linear decides, also of one that stays BF16 by default; repeatable."
    ),
]
Calibration = Annotated[
    list[str] | None,
    typer.Option(
        help="A text file, FILE.jsonl#field, or a hub data set owner/name:split; repeatable, in equal shares, or each with "
        "its weight, a.jsonl#question,answer:0.7,b.txt:0.3 (a last :NUMBER is a weight: a file named a:1 is a:1:1). For a "
        "model that sees also FILE.jsonl with an image and text or messages in a row, or a folder of images with captions."
    ),
]
Samples = Annotated[int, typer.Option(help="Calibration windows.")]


def print_result(value: Any, render: Callable[[Any], Any], as_json: bool) -> None:
    """A result on standard output."""
    if as_json:
        typer.echo(json.dumps(value, allow_nan=False))
    else:
        from duotone.report import show

        show(render(value))


@contextmanager
def progress_bar(title: str, hidden: bool) -> Iterator[Callable[[int, int, str], None]]:
    """A bar with the time left, on standard error."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    console = Console(file=sys.stderr)  # as it is now: what other libraries would say beside the bar is led elsewhere
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"))
    with Progress(
        *columns, TimeRemainingColumn(), console=console, disable=hidden or not console.is_terminal, transient=True
    ) as bar:
        task = bar.add_task(title, total=None)

        def tell(done: int, total: int, what: str) -> None:
            bar.update(task, completed=done, total=total, description=f"{title} {what}")

        yield tell
