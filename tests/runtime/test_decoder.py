"""The short way through a decoder: taken where it applies, equal to the long way, left alone where it is not."""

import copy
import gc
import pickle
import weakref
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


@pytest.fixture(scope="module", params=["llama", "mistral", "qwen2", "qwen3"])
def checkpoint(request: pytest.FixtureRequest, tiny_model: ModelMaker, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Biases on q, k and v with qwen2, norms of queries and keys with qwen3."""
    out = tmp_path_factory.mktemp("decoder") / "out"
    windows = {"sliding_window": None} if request.param == "mistral" else {}
    duotone.quantize(tiny_model(request.param, **windows), out, method="rtn", device="cpu")
    return out


@pytest.fixture(autouse=True)
def _wide_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same attention on every CPU, and in both ways: in float32, not as well as a processor's BF16 units can."""
    monkeypatch.setattr(attention, "is_better", lambda dtype, device: dtype == torch.bfloat16 and device.type == "cpu")


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


def _on_linear(model: PreTrainedModel, heard: Callable[..., None]) -> Callable[[], None]:
    return model.model.layers[0].mlp.down_proj.register_forward_hook(heard).remove


def _on_layer(model: PreTrainedModel, heard: Callable[..., None]) -> Callable[[], None]:
    return model.model.layers[1].register_forward_hook(heard).remove


def _everywhere(model: PreTrainedModel, heard: Callable[..., None]) -> Callable[[], None]:
    attention = model.model.layers[0].self_attn
    hook = torch.nn.modules.module.register_module_forward_hook(lambda module, *_: heard() if module is attention else None)
    return hook.remove


@pytest.mark.parametrize("listen", [_on_linear, _on_layer, _everywhere])
def test_who_listens_is_heard(checkpoint: Path, listen: Callable) -> None:
    """A hook on a linear, on a layer, on all modules is called in each step, and only while it is there."""
    model, heard = load(checkpoint, device="cpu"), []
    stop = listen(model, lambda *_: heard.append(1))
    step(model, torch.arange(9)[None])
    assert len(heard) == 2
    stop()
    plain = step(model, torch.arange(9)[None])
    assert len(heard) == 2 and torch.equal(plain, step(load(checkpoint, device="cpu"), torch.arange(9)[None]))


def test_who_replaces_a_part_is_asked(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An adapter in a linear's place, another layer, another forward: the short way is left for good, its weights are freed."""

    class Doubled(torch.nn.Module):
        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) * 2

    def adapt(model: PreTrainedModel) -> None:
        model.model.layers[1].self_attn.o_proj = Doubled(model.model.layers[1].self_attn.o_proj)

    def prune(model: PreTrainedModel) -> None:
        model.model.layers[0].mlp = model.model.layers[1].mlp

    def patch(model: PreTrainedModel) -> None:
        original = model.model.layers[0].self_attn.forward
        model.model.layers[0].self_attn.forward = lambda *a, **k: (original(*a, **k)[0] * 2, None)

    tokens = torch.arange(9)[None]
    for change in (adapt, prune, patch):
        model, twin = load(checkpoint, device="cpu"), long_way(checkpoint, monkeypatch)
        before = step(model, tokens)
        change(model), change(twin)
        found, meant = step(model, tokens).float(), step(twin, tokens).float()
        assert float((found - meant).norm() / meant.norm()) < 0.02 and not torch.equal(found, before.float())
        assert model.model.forward == model.model._long_way


def test_gradients_are_kept(checkpoint: Path) -> None:
    """Of what comes in, of a norm that is tuned, and of a bias."""
    model = load(checkpoint, device="cpu")
    with torch.no_grad():
        past = model(torch.arange(8)[None], use_cache=True).past_key_values
    x = model.model.embed_tokens(torch.tensor([[8]])).detach().requires_grad_()
    assert model(inputs_embeds=x, past_key_values=copy.deepcopy(past)).logits.requires_grad
    norm = model.model.layers[1].post_attention_layernorm.weight
    norm.requires_grad_()
    y = model.model.layers[1].post_attention_layernorm(torch.ones(1, 1, len(norm)).bfloat16())
    assert y.requires_grad
    heard: list[int] = []
    original = model.model._long_way
    model.model._long_way = lambda *a, **k: heard.append(1) or original(*a, **k)
    model(torch.tensor([[8]]), past_key_values=copy.deepcopy(past))
    assert heard


def test_what_asks_for_more_goes_the_long_way(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tuple, no cache back, a norm in another dtype: each as without us."""
    short, long, tokens = load(checkpoint, device="cpu"), long_way(checkpoint, monkeypatch), torch.tensor([[8]])
    answers = []
    for model in (short, long):
        with torch.no_grad():
            past = model(torch.arange(8)[None], use_cache=True).past_key_values
            row = model.model(tokens, past_key_values=copy.deepcopy(past), return_dict=False)
            kept = model(tokens, past_key_values=copy.deepcopy(past), use_cache=False).past_key_values
            model.model.layers[0].input_layernorm.weight.data = model.model.layers[0].input_layernorm.weight.data.float()
            wide = model.model(tokens, past_key_values=past).last_hidden_state
        answers.append((type(row), len(row), kept is None, wide.dtype))
    assert answers[0] == answers[1] and answers[0][0] is tuple


def test_moving_a_model_to_where_it_is_changes_nothing(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`.to("cpu")` and `.bfloat16()` leave it on the short way."""
    model, tokens = load(checkpoint, device="cpu").to("cpu").bfloat16(), torch.arange(9)[None]
    past = model(tokens, use_cache=True).past_key_values
    with torch.no_grad():
        assert took_short_way(model, monkeypatch, lambda: model(tokens[:, :1], past_key_values=past, use_cache=True))


def test_a_window_is_kept(tiny_model: ModelMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache that grows without end does not show a model with a window more than its window."""
    duotone.quantize(tiny_model("mistral", sliding_window=8), tmp_path / "out", method="rtn", device="cpu")
    steps = []
    for model in (load(tmp_path / "out", device="cpu"), long_way(tmp_path / "out", monkeypatch)):
        past = DynamicCache()
        with torch.no_grad():
            model(torch.arange(20)[None], past_key_values=past, use_cache=True)
        steps.append(decode(model, past, 30, 31).float())
    assert float((steps[0] - steps[1]).norm() / steps[1].norm()) < 0.02


def test_rooms_are_made_only_where_they_serve(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Padded batches make none; a long step drops them; they are freed with their cache, at once; none is pickled."""
    model, made = load(checkpoint, device="cpu"), []
    original = cache.Room.__init__
    monkeypatch.setattr(cache.Room, "__init__", lambda self, *given: made.append(1) or original(self, *given))
    tokens, mask = torch.arange(18).view(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0
    step(model, tokens, mask)
    assert not made
    past = DynamicCache(config=model.config)
    decode(model, past, 5, 6, 7)
    assert len(made) == 2 and all("_duotone_room" in vars(layer) for layer in past.layers)
    assert pickle.loads(pickle.dumps(past)).layers[0]._duotone_room is None
    with torch.no_grad():
        model(tokens[:1, :2], past_key_values=past)
    assert not any("_duotone_room" in vars(layer) for layer in past.layers)
    decode(model, past, 8)
    gc.disable()
    try:
        room = weakref.ref(past.layers[0]._duotone_room)
        del past
        assert room() is None
    finally:
        gc.enable()


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
