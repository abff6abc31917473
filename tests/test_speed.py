"""The speed bench measures what it says: everybody multiplies, nobody's weights are cached, ratios are of the same round."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from duotone import speed, speed_model
from duotone.kernels.dispatch import choose
from duotone.runtime.load import load
from duotone.scheme import HOPPER, Scheme
from duotone.speed import SpeedBench, linear_rows, random_weight
from duotone.speed_model import GenerateBench, dense_twin, generate_rows, random_checkpoint
from tests.test_cli import invoke

SMALL = SpeedBench(shapes=((64, 256),), tokens=(1, 3), rounds=3)
COLUMNS = {
    "kernel", "backend", "refusals", "shape", "tokens", "group_size", "ms", "ms_min", "gbytes_per_second",
    "read_gbytes_per_second", "roofline_share", "gflops", "peak_gflops", "times_as_fast_as",
    "commit", "date", "machine", "threads", "versions", "seed",
}  # fmt: skip


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Little memory to read, so that a test takes no time."""
    monkeypatch.setattr(speed, "_OUT_OF_CACHE", 2**20)


def test_random_weights_are_canonical() -> None:
    """They pass the checks of QuantizedWeight, and differ."""
    weights = [random_weight(8, 256, 128, seed) for seed in (0, 0, 1)]
    assert torch.equal(weights[0].codes, weights[1].codes) and not torch.equal(weights[0].codes, weights[2].codes)


def test_rows() -> None:
    """One for each number of tokens and candidate, with what ARCHITECTURE asks of a record; figures that fit each other."""
    rows = list(linear_rows(SMALL))
    assert len(rows) == 2 * 3
    for row in rows:
        assert row.keys() == COLUMNS
        assert 0 < row["ms_min"] <= row["ms"] and row["peak_gflops"] > 0
        assert row["gflops"] == pytest.approx(2 * row["tokens"] * 64 * 256 / row["ms"] / 1e6)
        assert row["roofline_share"] == pytest.approx(row["gbytes_per_second"] / row["read_gbytes_per_second"])
        assert set(row["times_as_fast_as"]) == {other["kernel"] for other in rows} - {row["kernel"]}
    backend, _ = choose(Scheme(HOPPER, 128), torch.device("cpu"))
    assert f"duotone {backend.NAME}" in {row["kernel"] for row in rows}
    assert {row["backend"] for row in rows} == {backend.describe(Scheme())}


def test_a_slow_candidate_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A product that takes a known time has it in its row, and ours is faster by what it lost."""
    linear = torch.nn.functional.linear

    def slow(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        time.sleep(0.02)
        return linear(x, weight)

    monkeypatch.setattr(torch.nn.functional, "linear", slow)
    rows = {row["kernel"]: row for row in linear_rows(SpeedBench(shapes=((16, 128),), tokens=(1,), rounds=3))}
    assert rows["torch BF16"]["ms"] >= 20
    quick = rows["torch int4pack (W4A16)"]
    assert quick["times_as_fast_as"]["torch BF16"] > 2


def test_each_call_has_another_weight() -> None:
    """Enough copies that all of them together are more than what was said to be out of cache."""
    prepared = speed._Prepared(SMALL, 64, 256)
    assert sum(weight.nbytes for weight in prepared.bf16) >= 2**20
    assert sum(packed.nbytes for packed in prepared.int4) >= 2**20


def test_command_appends_what_it_prints(tmp_path: Path) -> None:
    """The records file holds the rows of --json; a second run adds to it; the table shows every candidate."""
    given = ("bench", "linear", "--shape", "64x256", "--tokens", 2, "--rounds", 1, "--records", tmp_path / "linear.jsonl")
    printed = invoke(*given, "--json").json()
    written = [json.loads(line) for line in (tmp_path / "linear.jsonl").read_text().splitlines()]
    assert written == printed and len(printed) == 3
    table = invoke(*given)
    assert all(row["kernel"] in table.out for row in printed)
    assert len((tmp_path / "linear.jsonl").read_text().splitlines()) == 6


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("--shape", "64"), "--shape: found '64', expected NxK"),
        (("--shape", "64x100"), "--shape 64x100: expected NxK, N a multiple of 16 and K of the group of 128"),
        (("--shape", "24x128"), "--shape 24x128: expected NxK, N a multiple of 16"),
        (("--rounds", 0), "expected at least one round and one token"),
        (("--tokens", 0), "expected at least one round and one token"),
    ],
)
def test_bad_input(given: tuple, said: str, tmp_path: Path) -> None:
    """One sentence, exit code 2, no record."""
    outcome = invoke("bench", "linear", *given, "--records", tmp_path / "linear.jsonl")
    assert outcome.code == 2 and said in outcome.err
    assert not (tmp_path / "linear.jsonl").exists()


TINY = speed_model.LLAMA_1B | {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 32, "vocab_size": 300,
}  # fmt: skip


def test_whole_models_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours, the BF16 twin, torch's INT4 and whoever else is given: a row each, and ratios of the same round."""
    monkeypatch.setattr(speed_model, "LLAMA_1B", TINY)
    slow = lambda: (0.5, 0.1)  # noqa: E731
    rows = {row["runtime"]: row for row in generate_rows(GenerateBench(None, 8, 3, 2), {"another": slow})}
    assert list(rows) == ["duotone", "transformers BF16", "torch int4pack (W4A16)", "another"]
    assert rows["another"]["prefill_tokens_per_second"] == pytest.approx(16)
    assert rows["another"]["decode_tokens_per_second"] == pytest.approx(10)
    assert rows["another"]["ours_times_as_fast"]["decode"] > 1 and rows["duotone"]["ours_times_as_fast"]["decode"] == 1
    linears = 2 * (128 * (128 + 64 + 64 + 128) + 3 * 128 * 256)
    assert rows["transformers BF16"]["weight_bytes"] == 2 * (linears + 2 * 300 * 128 + 5 * 128)
    tables = rows["duotone"]["weight_bytes"] - 2 * (2 * 300 * 128 + 5 * 128)
    assert linears // 2 < tables < linears, "half a byte a weight, and tables, which such small weights do not hide"


def test_the_dense_twin_computes_the_same_weights(tmp_path: Path) -> None:
    """In float32 it differs from ours by the rounding of activations and of weights to BF16 only."""
    folder = random_checkpoint(tmp_path, TINY, 0)
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        ours, twin = (model.float()(tokens).logits for model in (load(folder, device="cpu"), dense_twin(folder)))
    assert 0 < float((ours - twin).norm() / twin.norm()) < 0.1


def test_bench_generate_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows go to the file and to standard output; impossible wishes are refused."""
    monkeypatch.setattr(speed_model, "LLAMA_1B", TINY)
    options = ("bench", "generate", "--rounds", "1", "--prompt-tokens", "4", "--new-tokens", "2", "--json")
    done = invoke(*options, "--records", str(tmp_path / "rows.jsonl"))
    rows = done.json()
    assert [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()] == rows and len(rows) == 3
    refused = invoke(*options, "--rounds", "0")
    assert refused.code == 2 and "expected at least one round" in refused.err


def test_loading_takes_little_more_than_the_file(tmp_path: Path) -> None:
    """The peak of a process that loads a quarter gigabyte grows by less than 1.3 times what the file holds."""
    folder = random_checkpoint(tmp_path, speed_model.LLAMA_1B | {"num_hidden_layers": 4, "vocab_size": 16000}, 0)
    size = sum(file.stat().st_size for file in folder.iterdir())
    program = (
        "import sys; from duotone.runtime.load import load; import transformers.models.llama.modeling_llama;"
        "peak = lambda: 1024 * int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]); before = peak();"
        "model = load(sys.argv[1], device='cpu'); print(peak() - before)"
    )
    done = subprocess.run([sys.executable, "-c", program, str(folder)], capture_output=True, text=True, check=True)
    assert size > 200e6 and 0.5 * size < int(done.stdout) < 1.3 * size
