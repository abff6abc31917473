"""Evaluation against the figures computed the long way."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import duotone
from duotone import evaluation
from duotone.calibrate.data import TokenWindows, draw_windows
from duotone.errors import DuotoneError
from duotone.evaluation import WindowScores, evaluate_windows, score_windows, standard_error, summarize
from duotone.models.tokenizer import load_tokenizer
from duotone.runtime.load import load

ModelMaker = Callable[..., Path]


def test_perplexity_and_bits_per_byte(tiny_model: ModelMaker, text_file: Path) -> None:
    """Token by token in float64: exp of the mean loss; bits over the bytes of the windows (one byte a token here)."""
    folder = tiny_model()
    windows = draw_windows(load_tokenizer(folder), [str(text_file)], 32, 5, seed=0)
    model = load(folder, torch.float32, "cpu")
    losses = []
    with torch.no_grad():
        for window in windows.tokens:
            logits = model(window[None]).logits[0].double()
            losses += [-math.log(torch.softmax(logits[t], -1)[window[t + 1]].item()) for t in range(31)]
    result = evaluate_windows(model, windows, None, torch.device("cpu"))
    assert result.tokens == len(losses) == 5 * 31
    assert windows.text_bytes == 5 * 31
    assert result.perplexity == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
    assert result.bits_per_byte == pytest.approx(sum(losses) / math.log(2) / (5 * 31), rel=1e-5)
    assert result.kl is None


def test_kl_against_the_definition(tiny_model: ModelMaker, text_file: Path) -> None:
    """KL(reference || model), agreement and standard error equal a float64 loop; a model is at distance 0 from itself."""
    folder, other = tiny_model(), tiny_model(initializer_range=0.3)
    windows = draw_windows(load_tokenizer(folder), [str(text_file)], 24, 6, seed=0)
    model, reference = load(other, torch.float32, "cpu"), load(folder, torch.float32, "cpu")
    per_window, agree = [], []
    with torch.no_grad():
        for window in windows.tokens:
            q = torch.softmax(reference(window[None]).logits[0, :-1].double(), -1)
            p = torch.softmax(model(window[None]).logits[0, :-1].double(), -1)
            per_window.append((q * (q.log() - p.log())).sum(-1).mean().item())
            agree.append((q.argmax(-1) == p.argmax(-1)).double().mean().item())
    result = evaluate_windows(model, windows, reference, torch.device("cpu"))
    assert result.kl == pytest.approx(sum(per_window) / 6, rel=1e-3) and result.kl > 1e-4
    assert result.kl_stderr == pytest.approx(torch.tensor(per_window).std().item() / math.sqrt(6), rel=1e-3)
    assert result.top1_agreement == pytest.approx(sum(agree) / 6, abs=1e-6)
    itself = evaluate_windows(reference, windows, load(folder, torch.float32, "cpu"), torch.device("cpu"))
    assert itself.kl == pytest.approx(0, abs=1e-7) and itself.top1_agreement == 1 and itself.nll_difference == 0


def test_summary_of_scores_is_the_evaluation(tiny_model: ModelMaker, text_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores window by window, in passes of two, summarized: what `evaluate_windows` says, with a reference and without."""
    monkeypatch.setattr(evaluation, "_BATCH_LOGITS", 2 * 260 * 24)
    folder, other = tiny_model(), tiny_model(initializer_range=0.3)
    windows = draw_windows(load_tokenizer(folder), [str(text_file)], 24, 5, seed=0)
    model, reference = load(other, torch.float32, "cpu"), load(folder, torch.float32, "cpu")
    told: list[tuple[int, int]] = []
    scores = score_windows(model, windows, reference, torch.device("cpu"), lambda *done: told.append(done))
    assert told == [(2, 5), (4, 5), (5, 5)]
    for values in (scores.nll, scores.kl, scores.agreement, scores.reference_nll):
        assert values is not None and values.shape == (5,) and values.dtype == torch.float64
    assert summarize(scores, windows) == evaluate_windows(model, windows, reference, torch.device("cpu"))
    alone = score_windows(model, windows, None, torch.device("cpu"))
    assert (alone.kl, alone.agreement, alone.reference_nll) == (None, None, None)
    assert torch.equal(alone.nll, scores.nll)
    assert summarize(alone, windows) == evaluate_windows(model, windows, None, torch.device("cpu"))
    assert torch.equal(score_windows(reference, windows, None, torch.device("cpu")).nll, scores.reference_nll)
    for n in range(5):  # a window's figures are its own
        one = dataclasses.replace(windows, tokens=windows.tokens[n : n + 1])
        single = score_windows(model, one, reference, torch.device("cpu"))
        assert single.nll[0] == pytest.approx(scores.nll[n].item(), rel=1e-5)
        assert single.kl is not None and single.kl[0] == pytest.approx(scores.kl[n].item(), rel=1e-3)


def test_summary_by_hand() -> None:
    """Three windows of four predicted tokens and 30 bytes."""
    windows = TokenWindows(torch.zeros(3, 5, dtype=torch.int64), ("text",), "", 30, ())
    nll, reference = torch.tensor([1.0, 2.0, 3.0]).double(), torch.tensor([1.0, 1.0, 2.5]).double()
    kl, agreement = torch.tensor([0.0, 0.3, 0.6]).double(), torch.tensor([1.0, 0.5, 0.75]).double()
    found = summarize(WindowScores(nll, kl, agreement, reference), windows)
    assert found.tokens == 12
    assert found.perplexity == pytest.approx(math.exp(2)) and found.reference_perplexity == pytest.approx(math.exp(1.5))
    assert found.bits_per_byte == pytest.approx(2 * 12 / math.log(2) / 30)
    assert found.kl == pytest.approx(0.3) and found.kl_stderr == pytest.approx(0.3 / math.sqrt(3))
    assert found.top1_agreement == pytest.approx(0.75)
    assert found.nll_difference == pytest.approx(0.5) and found.nll_difference_stderr == pytest.approx(0.5 / math.sqrt(3))
    single = summarize(WindowScores(nll[:1], kl[:1], agreement[:1], reference[:1]), windows)
    assert single.kl == 0 and single.kl_stderr is None and single.nll_difference_stderr is None


def test_standard_error() -> None:
    """sqrt(sum (x - mean)^2 / (n - 1) / n), in float64 whatever comes in; one value has no spread to tell."""
    values = [3.0, 4.0, 8.0, 1.0]
    expected = math.sqrt(sum((value - 4) ** 2 for value in values) / 3 / 4)
    assert standard_error(torch.tensor(values)) == pytest.approx(expected, rel=1e-12)
    assert standard_error(torch.tensor([True, False])) == pytest.approx(0.5)
    assert standard_error(torch.tensor([7.0])) is None and standard_error(torch.tensor([])) is None
    assert standard_error(torch.tensor([2.0, 2.0])) == 0


def test_other_vocabulary_is_refused(tiny_model: ModelMaker, text_file: Path) -> None:
    """A reference with another vocabulary cannot be compared with."""
    with pytest.raises(DuotoneError, match="vocabulary of 300, expected 260"):
        duotone.evaluate(
            tiny_model(), [str(text_file)], reference=tiny_model(vocab_size=300), seq_len=32, samples=2, device="cpu"
        )


def test_quantized_bundled_model_is_close(bundled: Path, tmp_path: Path) -> None:
    """On held-out text the bundled model keeps its perplexity within 10 % at 4 bits, and dpq is nearer to it than rtn."""
    text = [str(bundled / "evaluation.txt")]
    kl: dict[str, float] = {}
    for method in ("rtn", "dpq"):
        calibration = (str(bundled / "calibration.txt"),)
        duotone.quantize(
            bundled, tmp_path / method, method=method, calibration=calibration, samples=32, seq_len=256, device="cpu"
        )
        result = duotone.evaluate(tmp_path / method, text, reference=bundled, seq_len=256, samples=12, device="cpu")
        assert result.reference_perplexity is not None and result.kl is not None
        assert result.perplexity < 1.1 * result.reference_perplexity
        kl[method] = result.kl
    assert 0 < kl["dpq"] < kl["rtn"]
