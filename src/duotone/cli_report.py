"""The commands that tell of finished checkpoints: report, compare."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from duotone.cli_options import Device, Json, Model, Quiet, print_result, progress_bar

report_app = typer.Typer()


@report_app.command(
    epilog="Example: duotone report Llama-W4AFP8\n\n"
    "Measured too: duotone report Llama-W4AFP8 --original meta-llama/Llama-3.2-1B --text held_out.txt"
)
def report(  # noqa: PLR0913 - every option of the command
    model: Model,
    out: Annotated[Path | None, typer.Option(help="The file to write; report.FORMAT in the checkpoint by default.")] = None,
    kind: Annotated[str, typer.Option("--format", help="html (one file, no network), md, png or json.")] = "html",
    original: Annotated[str | None, typer.Option(help="What it was made of: measure the distance, write side by side.")] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(help="Text the model has not seen: FILE or FILE.jsonl#field; repeatable. Without: what eval --card left."),
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="A text that both continue; repeatable. Without: beginnings from the text.")
    ] = None,
    seq_len: Annotated[int, typer.Option(help="Tokens of a window.")] = 512,
    samples: Annotated[int | None, typer.Option(help="Windows drawn from the text; all by default.")] = None,
    new_tokens: Annotated[int, typer.Option(help="Tokens that both add to a prompt, at most.")] = 48,
    device: Device = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a page about a checkpoint: what was quantized, how well, at what cost, where it loads, and how to do it again."""
    from duotone.page.facts import gather
    from duotone.page.measured import Comparison
    from duotone.page.write import report_path, write_report

    path = report_path(model, out, kind)
    asked = Comparison(original, tuple(text or ()), tuple(prompt or ()), seq_len, samples, new_tokens, device)
    with progress_bar("reading", quiet or as_json) as tell:
        facts = gather(model, asked, tell)
    write_report(facts, path, kind)
    print_result({"out": str(path), "facts": facts.to_json()} if as_json else {"out": str(path)}, _told, as_json)


@report_app.command(
    epilog="Example: duotone compare Llama-W4AFP8 TheBloke/Llama-GPTQ --original meta-llama/Llama-3.2-1B --text held_out.txt"
)
def compare(  # noqa: PLR0913 - every option of the command
    models: Annotated[list[str], typer.Argument(help="Two or more model folders or hub ids, ours or another tool's.")],
    original: Annotated[str, typer.Option(help="What all of them were made of.")],
    text: Annotated[list[str], typer.Option(help="Text the models have not seen: FILE or FILE.jsonl#field; repeatable.")],
    seq_len: Annotated[int, typer.Option(help="Tokens of a window.")] = 512,
    samples: Annotated[int | None, typer.Option(help="Windows drawn from the text; all by default.")] = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option(help="Tasks too, as eval takes them: piqa=FOLDER, or hellaswag,arc_easy; repeatable."),
    ] = None,
    items: Annotated[int | None, typer.Option(help="The most questions of a task.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write bits against KL to this .svg file.")] = None,
    speed: Annotated[bool, typer.Option("--speed/--no-speed", help="Time a prompt and its continuation too.")] = True,
    device: Device = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure checkpoints against one original: KL, perplexity, agreement, tasks, bytes, speed. A star: none beats it."""
    from duotone.comparing import Asked
    from duotone.comparing import compare as run
    from duotone.page.pareto import pareto_svg
    from duotone.page.write import check_place, write_whole_file
    from duotone.report import comparison_table

    if plot is not None:
        check_place(plot, "--plot")
    asked = Asked(original, tuple(text), seq_len, samples, tuple(tasks or ()), items, speed, device)
    with progress_bar("comparing", quiet or as_json) as tell:
        found = run(models, asked, tell)
    if plot is not None:
        write_whole_file(plot, pareto_svg(found))
    print_result([dataclasses.asdict(one) for one in found], comparison_table, as_json)


def _told(result: dict[str, Any]) -> str:
    return f"wrote {result['out']}"
