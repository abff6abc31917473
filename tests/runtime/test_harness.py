"""lm-evaluation-harness takes our model as it takes any other."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import duotone
from duotone.models.tokenizer import load_tokenizer
from duotone.runtime.load import load

harness = pytest.importorskip("lm_eval", reason="lm-eval is not installed (duotone[eval])")


def test_likelihoods(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    """HFLM(pretrained=model): the log-likelihood of a continuation is what the model's own logits say."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    out = tmp_path / "out"
    duotone.quantize(tiny_model(), out, method="rtn", device="cpu")
    model, tokenizer = load(out, device="cpu"), load_tokenizer(out)
    context, continuation = "The red fox", " jumps over"
    asked = [Instance("loglikelihood", {}, (context, continuation), 0)]
    ((found, _),) = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1).loglikelihood(asked, disable_tqdm=True)
    before = len(tokenizer(context)["input_ids"])
    tokens = tokenizer(context + continuation, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logp = torch.log_softmax(model(tokens).logits[0].float(), -1)
    meant = sum(float(logp[i - 1, tokens[0, i]]) for i in range(before, tokens.shape[1]))
    assert found == pytest.approx(meant, rel=0.01)
