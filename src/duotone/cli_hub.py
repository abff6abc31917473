"""The command that uploads a checkpoint."""

import dataclasses
from typing import Annotated

import typer

from duotone.cli_options import Json, Quiet, print_result, progress_bar

hub_app = typer.Typer()


@hub_app.command(epilog="Example: duotone push Llama-3.2-1B-W4AFP8 me/Llama-3.2-1B-W4AFP8 --private")
def push(
    checkpoint: Annotated[str, typer.Argument(help="A folder that quantize has written.")],
    repo: Annotated[str, typer.Argument(help="owner/name on the hub; made where there is none.")],
    private: Annotated[bool, typer.Option("--private", help="Only into a private repository.")] = False,
    revision: Annotated[str | None, typer.Option(help="A branch; made where there is none.")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Verify a checkpoint from end to end and upload it with its model card; other files of the folder stay here."""
    from huggingface_hub.utils import disable_progress_bars

    from duotone.publishing import push as run
    from duotone.report import push_summary

    if quiet or as_json:
        disable_progress_bars()
    with progress_bar("verifying", quiet or as_json) as tell:
        done = run(checkpoint, repo, private, revision, tell)
    print_result(dataclasses.asdict(done), push_summary, as_json)
