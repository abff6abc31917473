"""The command line as a page, out of what `--help` shows. docs/conf.py puts it into docs/commands.md when the site is built.

Usage: python tools/commands.py
"""

import sys
from collections.abc import Iterator
from typing import Any

from typer.main import get_command

from duotone import cli


def commands_page() -> str:
    """Markdown: a section for every command, its arguments and options in tables, its examples."""
    return "\n".join(_section(path, command) for path, command in all_commands())


def all_commands() -> Iterator[tuple[str, Any]]:
    """What is typed for a command, such as `bench linear`, and typer's object; in the order of `duotone --help`."""
    pending = [("", get_command(cli.app))]
    while pending:
        path, command = pending.pop(0)
        if hasattr(command, "commands"):
            pending += [(f"{path} {name}".strip(), member) for name, member in command.commands.items()]
        else:
            yield path, command


def _section(path: str, command: Any) -> str:
    shown = [parameter for parameter in command.params if not parameter.hidden]
    arguments = [parameter for parameter in shown if parameter.param_type_name == "argument"]
    options = [parameter for parameter in shown if parameter.param_type_name == "option"]
    usage = " ".join(["duotone", path, *(_placeholder(argument) for argument in arguments), "[OPTIONS]" if options else ""])
    examples = [line.partition(": ") for line in (command.epilog or "").splitlines() if line]
    lines = [f"## duotone {path}", "", _plain(command.help), "", "```text", usage.strip(), "```", ""]
    lines += ["| | default | |", "|---|---|---|"]
    lines += [f"| `{_placeholder(argument)}` | | {_plain(argument.help)} |" for argument in arguments]
    lines += [f"| `{' '.join(option.opts)}` | {_default(option)} | {_plain(option.help)} |" for option in options]
    for title, _, example in examples:
        lines += ["", f"{title}:", "", "```bash", example, "```"]
    return "\n".join([*lines, ""])


def _placeholder(argument: Any) -> str:
    name = argument.name.upper().rstrip("_")
    name += "..." if argument.nargs != 1 else ""
    return name if argument.required else f"[{name}]"


def _default(option: Any) -> str:
    if option.required:
        return "required"
    if option.is_flag or option.default is None:
        return ""
    return f"`{option.default}`"


def _plain(text: str | None) -> str:
    """One line that a table can hold."""
    return " ".join((text or "").split()).replace("|", r"\|").replace("<", r"\<")


if __name__ == "__main__":
    sys.stdout.write(commands_page())
