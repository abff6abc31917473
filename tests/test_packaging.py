"""What a release takes with it: its version, authors and licence in words, and the commands that it promises."""

import re
import tomllib
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_the_citation_is_of_this_version() -> None:
    """CITATION.cff has the package's version and licence, and names the paper."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert (citation["version"], citation["license"]) == (PROJECT["version"], PROJECT["license"])
    paper = citation["preferred-citation"]
    assert [author["family-names"] for author in paper["authors"]] == ["Gafni", "Karnieli", "Hanani"]
    assert "2505.14638" in paper["url"] and {"cff-version", "message", "title", "authors"} <= citation.keys()


def test_the_licence_is_there() -> None:
    """Apache-2.0, by the text and by the name."""
    assert PROJECT["license"] == "Apache-2.0" and PROJECT["license-files"] == ["LICENSE"]
    assert "Apache License" in (ROOT / "LICENSE").read_text(encoding="utf-8")


def test_the_four_commands_are_commands() -> None:
    """What CONTRIBUTING.md tells to type is a target of the Makefile, and the files it points to are there."""
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    commands = re.findall(r"^    make (\w+)", page, re.MULTILINE)
    assert len(commands) == 4 and set(commands) <= targets
    for link in re.findall(r"\]\(([^)#]+)\)", page):
        assert (ROOT / link).exists(), link
