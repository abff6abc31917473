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
