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


def test_gpu_tables_with_and_without_records(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Unmeasured, goal by goal, where nobody has; else under the device's name the worst, and whether it is enough."""
    monkeypatch.setattr(render, "RECORDS", tmp_path)
    assert render.gpu_goals_table().count("| unmeasured | unmeasured |") == len(render.goals.GOALS)
    others = (render.gpu_linears_table, render.gpu_steps_table, render.gpu_throughput_table, render.gpu_quantizer_table)
    assert {table() for table in others} == {"Unmeasured.\n"}
    common = {"device": "H200", "date": "1", "unmeasured": None, "kernel": "duotone triton"}
    model = {"model": "8B", "batch": 64, "image_tokens": 0, "tokens_per_second": 9.0, "kv_bytes": 1e9}
    rows: list[dict] = [
        common | {"part": "linears-8b", "kind": "linear", "shape": [4096, 4096], "tokens": 1, "roofline_share": 0.5, "ms": 0.1,
                  "gflops": 1.0, "peak_gflops": 2.0, "times_as_fast_as": {"cuBLAS BF16": 3.25, "torch FP8, row-wise": 1.5}},
        common | model | {"part": "end-to-end", "kind": "decode", "tokens": 7, "ms": 2.0, "gbytes_per_second": 1.0,
                          "read_gbytes_per_second": 2.0, "peak_bytes": None},
        common | model | {"part": "throughput", "kind": "throughput", "prompt_tokens": 3, "new_tokens": 4, "largest_batch": 5,
                          "largest_batch_fp8_cache": 10},
        common | {"part": "quantizer", "kind": "quantizer", "model": "2 blocks", "method": "dpq", "tokens": 1, "seconds": 3.0,
                  "extrapolated_seconds": 48.0, "how": "extrapolated", "peak_bytes": 2e9},
    ]  # fmt: skip
    (tmp_path / "gpu.jsonl").write_text("".join(render.json.dumps(row) + "\n" for row in rows))
    goals = render.gpu_goals_table()
    assert goals.startswith("H200:\n\n") and "| at least 70 % | 50 % (8B, 4096x4096, 1 tokens) | not met |" in goals
    assert "| at least 2.75 times | 3.25 times (8B, 4096x4096, 1 tokens) | met |" in goals
    assert [len(table().splitlines()) for table in others] == [5, 5, 5, 5]
    assert "48 s, extrapolated" in render.gpu_quantizer_table() and "| 50 % |" in render.gpu_steps_table()
