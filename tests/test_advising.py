"""`duotone advise`: figures against counting by hand, what is worth a word, and what the quantizing run says of the same."""

import dataclasses
import json
import math
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import duotone
from duotone.advice import RUN, advice_before, chance_divergence, divergence, overlap, repeated_share
from duotone.advising import _watched, advise
from duotone.calibrate.data import TokenWindows, draw_windows
from duotone.calibrate.sources import PLAIN, TEMPLATE, TURNS
from duotone.checkpoint.source import open_source
from duotone.errors import DuotoneError
from duotone.models.tokenizer import load_tokenizer
from duotone.plan import make_plan
from duotone.runtime.load import load
from duotone.settings import QuantizeConfig
from tests.models.test_encoders import save_encoder
from tests.test_cli import invoke

ModelMaker = Callable[..., Path]
TOKENS = st.lists(st.lists(st.integers(0, 1), min_size=RUN + 2, max_size=RUN + 2), min_size=1, max_size=6)


def runs_of(windows: list[list[int]]) -> list[tuple[int, ...]]:
    return [tuple(window[i : i + RUN]) for window in windows for i in range(len(window) - RUN + 1)]


@given(TOKENS, TOKENS)
def test_runs_by_counting(calibration: list[list[int]], text: list[list[int]]) -> None:
    """Repetitions and what two texts have in common, with sets of tuples."""
    ours, theirs = runs_of(calibration), runs_of(text)
    assert repeated_share(torch.tensor(calibration)) == pytest.approx(1 - len(set(ours)) / len(ours))
    found = overlap(torch.tensor(calibration), torch.tensor(text))
    assert found == pytest.approx(sum(run in set(ours) for run in theirs) / len(theirs))


def test_windows_shorter_than_a_run() -> None:
    """Have none."""
    assert repeated_share(torch.zeros(3, RUN - 1, dtype=torch.int64)) == 0


@given(st.lists(st.integers(0, 5), min_size=1), st.lists(st.integers(0, 5), min_size=1))
def test_divergence_by_definition(one: list[int], other: list[int]) -> None:
    """Half of each text's relative entropy to their mean, in bits; symmetric, from 0 to 1."""
    p, q = ({token: count / len(text) for token, count in Counter(text).items()} for text in (one, other))
    middle = {token: (p.get(token, 0) + q.get(token, 0)) / 2 for token in p | q}
    meant = sum(share * math.log2(share / middle[token]) for text in (p, q) for token, share in text.items()) / 2
    found = divergence(torch.tensor([one]), torch.tensor([other]), 6)
    assert found == pytest.approx(meant, abs=1e-12) and -1e-12 < found < 1 + 1e-12
    assert found == pytest.approx(divergence(torch.tensor([other]), torch.tensor([one]), 6))
    assert divergence(torch.tensor([one]), torch.tensor([one]), 6) == 0
    if not p.keys() & q.keys():
        assert found == pytest.approx(1)


@pytest.fixture(scope="module")
def varied(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two texts of random letters, which have as good as nothing in common but the letters."""
    folder, letters = tmp_path_factory.mktemp("varied"), random.Random(0)
    for name in ("a.txt", "b.txt"):
        (folder / name).write_text("".join(letters.choices("abcdefgh \n", k=20_000)))
    return folder / "a.txt", folder / "b.txt"


def test_short_texts_diverge_by_chance() -> None:
    """Two draws from one text, few tokens of many, differ as their windows dealt out anew do; texts of two kinds more."""
    draw = torch.Generator().manual_seed(0)
    one, other = (torch.randint(0, 5000, (10, 64), generator=draw) for _ in range(2))
    assert divergence(one, other, 5000) > 0.5
    assert divergence(one, other, 5000) == pytest.approx(chance_divergence(one, other, 5000, 0), abs=0.05)
    far = divergence(one % 100, other % 100 + 100, 5000) - chance_divergence(one % 100, other % 100 + 100, 5000, 0)
    assert far > 0.5


@pytest.mark.parametrize("samples", [1, 17, 40])
def test_few_tokens(tiny_model: ModelMaker, varied: tuple[Path, Path], samples: int) -> None:
    """Tokens for each input of the widest linear, 256 here; the number of windows it names is enough, one less is not."""
    folder = tiny_model()
    plan, tokenizer = make_plan(open_source(folder), QuantizeConfig()), load_tokenizer(folder)
    (found,) = advice_before(plan, draw_windows(tokenizer, [str(varied[0])], 64, samples, 0))
    assert found.about == "few tokens" and found.number == 64 * samples / 256 and "down_proj" in found.sentence
    named = int(found.sentence.rpartition("--samples ")[2])
    enough, lacking = (draw_windows(tokenizer, [str(varied[0])], 64, count, 0) for count in (named, named - 1))
    assert advice_before(plan, enough) == [] and [one.about for one in advice_before(plan, lacking)] == ["few tokens"]
    rtn = make_plan(open_source(folder), QuantizeConfig(method="rtn"))
    assert advice_before(rtn, lacking) == []


@pytest.mark.parametrize(
    ("rendering", "chats", "about"),
    [
        (((PLAIN,), (PLAIN,)), True, ["no conversations"]),
        (((PLAIN,), (TEMPLATE, PLAIN)), True, []),
        (((PLAIN,), (PLAIN,)), False, []),
        (((PLAIN,), (TURNS,)), False, ["no chat template"]),
    ],
)
def test_conversations(tiny_model: ModelMaker, rendering: tuple[tuple[str, ...], ...], chats: bool, about: list[str]) -> None:
    """What a model that chats is calibrated on, and conversations for one that does not."""
    tokens = torch.randint(0, 256, (100, 64), generator=torch.Generator().manual_seed(0))
    windows = TokenWindows(tokens, ("a", "b"), "", 0, counts=(60, 40), rendering=rendering, chats=chats)
    assert [one.about for one in advice_before(make_plan(open_source(tiny_model()), QuantizeConfig()), windows)] == about


def test_repetitions(tiny_model: ModelMaker) -> None:
    """The same windows again and again."""
    tokens = torch.randint(0, 256, (20, 64), generator=torch.Generator().manual_seed(0)).repeat(5, 1)
    windows = TokenWindows(tokens, ("a",), "", 0, counts=(100,), rendering=((PLAIN,),))
    (found,) = advice_before(make_plan(open_source(tiny_model()), QuantizeConfig()), windows)
    assert found.about == "repeats itself" and found.number == pytest.approx(0.8) and "80 %" in found.sentence


def test_figures_are_the_evaluator_s(tiny_model: ModelMaker, text_file: Path, tmp_path: Path) -> None:
    """Perplexity as `eval` has it where all windows are read; the same text overlaps wholly; exit code 0, JSON and table."""
    folder = tiny_model(initializer_range=0.2)
    digits = tmp_path / "digits.txt"
    digits.write_text(" ".join(str(i * i) for i in range(2000)))
    mixture, part = f"{text_file}:0.75,{digits}:0.25", tmp_path / "part.txt"
    part.write_text(text_file.read_text()[:5000])
    texts = ("--calibration", mixture, "--text", part)
    asked = ("advise", folder, *texts, "--samples", 80, "--seq-len", 64, "--device", "cpu")
    found = invoke(*asked, "--read", 10_000, "--json").json()
    fox, numbers = found["calibration"]
    assert (fox["text"], fox["windows"], fox["read"]) == (f"{text_file.name}:0.75", 60, 60) and numbers["windows"] == 20
    (other,) = found["text"]
    evaluated = duotone.evaluate(folder, [str(part)], seq_len=64, device="cpu")
    assert other["perplexity"] == pytest.approx(evaluated.perplexity, rel=1e-6)
    nll = 0.75 * math.log(fox["perplexity"]) + 0.25 * math.log(numbers["perplexity"])
    assert found["perplexity_ratio"] == pytest.approx(math.exp(nll) / other["perplexity"])
    assert found["tokens_an_input"] == 80 * 64 / 256 and 0.05 < found["overlap"] < 1 and 0 < found["divergence"] < 1
    assert "overlaps" in [one["about"] for one in found["advice"]]
    shown = invoke(*asked, "--read", 2)
    assert shown.code == 0 and "overlaps: " in shown.out and f"calibration: {digits.name}:0.25 (plain text)" in shown.out


def test_nothing_to_advise(tiny_model: ModelMaker, varied: tuple[Path, Path]) -> None:
    """Enough of the same kind, none of it the same: said so."""
    texts = ("--calibration", varied[0], "--text", varied[1])
    found = invoke("advise", tiny_model(), *texts, "--samples", 160, "--seq-len", 64, "--device", "cpu", "--read", 8)
    assert found.code == 0 and "nothing to advise" in found.out


def test_idle_inputs_are_seen_before_and_after(tiny_model: ModelMaker, text_file: Path, tmp_path: Path) -> None:
    """Channels that a norm puts to zero: their share is found by `advise`, and noted by the run that was calibrated so."""
    folder = shutil.copytree(tiny_model(), tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.input_layernorm.weight"][:32] = 0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = QuantizeConfig(calibration=(str(text_file),), samples=8, seq_len=64, device="cpu", method="gptq")
    found = advise(folder, config, read=4)
    assert found.idle == {"model.layers.1.self_attn.q_proj": 32}
    idle = next(one for one in found.advice if one.about == "idle inputs")
    assert idle.number == 0.25 and "model.layers.1.self_attn.q_proj with 25 %" in idle.sentence
    report = duotone.quantize(folder, tmp_path / "out", **dataclasses.asdict(config))
    noted = [note for note in report.notes if note.startswith("linears with inputs that were zero")]
    assert len(noted) == 1 and ": 3, most so" in noted[0]
    assert any(note.startswith("512 calibration tokens are 2.0 for each of the 256 inputs") for note in report.notes)
    assert noted[0] in json.loads((tmp_path / "out" / "duotone.json").read_text())["notes"]


def test_tokens_of_experts(tiny_model: ModelMaker, text_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each token goes to so many experts as the router chooses; those with too few are counted, for all windows."""
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "decoder_sparse_step": 1, "head_dim": 32}
    folder = tiny_model("qwen3_moe", **sizes)
    windows = draw_windows(load_tokenizer(folder), [str(text_file)], 64, 8, 0)
    model, plan = load(folder, torch.float32, "cpu"), make_plan(open_source(folder), QuantizeConfig(group_size=32))
    with _watched(model, plan) as watch, torch.no_grad():
        model(windows.tokens)
    assert [int(counts.sum()) for counts in watch.routed.values()] == [2 * 8 * 64] * 2
    config = QuantizeConfig(calibration=(str(text_file),), samples=8, seq_len=64, device="cpu", group_size=32)
    lowest = min(int(counts.min()) for counts in watch.routed.values())
    for few, starved in ((lowest, 0), (lowest + 1, 1), (10**6, 8)):
        monkeypatch.setattr("duotone.advising.FEW_TOKENS", few)
        found = advise(folder, config)
        assert (found.experts, found.starved) == (8, starved)
        assert [one.number for one in found.advice if one.about == "starved experts"] == [starved] * bool(starved)


def test_what_a_model_knows_by_heart(shared: Path) -> None:
    """wiki-6m has parts of its training text by heart, and none of stories that it never saw."""
    data = shared / "data"
    known, new = (
        advise(shared / "models" / "wiki-6m", QuantizeConfig(calibration=(str(text),), samples=64, seq_len=256, device="cpu"))
        for text in (data / "calibration" / "wiki.utf8", data / "tinystories" / "tinystories_val.txt")
    )
    assert [one.about for one in known.advice] == ["known by heart"] and known.calibration[0].by_heart > 0.02
    assert new.advice == [] and new.calibration[0].by_heart == 0


def test_refusals(tiny_model: ModelMaker, text_file: Path, tmp_path: Path) -> None:
    """One sentence each."""
    outcome = invoke("advise", tiny_model(), "--calibration", text_file, "--seq-len", 64, "--read", 1)
    assert outcome.code == 2 and "--read: found 1, expected at least 2 windows" in outcome.err
    with pytest.raises(DuotoneError, match=r"predicts no next token, .* for advising"):
        advise(save_encoder(tmp_path / "encoder"), QuantizeConfig(calibration=(str(text_file),), samples=4, seq_len=16))
