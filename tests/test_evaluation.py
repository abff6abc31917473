"""Evaluation against the figures computed the long way."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import duotone
from duotone.calibrate.data import draw_windows
from duotone.errors import DuotoneError
from duotone.evaluation import evaluate_windows
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
