"""The short way through a decoder: taken where it applies, equal to the long way, left alone where it is not."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, DynamicCache, PreTrainedModel, pipeline
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import duotone
from duotone.kernels import native
from duotone.models.tokenizer import load_tokenizer
from duotone.runtime import attention, cache, decoder, stack
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
    """Whether a call went the short way."""
    calls: list[int] = []
    with monkeypatch.context() as patch:
        original = model.model._long_way
        patch.setattr(model.model, "_long_way", lambda *a, **k: calls.append(1) or original(*a, **k))
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
    assert not hasattr(load(checkpoint, torch.float32, "cpu").model, "_long_way")
    turned, tokens = load(checkpoint, device="cpu").float(), torch.arange(9)[None]
    assert torch.allclose(step(turned, tokens), step(long_way(checkpoint, monkeypatch).float(), tokens), atol=1e-4)


def test_a_trial_that_fails_changes_nothing(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer, a norm or a head that computes something else keeps its own code."""
    for module in (decoder, stack):
        monkeypatch.setattr(module, "close", lambda *_: False)
    model = load(checkpoint, device="cpu")
    ways = {getattr(module.forward, "func", None) for module in model.modules()}
    assert not ways & {decoder._norm, decoder.step, decoder._head} and not any(
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


def decode(model: PreTrainedModel, cache: DynamicCache, *tokens: int) -> Tensor:
    """Logits behind each of some tokens, one after the other."""
    with torch.no_grad():
        return torch.cat([model(torch.tensor([[t]]), past_key_values=cache, use_cache=True).logits[0] for t in tokens])


def test_a_cache_grows_as_it_would_by_concatenation(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it shows after many tokens, more than it had room for, is what the long way's cache shows."""
    monkeypatch.setattr(cache, "_ROOM", 3)
    short, long = load(checkpoint, device="cpu"), long_way(checkpoint, monkeypatch)
    caches = [DynamicCache(config=short.config) for _ in range(2)]
    found, meant = (decode(model, past, *range(20, 33)) for model, past in zip((short, long), caches, strict=True))
    assert float((found - meant).float().norm() / meant.float().norm()) < 0.03
    for mine, theirs in zip(caches[0].layers, caches[1].layers, strict=True):
        assert mine.keys.shape == theirs.keys.shape and mine.get_seq_length() == 13
        assert torch.allclose(mine.keys.float(), theirs.keys.float(), atol=0.1, rtol=0.1)
        assert torch.allclose(mine.values.float(), theirs.values.float(), atol=0.1, rtol=0.1)


def test_caches_that_share_their_past_do_not_write_into_one_another(checkpoint: Path) -> None:
    """A shallow copy, a deep one, one cropped and one of other sequences go on as if they were alone."""
    model = load(checkpoint, device="cpu")

    def begun() -> DynamicCache:
        cache = DynamicCache(config=model.config)
        decode(model, cache, 5, 6, 7)
        return cache

    meant = decode(model, begun(), 30, 31), decode(model, begun(), 40, 41)
    first = begun()
    second = DynamicCache(config=model.config)
    for mine, theirs in zip(second.layers, first.layers, strict=True):
        mine.__dict__.update(theirs.__dict__)  # the same tensors, and the same room behind them
    third = copy.deepcopy(first)
    assert torch.equal(decode(model, first, 30, 31), meant[0])
    assert torch.equal(decode(model, second, 40, 41), meant[1])
    assert torch.equal(decode(model, third, 40, 41), meant[1])
    first.crop(-2)
    assert first.get_seq_length() == 3 and torch.equal(decode(model, first, 40, 41), meant[1])
    first.crop(-2)
    first.batch_repeat_interleave(2)
    with torch.no_grad():
        both = model(torch.tensor([[30], [40]]), past_key_values=first, use_cache=True).logits
    assert torch.equal(both[:, 0], torch.stack((meant[0][0], meant[1][0])))


def test_beam_search_reorders_caches(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beams copy one another's past; the text is that of the long way."""
    texts = [
        model.generate(torch.arange(20, 27)[None], num_beams=3, max_new_tokens=9, do_sample=False, pad_token_id=0)
        for model in (load(checkpoint, device="cpu"), long_way(checkpoint, monkeypatch))
    ]
    assert torch.equal(*texts)


def test_a_cache_begun_in_inference_mode_goes_on_outside(checkpoint: Path) -> None:
    """Tensors made there may not be written elsewhere: the room moves."""
    model, tokens = load(checkpoint, device="cpu"), (5, 6, 7)
    meant = decode(model, DynamicCache(config=model.config), *tokens, 8)[3:]
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        decode(model, cache, *tokens)
    assert torch.equal(decode(model, cache, 8), meant)


def test_who_listens_or_replaces_is_heard(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hook on a module inside a layer is called, an adapter in a linear's place is used, gradients are kept."""
    model, heard = load(checkpoint, device="cpu"), []
    hook = model.model.layers[0].mlp.down_proj.register_forward_hook(lambda *_: heard.append(1))
    plain = step(model, torch.arange(9)[None])
    assert len(heard) == 2
    hook.remove()

    class Doubled(torch.nn.Module):
        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) * 2

    twin = long_way(checkpoint, monkeypatch)
    for each in (model, twin):
        each.model.layers[1].self_attn.o_proj = Doubled(each.model.layers[1].self_attn.o_proj)
    found, meant = step(model, torch.arange(9)[None]).float(), step(twin, torch.arange(9)[None]).float()
    assert float((found - meant).norm() / meant.norm()) < 0.02 and not torch.equal(found, plain.float())
    past = model(torch.arange(8)[None], use_cache=True).past_key_values
    x = model.model.embed_tokens(torch.tensor([[8]])).detach().requires_grad_()
    assert model(inputs_embeds=x, past_key_values=past).logits.requires_grad


def test_attentions_are_returned_to_who_asks(checkpoint: Path) -> None:
    """With an implementation that has them; hidden states too."""
    model = load(checkpoint, device="cpu")
    past = model(torch.arange(8)[None], use_cache=True).past_key_values
    model.set_attn_implementation("eager")
    with torch.no_grad():
        asked = model(torch.tensor([[8]]), past_key_values=past, output_attentions=True, output_hidden_states=True)
    assert asked.attentions[0].shape[-2:] == (1, 9) and len(asked.hidden_states) == len(model.model.layers) + 1


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
