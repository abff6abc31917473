"""The table of what loads where is what the rules say."""

import sys
from pathlib import Path

import pytest

from duotone.loadability import GPUS, RUNTIMES, judge

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))

import render


def test_the_table_says_what_check_says() -> None:
    """Each device once, each runtime once, and in each cell the verdict or the export that helps."""
    head, _, *rows = (line.strip("| \n").split(" | ") for line in render.loads_table().splitlines())
    columns = [cell.lower().split(", ") for cell in head[-len(rows[0]) + 1 :]]
    assert sorted(gpu for gpus in columns for gpu in gpus) == sorted(GPUS)
    assert len(rows) == len(RUNTIMES)
    for runtime, (title, *cells) in zip(RUNTIMES, rows, strict=True):
        assert title.startswith(render.RUNTIME_TITLES[runtime])
        for gpus, cell in zip(columns, cells, strict=True):
            for gpu in gpus:
                found = judge(render._llama(), runtime, gpu)
                exports = [advice for advice in found.advice if "export" in advice]
                if found.loads:
                    assert cell.startswith(found.outcome.upper())
                elif exports:
                    assert cell.split("--format ")[1].rstrip("`") in exports[0]
                else:
                    assert cell == "-"


def test_a_page_gets_it_where_it_is_marked() -> None:
    """And a marker of a table that nobody makes is an error."""
    made = render.render("before\n<!-- table: loads -->\nold\n<!-- end -->\nafter")
    assert made == f"before\n<!-- table: loads -->\n{render.loads_table()}<!-- end -->\nafter" and "W4A8" in made
    with pytest.raises(KeyError):
        render.render("<!-- table: nothing -->\n<!-- end -->")
