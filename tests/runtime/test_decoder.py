"""The short way through a decoder: taken where it applies, equal to the long way, left alone where it is not."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel, pipeline
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import duotone
from duotone.kernels import native
from duotone.models.tokenizer import load_tokenizer
from duotone.runtime import attention, decoder
from duotone.runtime.load import load

pytestmark = pytest.mark.skipif(not native.available(), reason=f"compiled ops: {native.unavailable()}")
ModelMaker = Callable[..., Path]


@pytest.fixture(scope="module", params=["llama", "qwen2", "qwen3"])
def checkpoint(request: pytest.FixtureRequest, tiny_model: ModelMaker, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Biases on q, k and v with qwen2, norms of queries and keys with qwen3."""
    out = tmp_path_factory.mktemp("decoder") / "out"
    duotone.quantize(tiny_model(request.param), out, method="rtn", device="cpu")
    return out


def long_way(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> PreTrainedModel:
    with monkeypatch.context() as patch:
        patch.setattr(decoder, "install", lambda *_: None)
        return load(checkpoint, device="cpu")


def took_short_way(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, call: Callable[[], object]) -> bool:
    """Whether the attention op was called."""
    calls: list[int] = []
    for module in model.modules():
        if hasattr(module, "k_proj"):
            original = module._long_way
            monkeypatch.setattr(module, "_long_way", lambda *a, original=original, **k: calls.append(1) or original(*a, **k))
    call()
    return not calls


def step(model: PreTrainedModel, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
    """Logits of one more token behind some others."""
    with torch.no_grad():
        past = model(tokens[:, :-1], attention_mask=None if mask is None else mask[:, :-1], use_cache=True).past_key_values
        return model(tokens[:, -1:], attention_mask=mask, past_key_values=past, use_cache=True).logits


def test_both_ways_agree(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits for one sequence and for three are those of the long way, up to BF16's roundings; greedy text is the same."""
    short, long = load(checkpoint, device="cpu"), long_way(checkpoint, monkeypatch)
    for batch in (1, 3):
        tokens = torch.randint(0, 250, (batch, 9), generator=torch.Generator().manual_seed(batch))
        found, meant = step(short, tokens).float(), step(long, tokens).float()
        assert float((found - meant).norm() / meant.norm()) < 0.02
    texts = [model.generate(tokens[:1], max_new_tokens=8, do_sample=False, pad_token_id=0) for model in (short, long)]
    assert torch.equal(*texts)


def test_where_it_applies(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of one token takes it; a step with padding does not, and is right too."""
    model = load(checkpoint, device="cpu")
    tokens = torch.randint(0, 250, (2, 9), generator=torch.Generator().manual_seed(0))
    past = model(tokens, use_cache=True).past_key_values
    assert took_short_way(model, monkeypatch, lambda: model(tokens[:, :1], past_key_values=past, use_cache=True))
    assert not took_short_way(model, monkeypatch, lambda: model(tokens[:, :2], past_key_values=past, use_cache=True))
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0
    alone = step(long_way(checkpoint, monkeypatch), tokens, mask)
    assert torch.allclose(step(model, tokens, mask).float(), alone.float(), atol=0.05)


def test_a_model_in_float32_goes_the_long_way(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loaded as float32, or turned into it afterwards."""
    assert not hasattr(load(checkpoint, torch.float32, "cpu").model.layers[0].self_attn, "_long_way")
    turned, tokens = load(checkpoint, device="cpu").float(), torch.arange(9)[None]
    assert torch.allclose(step(turned, tokens), step(long_way(checkpoint, monkeypatch).float(), tokens), atol=1e-4)


def test_a_trial_that_fails_changes_nothing(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An attention or a norm that computes something else keeps its own code."""
    monkeypatch.setattr(decoder, "_close", lambda *_: False)
    model = load(checkpoint, device="cpu")
    ways = {getattr(module.forward, "func", None) for module in model.modules()}
    assert not ways & {decoder._norm, decoder._attention} and not any(
        hasattr(module, "_long_way") for module in model.modules()
    )


def test_a_copy_is_a_model_of_its_own(checkpoint: Path) -> None:
    """`copy.deepcopy` and `pickle` give the same answers, from weights of their own."""
    model, tokens = load(checkpoint, device="cpu"), torch.arange(9)[None]
    before = step(model, tokens)
    twin = copy.deepcopy(model)
    assert torch.equal(step(pickle.loads(pickle.dumps(model)), tokens), before)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(step(twin, tokens), before) and not torch.equal(step(model, tokens), before)


def test_inference_mode(checkpoint: Path) -> None:
    """Tensors that do not count their changes give the same bits as those that do."""
    model, tokens = load(checkpoint, device="cpu"), torch.arange(9)[None]
    meant = model(tokens).logits, step(model, tokens)
    with torch.inference_mode():
        assert torch.equal(model(tokens).logits, meant[0]) and torch.equal(step(model, tokens), meant[1])


def test_an_attention_of_ones_own_is_used(checkpoint: Path) -> None:
    """Whoever sets another implementation gets it, in each step."""
    model, tokens, calls = load(checkpoint, device="cpu"), torch.arange(9)[None], []

    def mine(module: object, query: Tensor, *given: object, **options: object) -> tuple[Tensor, None]:
        calls.append(query.shape[2])
        return sdpa_attention_forward(module, query, *given, **options)

    AttentionInterface.register("mine", mine)
    model.set_attn_implementation("mine")
    step(model, tokens)
    assert calls == [8, 8, 1, 1]


def test_a_norm_in_float32_is_torchs(checkpoint: Path) -> None:
    """A weight turned to float32 among BF16 ones promotes as it would without us."""
    model = load(checkpoint, device="cpu")
    model.model.norm.weight.data = model.model.norm.weight.data.float()
    with torch.no_grad():
        assert model.model.norm(torch.ones(1, 2, model.config.hidden_size).bfloat16()).dtype == torch.float32


def test_pipelines_take_the_model(checkpoint: Path) -> None:
    """transformers' own text generation."""
    model, tokenizer = load(checkpoint, device="cpu"), load_tokenizer(checkpoint)
    write = pipeline("text-generation", model=model, tokenizer=tokenizer)
    text = write("The red fox", max_new_tokens=5, do_sample=False, pad_token_id=0)[0]["generated_text"]
    assert text.startswith("The red fox")


def test_attention_in_float32_is_nearer_to_the_exact_one(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where BF16 is emulated the model attends in float32; elsewhere it is left alone."""
    tokens = torch.randint(0, 250, (2, 40), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(attention, "is_better", lambda *_: True)
    wide = load(checkpoint, device="cpu")
    monkeypatch.setattr(attention, "is_better", lambda *_: False)
    narrow = load(checkpoint, device="cpu")
    assert wide.config._attn_implementation == attention.NAME and narrow.config._attn_implementation == "sdpa"
    with torch.no_grad():
        exact = load(checkpoint, torch.float32, "cpu")(tokens).logits
        errors = [float((model(tokens).logits.float() - exact).norm()) for model in (wide, narrow)]
    assert errors[0] < 1.05 * errors[1]
