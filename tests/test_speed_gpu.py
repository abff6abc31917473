"""`duotone bench gpu` from end to end, through Triton's interpreter: every part, every kind of row, and what it leaves out.

Times mean nothing here. What is computed does: a model of each form of linears says what transformers' own says.
"""

import dataclasses
import io
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from duotone.errors import DuotoneError, gist
from duotone.kernels.gpu import backend
from duotone.qweight import dequantize
from duotone.speed_gpu import forms, goals, linears, run, tables, throughput, tiles
from duotone.speed_gpu.budget import Budget, Deadline
from duotone.speed_gpu.clock import Clock
from duotone.speed_gpu.decoder import Between, Decoder
from duotone.speed_gpu.quantizer import random_checkpoint
from duotone.speed_gpu.sizes import LLAMA_8B, LLAMA_70B, Plan, Sizes
from duotone.speed_gpu.steps import DECODE, PREFILL, Stage, Step
from duotone.speed_gpu.tables import gpu_tables
from duotone.speed_gpu.throughput import seconds_at
from tests.test_cli import invoke
from tests.test_speed import COLUMNS

pytest.importorskip("triton", reason="needs the package triton (the dev extra brings it on Linux)")

from duotone.kernels.gpu import launch, trial

#: The interpreter computes with numpy, which warns of NaN and infinity.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
#: Linears of 256x128, 128x128, 256x128 and 128x128.
TINY = Sizes("tiny", 128, 128, 2, 4, 2, 32, 48)
ONE_LAYER = dataclasses.replace(TINY, layers=1)
SMALL = Plan(
    TINY, TINY, ONE_LAYER, dataclasses.replace(ONE_LAYER, name="tiny that sees"), tokens=(1,), batches=(1,), contexts=(2, 5),
    goal_context=3, prompts=(1, 2), outputs=(2,), image_tokens=1, blocks=1, windows=4, window_tokens=32, rounds=1,
    out_of_cache=2**12, read=2**12, peak_size=64,
)  # fmt: skip
PARTS = tuple(run.SHARES)


def fails(_: object) -> Any:
    raise ValueError("no kernel for this\nand more")


#: In the place of other people's packages: one that is not there, one that cannot hold the weight, one that cannot multiply.
STRANGERS = (
    forms.Form("absent", fails, 4, package="no_such_package"),
    forms.Form("unable", fails, 4),
    forms.Form("broken", lambda _: fails, 4),
    forms.Form("good", forms._bf16, 16),
)


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command's GPU is this CPU where there is none, its sizes tiny; the trial of the kernels is test_gpu.py's."""
    monkeypatch.setattr(backend, "refuses", lambda *_: None)
    monkeypatch.setattr(trial, "fault", lambda *_: None)
    monkeypatch.setattr(run, "DEVICE", DEVICE)
    monkeypatch.setattr(run, "FULL", SMALL)
    monkeypatch.setattr(linears, "PEERS", STRANGERS)
    monkeypatch.setattr(linears, "_CHECKED", (2,))
    monkeypatch.setattr(throughput, "OWN", (forms.BF16, forms.INT4))  # the interpreter has enough to do in the other parts


def of(rows: list[dict], **facts: object) -> list[dict]:
    return [row for row in rows if all(row.get(name) == value for name, value in facts.items())]


@pytest.mark.usefixtures("interpreted")
def test_everything_in_one_command(tmp_path: Path) -> None:
    """Each part with its rows, in the file as they were told; four forms everywhere; strangers with their reasons."""
    result = invoke("bench", "gpu", "--out", str(tmp_path / "records.jsonl"), "--rounds", "1", "--json")
    assert result.code == 0, result.err
    rows = json.loads(result.out)
    assert [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()] == rows
    common = {"device", "part", "kind", "unmeasured", "commit", "date", "machine", "threads", "versions", "seed"}
    assert all(row.keys() >= common for row in rows) and len({row["date"] for row in rows}) == 1
    assert [row["part"] for row in of(rows, kind="time")] == list(PARTS) and rows[-1]["kind"] == "whole"
    assert {row["kind"] for row in rows} == {
        "ceilings", "check", "linear", "decode", "prefill", "throughput", "quantizer", "time", "whole"
    }  # fmt: skip
    names = [form.name for form in forms.OWN]
    for part in ("linears-8b", "linears-70b"):
        measured = of(rows, part=part, kind="linear")
        assert [row["kernel"] for row in measured] == [*names, forms.FP8_FAST.name] * 4 and not any(
            row["unmeasured"] for row in measured
        )
        assert all(row.keys() >= COLUMNS and 0 < row["ms_min"] <= row["ms"] for row in measured)
        assert all(set(row["times_as_fast_as"]) == {form.name for form in forms.ALONE} - {row["kernel"]} for row in measured)
    peers = of(rows, part="peers", kind="linear")
    assert [row["unmeasured"] for row in of(peers, kernel="absent")] == ["the package no_such_package is not installed"]
    assert len(of(peers, kernel="unable", unmeasured="ValueError: no kernel for this")) == 2 * 2
    assert len(of(peers, kernel="broken", unmeasured="ValueError: no kernel for this")) == 2 * 4
    assert len(of(peers, kernel="good", unmeasured=None)) == len(of(peers, kernel=forms.OURS.name)) == 2 * 4
    assert len(of(rows, part="correctness", kind="check", agrees=True)) == 4 + 4
    for part, kernels, each in (("end-to-end", names, (1, 1)), ("throughput", (names[1], names[3]), (4, 4))):
        for kernel in kernels:
            steps = of(rows, part=part, kernel=kernel, unmeasured=None)
            found = [of(steps, kind=kind) for kind in (DECODE, PREFILL)]
            assert tuple(map(len, found)) == each and all(row["kv_bytes"] > 0 for row in (*found[0], *found[1]))
    grid = of(rows, kind="throughput")
    assert len(grid) == 2 * 2 * 2 and not any(row["unmeasured"] for row in grid)
    assert all(row["kv_bytes"] == 2 * row["kv_bytes_fp8"] and "computed" in row["how"] for row in grid)
    (quantizer,) = of(rows, kind="quantizer")
    assert quantizer["seconds"] > 0 and quantizer["tokens"] == 4 * 32
    judged = {verdict.goal.title for verdict in goals.judge(rows) if verdict.worst is not None}
    screen = Console(width=250, file=io.StringIO(), record=True)
    screen.print(gpu_tables(rows))
    shown = screen.export_text()
    assert all(name in shown for name in (*names, "tiny that sees", "the whole command", "no_such_package", "this is it"))
    assert {"up to 16 tokens, as fast as FP8", "a model writing one text, as fast as BF16", "the whole command"} <= judged


@pytest.mark.usefixtures("interpreted")
def test_what_only_the_quantizer_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing package of its own is a row's reason."""
    monkeypatch.setitem(sys.modules, "duotone.pipeline", None)
    rows = list(run.gpu_rows(run.GpuBench(only=("quantizer",), plan=SMALL)))
    assert [row["unmeasured"].split(":")[0] for row in of(rows, kind="quantizer")] == ["ModuleNotFoundError"]
    assert [row["kind"] for row in rows] == ["ceilings", "quantizer", "time"]


@pytest.mark.usefixtures("interpreted")
def test_no_time(tmp_path: Path) -> None:
    """Every piece still has a row, which says that there was none; and tables show it."""
    result = invoke("bench", "gpu", "--out", str(tmp_path / "records.jsonl"), "--minutes", "1e-9", "--rounds", "1", "--quiet")
    assert result.code == 0, result.err
    rows = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()]
    pieces = [row for row in rows if row["kind"] not in {"ceilings", "time", "whole"}]
    assert all(row["unmeasured"] for row in pieces) and "the 0 s of this part were over" in pieces[0]["unmeasured"]
    counts = {part: len(of(pieces, part=part)) for part in PARTS}
    assert counts == {
        "correctness": 4 + 4, "linears-8b": 4, "linears-70b": 4, "end-to-end": 4 * 2, "throughput": 2 * 2 * (4 + 2),
        "quantizer": 1, "peers": 1 + 2 * 4,
    }  # fmt: skip
    assert "unmeasured" in result.out and "--only" in result.out


@pytest.mark.usefixtures("interpreted")
def test_only_a_part() -> None:
    """Parts that were asked for have all of the time; the whole block of a model, and shapes, have no limit."""
    plan = dataclasses.replace(SMALL, whole=TINY)
    assert list(run.GpuBench(only=("tiles", "correctness")).parts) == ["correctness", "tiles"]
    for part, extrapolated in (("quantizer-full", None), ("quantizer", 2)):
        bench = run.GpuBench(only=(part,), minutes=1e-9 if part == "quantizer-full" else 9, plan=plan)
        (row,) = of(list(run.gpu_rows(bench)), kind="quantizer")
        assert row["unmeasured"] is None and row["blocks"] == 2 // (extrapolated or 1)
        meant = extrapolated and pytest.approx(row["seconds"] + row["seconds_a_block"])
        assert row["extrapolated_seconds"] == meant and ("extrapolated" in row["how"]) == bool(extrapolated)
        assert 0 < row["seconds_a_block"] < row["seconds"], "what comes once does not count for a block"
    bench = run.GpuBench(shapes=((48, 256),), minutes=1e-9, plan=dataclasses.replace(SMALL, tokens=(1, 65)))
    rows = list(run.gpu_rows(bench))
    assert [tuple(row["shape"]) for row in of(rows, kind="linear")] == [(48, 256)] * 10
    assert not any(row["unmeasured"] for row in rows) and not of(rows, kind="whole")


@pytest.mark.usefixtures("interpreted")
def test_a_wrong_product_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is no failure to measure: nothing is timed after it."""
    original = backend.linear
    monkeypatch.setattr(backend, "linear", lambda x, packed: original(x, packed).roll(1, -1))
    for bench in (run.GpuBench(only=("correctness",)), run.GpuBench(shapes=((48, 256),))):
        with pytest.raises(DuotoneError, match=r"^bench gpu: \d+x\d+ with [12] tokens: found other products than"):
            list(run.gpu_rows(bench))
    monkeypatch.setattr(trial, "fault", lambda *_: "a trial on cuda gave other FP8 weights than plain torch does")
    with pytest.raises(DuotoneError, match=r"^bench gpu: groups of 32: a trial on cuda gave other FP8 weights"):
        list(run.gpu_rows(run.GpuBench(only=("correctness",))))


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU, and this one has one")
def test_without_a_gpu(tmp_path: Path) -> None:
    """One sentence, exit code 2, no file."""
    result = invoke("bench", "gpu", "--out", str(tmp_path / "records.jsonl"))
    assert result.code == 2 and "bench gpu: found no NVIDIA GPU" in result.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        (("--shape", "40x128"), "--shape 40x128: expected NxK, N a multiple of 16"),
        (("--shape", "48x128", "--only", "peers"), "--shape: found --only beside it"),
        (("--only", "everything"), "--only: found 'everything', expected one of correctness, linears-8b"),
        (("--minutes", "0"), "--minutes: found 0, expected more than 0"),
        (("--minutes", "nan"), "--minutes: found nan, expected more than 0"),
        (("--tokens", "0"), "expected at least one round and one token"),
    ],
)
def test_wrong_options(asked: tuple[str, ...], told: str) -> None:
    """One sentence each, before any work."""
    result = invoke("bench", "gpu", *asked)
    assert result.code == 2 and told in result.err


def test_other_ways_to_multiply(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each tile and split gives the contract's products, and so do FP8 weights; one that fails has a row that says so."""
    monkeypatch.setattr(tiles, "_STAGES", (6,))
    monkeypatch.setattr(tiles, "_SPLITS", (1, 2))
    bench = linears.Bench(dataclasses.replace(SMALL, tile_tokens=(3, 65)), 0, DEVICE)
    original = launch.multiply_codes

    def fails_with_8_warps(*facts: Any) -> None:
        if facts[-2].tile.warps == 8 and facts[-2].tile.tokens == 16:
            raise RuntimeError("out of resource: shared memory")
        original(*facts)

    monkeypatch.setattr(launch, "multiply_codes", fails_with_8_warps)
    rows = list(tiles.tile_rows(bench, ((48, 1024),), Deadline(1e9, 1, lambda: 0)))
    few, many = of(rows, tokens=3), of(rows, tokens=65)
    assert len({row["way"] for row in few}) == len(few) == 3 * 2 + 1 and len(many) == 2
    assert [row["way"] for row in of(few, unmeasured="RuntimeError: out of resource: shared memory")] == [
        f"128 rows x 16 tokens, 8 warps, 6 stages, splits of {each} chunks" for each in (8, 4)
    ]
    measured = [row for row in rows if not row.get("unmeasured")]
    assert [row["times_as_fast_as_own"] for row in of(measured, is_own=True)] == [1, 1]
    assert all(row["times_as_fast_as_own"] > 0 and row["ms"] > 0 for row in measured)
    assert of(many, way=tiles.WRITTEN) and of(few, way=tiles.WRITTEN)
    lines = tables.tile_cells([{"unmeasured": None} | row for row in rows])
    assert [line[:2] for line in lines] == [("48 x 1024", "3"), ("48 x 1024", "65")]
    assert "rows x 16 tokens" in lines[0][4] and lines[1][4] == "-" and lines[1][6].endswith("times as fast")

    def wrong(*facts: Any) -> None:
        original(*facts)
        facts[3][2].neg_()

    monkeypatch.setattr(launch, "multiply_codes", wrong)
    with pytest.raises(DuotoneError, match=r"^bench gpu: 48x1024, 128 rows x 16 tokens.*: found other products than"):
        list(tiles.tile_rows(bench, ((48, 1024),), Deadline(1e9, 1, lambda: 0)))


def decoder(form: forms.Form, sizes: Sizes = TINY) -> Decoder:
    return Decoder.random(sizes, form, 128, Between(), DEVICE)


def as_transformers(model: Decoder) -> LlamaForCausalLM:
    """transformers' Llama with the weights of a BF16 decoder."""
    sizes = model.sizes
    config = LlamaConfig(
        vocab_size=sizes.vocabulary, hidden_size=sizes.hidden, intermediate_size=sizes.intermediate, rms_norm_eps=1e-5,
        num_hidden_layers=sizes.layers, num_attention_heads=sizes.heads, num_key_value_heads=sizes.kv_heads,
        head_dim=sizes.head_size, tie_word_embeddings=False, rope_parameters={"rope_type": "default", "rope_theta": 5e5},
    )  # fmt: skip
    whole = LlamaForCausalLM(config).bfloat16().to(DEVICE)
    weights: dict[str, Tensor] = {
        "model.embed_tokens.weight": model.table, "lm_head.weight": model.head, "model.norm.weight": model.norm
    }  # fmt: skip
    queries, keys = sizes.heads * sizes.head_size, sizes.kv_heads * sizes.head_size
    for i, layer in enumerate(model.layers):
        held = {name: linear.args[0] for name, linear in zip(sizes.linears(), layer.linears, strict=True)}
        apart = dict(zip("qkv", held["qkv"].split((queries, keys, keys)), strict=True))
        apart |= {"o": held["o"]}
        weights |= {f"model.layers.{i}.self_attn.{name}_proj.weight": value for name, value in apart.items()}
        mlp = dict(zip(("gate", "up"), held["gate_up"].chunk(2), strict=True)) | {"down": held["down"]}
        weights |= {f"model.layers.{i}.mlp.{name}_proj.weight": value for name, value in mlp.items()}
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"model.layers.{i}.{name}.weight"] = torch.ones(sizes.hidden).bfloat16()
    whole.load_state_dict(weights)
    return whole


def near(found: Tensor, meant: Tensor, share: float) -> bool:
    return bool((found.float() - meant.float()).norm() < share * meant.float().norm())


def test_the_decoder_is_a_llama() -> None:
    """Its prompt and its steps say what transformers' model with the same weights says; images are embeddings."""
    model = decoder(forms.BF16)
    whole, tokens = as_transformers(model), torch.arange(14, device=DEVICE).view(2, 7) % 48
    with torch.no_grad():
        meant = whole(tokens).logits
        cache = model.cache(2, 7)
        assert near(model.logits(model.embedded(tokens[:, :5]), cache, 0), meant[:, 4], 0.02)
        for place in (5, 6):
            found = model.logits(model.embedded(tokens[:, place : place + 1]), cache, place)
            assert near(found, meant[:, place], 0.02)
        assert not near(model.logits(model.embedded(tokens[:, 6:]), model.cache(2, 7), 6), meant[:, 6], 0.02)  # nothing cached
        assert torch.equal(model.next_tokens(model.embedded(tokens), model.cache(2, 7), 0), meant[:, 6].argmax(-1))


@pytest.mark.parametrize("form", [forms.OURS, forms.FP8, forms.INT4], ids=lambda form: form.name)
def test_forms_are_of_the_same_model(form: forms.Form) -> None:
    """Each is near the one in BF16, as near as FP8 allows, in weights or activations; their bytes are what they hold."""
    tokens = torch.arange(10, device=DEVICE).view(2, 5)
    with torch.no_grad():
        meant, found = (
            model.logits(model.embedded(tokens), model.cache(2, 5), 0) for model in (decoder(forms.BF16), decoder(form))
        )
    assert near(found, meant, 0.1) and not torch.equal(found, meant)
    wide = forms.BF16.nbytes((4096, 4096), 128)
    assert 4096 * 4096 / 2 < forms.OURS.nbytes((4096, 4096), 128) < forms.INT4.nbytes((4096, 4096), 128) < wide / 3.7
    weight = forms.random_weight((64, 256), 128, DEVICE, 0)
    held = forms._int4(weight)
    exact = (weight.codes.float() - 8) * forms._real_scale(weight).float().repeat_interleave(128, 1)
    assert near(held(torch.eye(256, device=DEVICE).bfloat16()).T, exact, 0.005)
    assert held.args[0].nbytes + held.args[1].nbytes == forms.INT4.nbytes((64, 256), 128)


def test_layers_have_memory_of_their_own() -> None:
    """Copies, since a weight that two layers share would be found in a cache the second time."""
    for form in forms.OWN:
        model = decoder(form)
        places = [layer.linears[3].args[0] for layer in model.layers]
        tensors = [getattr(place, "codes", place) for place in places]
        assert len({tensor.data_ptr() for tensor in tensors}) == len(tensors) == 2


def test_random_weights_are_canonical() -> None:
    """They pass the checks of QuantizedWeight, whose sums over K keep the size of their inputs."""
    for shape in ((64, 128), (32, 4096)):
        weight = dequantize(forms.random_weight(shape, 128, DEVICE, 0)).cpu()
        assert 0.2 < float((torch.randn(8, shape[1], generator=torch.Generator().manual_seed(0)) @ weight.T).std()) < 5


def test_shapes_of_the_real_models() -> None:
    """Llama-3's linears, as a runtime merges them, and its cache."""
    assert tuple(LLAMA_8B.linears().values()) == ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))
    assert tuple(LLAMA_70B.linears().values()) == ((10240, 8192), (8192, 8192), (57344, 8192), (8192, 28672))
    assert LLAMA_8B.cache_bytes(2) == 131072


def test_a_checkpoint_for_the_quantizer(tmp_path: Path) -> None:
    """transformers loads it, its tokenizer knows bytes; where the disk is full, there is a sentence."""
    random_checkpoint(tmp_path / "random", TINY, 1, DEVICE)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "random")
    assert len(model.model.layers) == 1 and model.dtype == torch.bfloat16
    assert len(AutoTokenizer.from_pretrained(tmp_path / "random")("fox")["input_ids"]) == 3
    with pytest.raises(OSError, match=r"found \d+ GB of room, expected \d+ GB$"):
        random_checkpoint(tmp_path / "huge", dataclasses.replace(TINY, intermediate=2**40), 1, DEVICE)


class Ticking:
    """A clock that goes on by itself, a second each time it is asked, or more when told."""

    def __init__(self) -> None:
        self.time = 0.0

    def __call__(self) -> float:
        self.time += 1
        return self.time


def test_a_part_leaves_its_time_to_the_rest() -> None:
    """Shares are of what is left among the parts that are to come; a part that begins late has none."""
    clock = Ticking()
    budget = Budget(100, {"a": 1, "b": 1, "c": 2}, clock)  # until 101
    assert budget.part("a").seconds == pytest.approx(99 / 4)
    assert budget.part("b").seconds == pytest.approx(98 / 3)
    assert budget.part("c").seconds == pytest.approx(97)
    clock.time = 200
    late = budget.part("c")
    assert late.seconds == 0 and late.is_over()


def test_what_is_told_of_an_error() -> None:
    """Its first line; of a compiler's, which begins with a place in a program, what it found wrong there."""
    assert gist(ValueError()) == "ValueError: no message" and gist(ValueError("one\ntwo")) == "ValueError: one"
    place, inner = RuntimeError("at 3:4:\n    x = y\n    ^"), RuntimeError("at 1:2:\n    y\n    ^\nNameError('y')")
    assert gist(inner) == "RuntimeError: NameError('y')"
    place.__cause__, inner.__cause__ = inner, KeyError("z")
    assert gist(place) == "RuntimeError: 'z'"


def test_a_capture_that_fails_leaves_the_stream_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch does not, where the end of a capture is what fails; all that is timed after it would run elsewhere."""
    current = ["default"]

    @contextmanager
    def stream(wanted: str) -> Iterator[None]:
        before, current[0] = current[0], wanted
        try:
            yield
        finally:
            current[0] = before

    @contextmanager
    def graph(_: object) -> Iterator[None]:
        current[0] = "side"
        yield
        raise RuntimeError("capture failed")

    fakes = {"stream": stream, "graph": graph, "current_stream": lambda _: current[0], "synchronize": lambda _: None}
    for name, fake in (fakes | {"CUDAGraph": object}).items():
        monkeypatch.setattr(torch.cuda, name, fake)
    clock = Clock.__new__(Clock)
    clock.device = torch.device("cuda")
    with pytest.raises(RuntimeError, match="capture failed"):
        clock.prepared(lambda: None)
    assert current == ["default"]


def test_what_time_is_not_enough_for() -> None:
    """Attempts go on until time is over; then each has a row with the reason. A failure costs its own row only."""
    deadline = Deadline(3.5, 3.5, Ticking())

    def measure() -> Iterator[dict[str, Any]]:
        yield {"ms": 1}
        raise RuntimeError("out of memory\nTried to allocate")

    rows = [list(deadline.attempt({"n": n}, measure)) for n in range(5)]
    failed = {"unmeasured": "RuntimeError: out of memory"}
    assert rows[:3] == [[{"n": n, "ms": 1}, {"n": n} | failed] for n in range(3)]
    assert all(row == [{"n": n, "unmeasured": deadline.reason}] for n, row in enumerate(rows) if n > 2)


@given(
    st.floats(1e-4, 1), st.floats(0, 1e-3), st.lists(st.integers(1, 9000), min_size=2, max_size=5, unique=True),
    st.floats(1, 20000),
)  # fmt: skip
def test_steps_between_lengths(base: float, slope: float, lengths: list[int], asked: float) -> None:
    """A line is itself, between measured lengths and beyond them."""
    points = [(length, base + slope * length) for length in sorted(lengths)]
    assert seconds_at(points, asked) == pytest.approx(base + slope * asked, rel=1e-6)
    assert seconds_at(points[:1], points[0][0]) == points[0][1] and seconds_at([], 3) is None
    assert seconds_at(points[:1], points[0][0] + 1) is None


@pytest.mark.usefixtures("interpreted")
def test_a_cache_that_does_not_fit() -> None:
    """Is not tried: the row says how many bytes it would be, and the largest batch is arithmetic."""
    stage = Stage(linears.Bench(SMALL, 0, DEVICE))
    stage.memory = 2**20
    (row,) = stage.rows(TINY, forms.BF16, [Step(DECODE, 10**6, 10**4)], Deadline(1e9, 1, lambda: 0))
    assert row["unmeasured"].startswith("MemoryError: 5121 GB of cache beside 0 GB of weights: more than the 0 GB")
    assert stage.largest_batch(TINY, 2**19, 16, 2) == 2**19 // (16 * 2 * 2 * 2 * 32 * 2)
    assert stage.largest_batch(TINY, 2**21, 16, 2) == 0


def linear_row(shape: tuple[int, int], tokens: int, roofline: float, bf16: float, fp8: float, **more: Any) -> dict[str, Any]:
    return {
        "part": "linears-8b", "kind": "linear", "kernel": forms.OURS.name, "shape": list(shape), "tokens": tokens,
        "roofline_share": roofline, "times_as_fast_as": {forms.BF16.name: bf16, forms.FP8.name: fp8}, "unmeasured": None,
        "device": "H200", "date": "1",
    } | more  # fmt: skip


def judged(rows: list[dict[str, Any]]) -> dict[str, goals.Verdict]:
    return {f"{verdict.goal.title} {verdict.goal.wanted}": verdict for verdict in goals.judge(rows)}


def test_goals() -> None:
    """The worst case decides; one that was not measured leaves it open, unless another has already missed it."""
    assert {verdict.words for verdict in goals.judge([])} == {"unmeasured"}
    small, large = (4096, 4096), (28672, 4096)
    rows = [linear_row(small, 1, 0.71, 2.8, 1.5), linear_row(large, 16, 0.9, 2.9, 1.39), linear_row(small, 64, 0.1, 1, 1.21)]
    found = judged(rows)
    memory = found["up to 16 tokens, bytes of 4-bit weights a second beside what memory gives 0.7"]
    assert memory.met and memory.worst == ("8B, 4096x4096, 1 tokens", 0.71) and memory.words == "met"
    assert found["up to 16 tokens, as fast as BF16, linears below 50 million weights 2.75"].met
    assert found["up to 16 tokens, as fast as BF16, larger linears 3.0"].words == "not met"
    assert found["up to 16 tokens, as fast as FP8 1.4"].worst == ("8B, 28672x4096, 16 tokens", 1.39)
    assert found["64 tokens, as fast as FP8 1.2"].met and found["from 1024 tokens, as fast as FP8 0.9"].met is None
    cut = {"kernel": None, "unmeasured": "time was over", "times_as_fast_as": {}}
    found = judged([*rows, linear_row(large, 2, 0, 0, 0) | cut, linear_row(large, 64, 0, 0, 0) | cut])
    assert found["up to 16 tokens, bytes of 4-bit weights a second beside what memory gives 0.7"].words == (
        "in the 2 of 3 cases that were measured"
    )
    assert found["64 tokens, as fast as FP8 1.2"].met is None
    assert found["up to 16 tokens, as fast as FP8 1.4"].words == "not met"


def test_goals_of_whole_models() -> None:
    """Tokens a second beside BF16's at the same place; images and other parts do not count."""
    step = {"kind": "decode", "part": "end-to-end", "model": "8B", "batch": 1, "tokens": 9, "image_tokens": 0}
    speeds = [step | {"kernel": form.name, "tokens_per_second": speed} for form, speed in ((forms.OURS, 25), (forms.BF16, 10))]
    whole = {"kind": "whole", "part": "whole", "seconds": 500}
    found = judged([*speeds, speeds[0] | {"part": "throughput", "tokens_per_second": 1}])
    assert found["a model writing one text, as fast as BF16 2.5"].worst == ("8B, 9 tokens", 2.5)
    assert found["the whole command 480"].worst is None
    assert judged([whole])["the whole command 480"].words == "not met"
    assert judged([whole | {"seconds": 400}])["the whole command 480"].met
    grid = {"kind": "throughput", "part": "throughput", "model": "8B", "batch": 64, "prompt_tokens": 1, "new_tokens": 2}
    rows = [grid | {"image_tokens": 0, "kernel": name, "tokens_per_second": speed} for name, speed in (
        (forms.OURS.name, 1.5), (forms.BF16.name, 1.0))]  # fmt: skip
    found = judged(rows)
    assert found["tokens a second at batch 64, prompts included, as many as BF16 1.35"].met
    assert found["the same, the paper's 1.62"].words == "not met"


def test_the_newest_run_of_each_part() -> None:
    """A part measured again stands for itself; the other parts stay those of the run before."""
    rows = [{"device": "a", "part": part, "date": date} for date, part in (("1", "x"), ("1", "y"), ("2", "y"), ("2", "y"))]
    assert goals.newest([*rows, {"device": "b", "part": "x", "date": "0"}]) == {
        "a": [rows[0], *rows[2:]], "b": [{"device": "b", "part": "x", "date": "0"}]
    }  # fmt: skip


@pytest.mark.slow
def test_what_lies_between_linears_compiles() -> None:
    """In one graph each, for any number of tokens, as on a GPU; a compiler that fails is told of, and nothing runs by it."""
    between = Between.on(DEVICE, "aot_eager")
    assert between.how == "torch.compile, aot_eager"
    plain = decoder(forms.BF16)
    for batch, tokens in ((2, 5), (1, 1), (4, 1), (1, 7), (2, 2), (32, 1)):
        ids = torch.arange(batch * tokens, device=DEVICE).view(batch, tokens) % 48
        with torch.no_grad():
            meant, found = (
                model.logits(model.embedded(ids), model.cache(batch, tokens), 0)
                for model in (plain, dataclasses.replace(plain, between=between))
            )
        assert near(found, meant, 0.02)
    broken = Between.on(DEVICE, "no such compiler")
    assert broken.how.startswith("torch's ops one by one, since compiling failed: ") and broken.gate is Between().gate
