"""Records are whole, and no page shows a number that they do not hold."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
#: ARCHITECTURE section 4.
COMMON = {"commit", "date", "machine", "threads", "versions", "seed"}
ACCURACY = COMMON | {
    "model", "text", "tokens", "tool", "method", "effort", "target", "scheme", "group_size", "calibration", "arithmetic",
    "bits_per_weight", "quantized_macs_share", "kl", "kl_stderr", "kl_activation_floor", "perplexity", "bits_per_byte",
    "top1_agreement", "tasks", "quantize_seconds", "peak_bytes", "refused",
}  # fmt: skip


def rows(name: str) -> list[dict]:
    return [json.loads(line) for line in (ROOT / "bench" / "records" / f"{name}.jsonl").read_text().splitlines()]


def test_pages_show_the_records() -> None:
    """README and docs are what tools/render.py makes of the committed records."""
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "render.py", "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_accuracy_rows_are_whole() -> None:
    """Every row has every column, and says what it was measured with."""
    for row in rows("accuracy"):
        assert row.keys() >= ACCURACY, ACCURACY - row.keys()
        assert row["commit"] and not row["commit"].endswith("+"), "measured on a tree with uncommitted changes"


@pytest.mark.parametrize("model", ["wiki-6m", "duotone-10m"])
@pytest.mark.parametrize("target", ["hopper", "gaudi"])
def test_dpq_is_nearest_to_the_original(model: str, target: str) -> None:
    """The claim of the README, in the records: KL of dpq < gptq < rtn for each model and target."""
    wanted = {"model": model, "target": target, "group_size": 128, "scheme": "w4a8"}
    newest = {row["method"]: row["kl"] for row in rows("accuracy") if all(row[key] == value for key, value in wanted.items())}
    assert newest["dpq"] < newest["gptq"] < newest["rtn"]


def test_divergence_ranks_texts_as_the_kl_does() -> None:
    """The claim of docs/calibration.md, on the texts that were measured with equally many windows; perplexity does not."""
    measured = [row for row in rows("advice") if row["calibration"]["windows"] == 64]
    by_kl = sorted(measured, key=lambda row: row["kl"])
    assert len(by_kl) > 5 and by_kl != sorted(measured, key=lambda row: row["perplexity_ratio"])
    ranks = [sorted(measured, key=lambda row: row["divergence"]).index(row) for row in by_kl]
    assert ranks == list(range(len(by_kl)))
    none, some, whole = (next(row["kl"] for row in by_kl if row["calibration"]["text"] == text) for text in (
        ["wiki.utf8"],
        ["train.jsonl#question,answer:0.1", "tinystories_1000.txt:0.1", "wiki.utf8:0.8"],
        ["train.jsonl#question,answer:0.5", "tinystories_1000.txt:0.5"],
    ))  # fmt: skip
    assert none - some > (none - whole) / 2
