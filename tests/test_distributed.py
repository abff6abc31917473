"""Several processes share a run: real ones, on this machine, against one process alone."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import duotone
from duotone.checkpoint.journal import RECORD
from duotone.checkpoint.packing import unpack_int4
from duotone.checkpoint.staging import staging_of
from duotone.errors import UnfinishedError
from duotone.outcome import QuantizeReport
from duotone.phases import Phases
from duotone.qweight import QuantizedWeight
from duotone.ranks import ALONE, Ranks
from duotone.run import Run
from duotone.scheme import HOPPER, TARGETS, Scheme
from duotone.settings import QuantizeConfig
from duotone.solver.statistics import Statistics
from duotone.solving import row_shares, solve_group
from tests.several import QUICK, one_window_a_batch, options_of
from tests.test_resume import contents

ROOT = Path(__file__).resolve().parents[1]
ModelMaker = Callable[..., Path]
#: By name, what the processes run together.
CASES = {
    "gptq": "method=gptq,equalize=0.5,rules=re:.*v_proj=w8a8",
    "rotated": "method=dpq-paper,rotate=yes,target=gaudi",
    "rtn": "method=rtn,target=gaudi,rules=re:.*v_proj=w8a8",
    "dpq": "",
}


@pytest.fixture(scope="module")
def model(tiny_model: ModelMaker) -> Path:
    """Three blocks, with biases."""
    return tiny_model("qwen2", num_hidden_layers=3, hidden_size=64, intermediate_size=96, head_dim=16)


@dataclass(frozen=True)
class Ended:
    """How several processes ended: their exit codes by rank, and what all of them said on standard error."""

    codes: list[int]
    err: str

    @property
    def sentences(self) -> list[str]:
        """What a user is told."""
        return [line for line in self.err.splitlines() if line.startswith("duotone: ")]


def processes(arguments: Sequence[Sequence[object]]) -> Ended:
    """Start one Python process for each list of arguments, as torchrun would; none may outlive the first to end by a minute."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": len(arguments), "TORCHELASTIC_RUN_ID": "test"}
    started = []
    for rank, given in enumerate(arguments):
        own = {name: str(value) for name, value in (shared | {"RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": 1}).items()}
        command = [sys.executable, "-m", *map(str, given)]
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(command, cwd=ROOT, env=os.environ | own, **pipes))  # pyright: ignore
    try:
        while all(process.poll() is None for process in started):
            time.sleep(0.05)
        said = [process.communicate(timeout=60)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    return Ended([process.returncode for process in started], "".join(said))


def several(count: int, *arguments: object) -> Ended:
    """`count` processes of tests/several.py."""
    return processes([("tests.several", *arguments)] * count)


def codes_of(folder: Path) -> dict[str, Tensor]:
    """Every packed weight's codes."""
    tensors = load_file(folder / "model.safetensors")
    return {
        name: unpack_int4(tensor, 8 * tensor.shape[1]) for name, tensor in tensors.items() if name.endswith("weight_packed")
    }


def facts_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "duotone.json").read_text())


@pytest.fixture(scope="module")
def alone(model: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every case by one process."""
    out = tmp_path_factory.mktemp("alone")
    with one_window_a_batch():
        for name, options in CASES.items():
            duotone.quantize(model, out / name, calibration=(str(text_file),), **options_of(options))
    return out


@pytest.fixture(scope="module")
def by_two(model: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every case by two."""
    out = tmp_path_factory.mktemp("two")
    ended = several(2, model, text_file, out, *(f"{name}:{options}" for name, options in CASES.items()))
    assert ended.codes == [0, 0], ended.err
    return out


def assert_same(one: Path, other: Path) -> None:
    """The same bytes, but for the layers' errors: these are sums over rows, which the processes shared."""
    left, right = contents(one), contents(other)
    assert left.keys() == right.keys()
    assert {name for name in left if left[name] != right[name]} <= {"duotone.json"}
    (ours, own), (theirs, their) = ((facts.pop("layers"), facts) for facts in map(facts_of, (one, other)))
    assert own == their
    for layer, facts in ours.items():
        for name in ("weight_error", "output_error"):
            found, expected = facts.pop(name), theirs[layer].pop(name)
            assert (found is None) == (expected is None)
            assert found is None or found == pytest.approx(expected, rel=1e-6), (layer, name)
    assert ours == theirs


@pytest.mark.parametrize("case", CASES)
def test_two_find_what_one_finds(alone: Path, by_two: Path, case: str) -> None:
    """Whatever the method; dpq searches so long that one bit more in a moment would move a fifth of all codes behind it."""
    assert_same(alone / case, by_two / case)


def test_three_with_unequal_shares(alone: Path, model: Path, text_file: Path, tmp_path: Path) -> None:
    """Eight windows and 64 rows do not divide by three."""
    ended = several(3, model, text_file, tmp_path, *(f"{name}:{CASES[name]}" for name in ("gptq", "dpq")))
    assert ended.codes == [0, 0, 0], ended.err
    for case in ("gptq", "dpq"):
        assert_same(alone / case, tmp_path / case)


def test_a_killed_process_ends_all_and_they_go_on(by_two: Path, model: Path, text_file: Path, tmp_path: Path) -> None:
    """The one that is left says what happened and what to do; as many processes go on to the same bytes, others do not."""
    ended = several(2, model, text_file, tmp_path, "die=1@2", "dpq")
    assert ended.codes == [2, -9]
    (sentence,) = ended.sentences
    assert "the connection to another process of this run was lost" in sentence and "again with --resume" in sentence
    assert (staging_of(tmp_path / "dpq") / RECORD).exists()
    with pytest.raises(UnfinishedError, match="the machine's number of processes 2, found 1, expected the same"):
        duotone.quantize(model, tmp_path / "dpq", calibration=(str(text_file),), resume=True, **QUICK)
    ended = several(2, model, text_file, tmp_path, "die=1@0", "dpq")  # only a run from the beginning comes by there
    assert ended.codes == [0, 0], ended.err
    assert contents(tmp_path / "dpq") == contents(by_two / "dpq")
    assert {path.name for path in tmp_path.iterdir()} == {"dpq"}


def test_one_sentence_from_the_one_that_failed(model: Path, text_file: Path, tmp_path: Path) -> None:
    """Fewer windows than processes; a model that only one of them cannot read: exit code 2 everywhere, nothing left behind."""
    command = ("duotone", "quantize", model, tmp_path / "out", "--calibration", text_file, "--seq-len", 64, "--samples")
    ended = processes([(*command, 1)] * 2)
    assert ended.codes == [2, 2]
    assert ended.sentences == ["duotone: --samples: found 1 calibration windows for 2 processes, expected one for each"]
    broken = [*command, 8]
    broken[2] = tmp_path / "nothing"
    ended = processes([(*command, 8), broken])
    assert ended.codes == [2, 2]
    (sentence,) = ended.sentences
    assert str(tmp_path / "nothing") in sentence
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("die", [False, True])
def test_torchrun(model: Path, text_file: Path, tmp_path: Path, die: bool) -> None:
    """As a user starts it, with a batch for each: what one process finds.

    When a process dies, torchrun ends the others, and the sentence comes all the same.
    """
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    ours = ["duotone", "quantize", str(model), str(tmp_path / "dpq"), "--calibration", str(text_file)]
    ours += ["--samples", "64", "--seq-len", "128", "--device", "cpu", "--json"]
    theirs = ["tests.several", str(model), str(text_file), str(tmp_path), "die=1@2", "dpq"]
    command, settings = [*run, *(theirs if die else ours)], os.environ | {"OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120, env=settings)
    if die:
        (sentence,) = [line for line in ended.stderr.splitlines() if line.startswith("duotone: ")]
        assert ended.returncode != 0 and "again with --resume" in sentence
        assert (staging_of(tmp_path / "dpq") / RECORD).exists()
    else:
        assert ended.returncode == 0, ended.stderr
        assert len(json.loads(ended.stdout)["layers"]) == 21
        duotone.quantize(model, tmp_path / "alone", calibration=(str(text_file),), samples=64, seq_len=128, device="cpu")
        assert_same(tmp_path / "alone", tmp_path / "dpq")


class Thread(Ranks):
    """One of several threads in the place of processes: tensors lie where all can see them."""

    def __init__(self, rank: int, size: int, meeting: threading.Barrier, table: dict[int, Any]) -> None:
        super().__init__(rank, size)
        self._meeting, self._table = meeting, table

    def _all(self, value: Any) -> list[Any]:
        self._table[self.rank] = value
        self._meeting.wait(60)
        found = [self._table[rank] for rank in range(self.size)]
        self._meeting.wait(60)
        return found

    def sum_(self, *tensors: Tensor) -> None:
        """In rank's order."""
        for tensor, every in zip(tensors, zip(*self._all([t.clone() for t in tensors]), strict=True), strict=True):
            tensor.copy_(torch.stack(every).sum(0))

    def whole(self, parts: Sequence[Tensor], shares: Sequence[Sequence[slice]]) -> list[Tensor]:
        """Rows in rank's order."""
        del shares
        return [torch.cat(every) for every in zip(*self._all(list(parts)), strict=True)]


def solved(ranks: Ranks, config: QuantizeConfig, rows: Sequence[int], stream: bool) -> tuple[Any, list[Any]]:
    """A group of linears of random weights under drifted statistics: the quantized weights, and the reports."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    x_MK, columns = normal(600, 96) @ normal(96, 96), 96
    drift = normal(600, rows[0] if stream else columns).T @ x_MK / 6000
    known: dict[str, Any] = {"stream_target": drift} if stream else {"input_drift": drift}
    statistics = Statistics(x_MK.T @ x_MK / 600, 600, **known)
    report = QuantizeReport("", "", config, None)
    group = tuple(f"l{i}" for i in range(len(rows)))
    facts = {"config": config, "shards": staticmethod(lambda _: 1), "schemes": dict.fromkeys(group, config.scheme)}
    plan: Any = type("Plan", (), facts)
    run = Run(plan, torch.device("cpu"), torch.float32, Phases(), report, ranks)
    weights = {f"l{i}.weight": normal(count, columns) for i, count in enumerate(rows)}
    return solve_group(run, group, weights, statistics), report.layers


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("method", ["rtn", "gptq", "dpq-paper", "dpq"])
@pytest.mark.parametrize(("rows", "stream"), [((40, 24, 1), False), ((41,), True)], ids=["readers", "writer"])
def test_rows_are_independent(target: str, method: str, rows: tuple[int, ...], stream: bool) -> None:
    """Three that share a group's rows find what one finds, whichever rows the drift belongs to, and all have all of it."""
    for symmetric in (True, False):
        config = QuantizeConfig(method=method, target=target, group_size=32, symmetric=symmetric)
        expected, reports = solved(ALONE, config, rows, stream)
        meeting, table, found = threading.Barrier(3), {}, {}

        def work(rank: int, config=config, meeting=meeting, table=table, found=found) -> None:
            found[rank] = solved(Thread(rank, 3, meeting, table), config, rows, stream)

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for weights, told in found.values():
            assert weights.keys() == expected.keys()
            for layer, weight in weights.items():
                assert same(weight, expected[layer]), layer
            for one, other in zip(told, reports, strict=True):
                assert one.output_error == pytest.approx(other.output_error, rel=1e-6)
                assert one.weight_error == pytest.approx(other.weight_error, rel=1e-6)
                assert (one.layer, one.method, one.tokens, one.damping_frac) == (
                    other.layer,
                    other.method,
                    other.tokens,
                    other.damping_frac,
                )


def same(one: QuantizedWeight, other: QuantizedWeight) -> bool:
    """All but a code or two in ten thousand, which float32 rounds the other way."""
    zero = one.zero_point is None or (other.zero_point is not None and torch.equal(one.zero_point, other.zero_point))
    scales = torch.equal(one.group_scale, other.group_scale) and torch.equal(one.outer_scale, other.outer_scale)
    return zero and scales and torch.equal(one.codes, other.codes)


def test_shares() -> None:
    """Rows are cut evenly and in order; where a tensor has one outer scale whole linears go to whoever has least."""
    three = Ranks(0, 3)
    assert [(s.start, s.stop) for s in three.shares(8)] == [(0, 2), (2, 5), (5, 8)]
    assert row_shares([8], Scheme(HOPPER), three) == [three.shares(8)]
    gaudi = row_shares([4, 16, 4], Scheme(TARGETS["gaudi"]), Ranks(0, 2))
    owners = [[i for i, share in enumerate(shares) if share.stop > share.start] for shares in gaudi]
    assert owners == [[1], [0], [1]]
