"""The demo, with fewer windows than `make demo` takes."""

import json
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def test_demo_writes_its_summary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """summary.json has the blueprint's form, the table and samples are printed, and the checkpoint is there."""
    demo = runpy.run_path(str(ROOT / "examples" / "demo.py"))
    demo["main"](build=tmp_path, samples=8)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary.keys() == {"original", "methods", "checkpoint"} and summary["original"].keys() == {"perplexity", "bytes"}
    assert list(summary["methods"]) == ["rtn", "gptq", "dpq"]
    for row in summary["methods"].values():
        assert row.keys() == {"perplexity", "kl", "kl_stderr", "top1_agreement", "bits_per_weight", "bytes", "seconds"}
        assert 0 < row["kl"] < 0.2 and row["bytes"] < summary["original"]["bytes"] / 2 and 4.12 < row["bits_per_weight"] < 4.14
    assert (tmp_path / "duotone-10m-dpq" / "model.safetensors").is_file()
    printed = capsys.readouterr().out
    assert "KL to original" in printed and "duotone-10m-dpq" in printed
