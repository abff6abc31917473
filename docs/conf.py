"""The site: Sphinx and MyST over docs/*.md, the API from docstrings, the commands from `--help`.

`make docs` builds it into build/docs with every warning an error.
"""

import sys
from pathlib import Path

from sphinx.application import Sphinx

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
from commands import commands_page

from duotone.version import VERSION

project, author, release = "Duotone", "The Duotone authors", VERSION
project_copyright = "The Duotone authors, Apache-2.0"
extensions = ["myst_parser", "sphinx.ext.autodoc"]
html_theme = "furo"
html_title = f"Duotone {VERSION}"
html_show_sourcelink = False
html_copy_source = False
#: `name` in a docstring is code, as in Markdown.
default_role = "code"
myst_heading_anchors = 3
autodoc_member_order = "bysource"


def setup(app: Sphinx) -> None:
    """Sphinx calls this."""
    app.connect("source-read", put_commands)


def put_commands(_: Sphinx, page: str, text: list[str]) -> None:
    """Give commands.md what the commands say of themselves."""
    if page == "commands":
        text[0] += commands_page()
