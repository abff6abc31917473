"""Multiple choice on a model whose probabilities are written by hand, and embeddings against their definitions."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

import duotone
from duotone import tasks
from duotone.errors import DuotoneError
from duotone.models.tokenizer import load_tokenizer
from duotone.questions import Item, load_story_cloze
from duotone.runtime.load import load
from duotone.tasks import embed, embedding_fidelity, fits_context, multiple_choice
from tests.models.test_encoders import WORDS, save_encoder

ModelMaker = Callable[..., Path]
VOCABULARY = 264
SENTENCES = [" ".join(WORDS[(7 * i + 3 * j) % 180] for j in range(1 + i % 9)) for i in range(12)]


def bigram_model(tokenizer: PreTrainedTokenizerBase, probabilities: dict[str, float]) -> LlamaForCausalLM:
    """A Llama that gives `ab` its probability of b behind a; what is not named shares the rest evenly.

    Its blocks add nothing, so the head reads the last token's one-hot embedding, scaled by the norm.
    """
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=VOCABULARY, intermediate_size=8, num_hidden_layers=1, num_attention_heads=4,
        rms_norm_eps=1e-12, max_position_embeddings=32,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data.zero_()
        layer.mlp.down_proj.weight.data.zero_()
    table = torch.zeros(VOCABULARY, VOCABULARY)
    for first in {pair[0] for pair in probabilities}:
        named = {pair[1]: p for pair, p in probabilities.items() if pair[0] == first}
        row = torch.full((VOCABULARY,), (1 - sum(named.values())) / (VOCABULARY - len(named)))
        for second, p in named.items():
            row[tokenizer.convert_tokens_to_ids(second)] = p
        table[tokenizer.convert_tokens_to_ids(first)] = row.log()
    model.model.embed_tokens.weight.data = torch.eye(VOCABULARY)
    model.lm_head.weight.data = table.T / math.sqrt(VOCABULARY)
    return model


@pytest.fixture
def tokenizer(tiny_model: ModelMaker) -> PreTrainedTokenizerBase:
    """Bytes, and a BOS."""
    return load_tokenizer(tiny_model())


@pytest.fixture
def bigrams(tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    """Behind a: `b` has 1/4, `cde` has 1/8 * 1/2 * 1/2. The sum prefers b; a byte of cde is likelier than b."""
    return bigram_model(tokenizer, {"ab": 1 / 4, "ac": 1 / 8, "cd": 1 / 2, "de": 1 / 2})


def test_multiple_choice_by_hand(bigrams: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    """Sums and bytes disagree as computed by hand; the error is that of a share of three."""
    items = [Item("a", ("b", "cde"), label) for label in (0, 1, 0)]
    result = multiple_choice(bigrams, tokenizer, items, "cpu")
    assert result.correct == (True, False, True) and result.correct_norm == (False, True, False)
    assert result.accuracy == pytest.approx(2 / 3) and result.accuracy_norm == pytest.approx(1 / 3)
    assert result.stderr == pytest.approx(math.sqrt(2 / 3 * 1 / 3 / (3 - 1)))
    assert result.stderr_norm == pytest.approx(1 / 3)
    sequences = [sequence for item in items[:1] for sequence in tasks._sequences(bigrams, tokenizer, "", item)]
    scores = tasks._log_likelihoods(bigrams, sequences, torch.device("cpu"))
    assert scores == pytest.approx([math.log(1 / 4), math.log(1 / 32)], rel=1e-5)


def test_leading_blank_is_no_byte_of_the_choice(tokenizer: PreTrainedTokenizerBase) -> None:
    """` b` counts one byte: 1/4 a byte loses against `ddd` at 1/32, wins against it if its blank counted too."""
    blank = "Ġ"  # how the byte alphabet writes it
    model = bigram_model(tokenizer, {f"a{blank}": 1 / 2, f"{blank}b": 1 / 2, "ad": 1 / 8, "dd": 1 / 2})
    result = multiple_choice(model, tokenizer, [Item("a", (" b", "ddd"), 1)] * 2, "cpu")
    assert result.correct == (False, False) and result.correct_norm == (True, True)


@pytest.mark.parametrize("budget", [1, 100, 10**6])
def test_likelihoods_do_not_depend_on_the_batch(
    tiny_model: ModelMaker, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch, budget: int
) -> None:
    """Of items of all lengths, in batches of any size: equal to one forward pass each, token by token."""
    monkeypatch.setattr(tasks, "_BATCH_TOKENS", budget)
    model = load(tiny_model(initializer_range=0.2), torch.float32, "cpu")
    sequences = [(tokenizer(f"{'red fox ' * i}counts {i * i}")["input_ids"], 3 + i) for i in (5, 1, 12, 7, 3, 0)]
    expected = []
    with torch.no_grad():
        for ids, start in sequences:
            logp = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
            expected.append(sum(logp[t - 1, ids[t]].item() for t in range(start, len(ids))))
    found = tasks._log_likelihoods(model, sequences, torch.device("cpu"))
    assert found == pytest.approx(expected, rel=1e-4)


def merging_tokenizer() -> PreTrainedTokenizerFast:
    """x, a, b, and ab as one token; no BOS."""
    tokenizer = Tokenizer(models.BPE(vocab={"x": 0, "a": 1, "b": 2, "ab": 3}, merges=[("a", "b")]))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_a_token_across_the_seam_is_scored(bigrams: LlamaForCausalLM) -> None:
    """Where context and choice melt into one token, that token is the choice's; without any before it there is no question."""
    sequences = tasks._sequences(bigrams, merging_tokenizer(), "items[0]", Item("xa", ("b", "a"), 0))
    assert list(sequences) == [([0, 3], 1), ([0, 1, 1], 2)]
    for context in ("a", ""):
        with pytest.raises(DuotoneError, match=r"items\[1\]: its context or its choice 'b' gives no token"):
            items = [Item("xa", ("b", "a"), 0), Item(context, ("b", "a"), 0)]
            multiple_choice(bigrams, merging_tokenizer(), items, "cpu")


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (Item("a", ("b", "c"), 2), r"items\[1\]: found the label 2, expected 0 to 1"),
        (Item("a", ("b", "c"), -1), r"items\[1\]: found the label -1, expected 0 to 1"),
        (Item("a", ("b", " "), 0), r"items\[1\]: .* choice ' ' gives no token"),
        (Item("a" * 31, ("b", "c"), 0), r"items\[1\]: has 33 tokens, expected at most 32"),
    ],
)
def test_bad_items_are_refused(bigrams: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, item: Item, message: str) -> None:
    """The item is named by its number in the list."""
    with pytest.raises(DuotoneError, match=message):
        multiple_choice(bigrams, tokenizer, [Item("a", ("b", "c"), 0), item], "cpu")


def test_fits_context_is_what_multiple_choice_takes(bigrams: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    """BOS, 30 bytes and one more are 32 tokens; every choice has to fit."""
    fits = fits_context(bigrams, tokenizer)
    assert fits(Item("a" * 30, ("b", "c"), 0)) and not fits(Item("a" * 30, ("b", "cc"), 0))
    multiple_choice(bigrams, tokenizer, [Item("a" * 30, ("b", "c"), 0)] * 2, "cpu")


def test_models_that_cannot_be_asked(
    bigrams: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, tiny_model: ModelMaker, tmp_path: Path, text_file: Path
) -> None:
    """An encoder, a model that gives NaN, a tokenizer of another model, too few items: each one sentence."""
    items = [Item("a", ("b", "c"), 0)] * 2
    save_encoder(tmp_path)
    encoder = load(tmp_path, torch.float32, "cpu")
    with pytest.raises(DuotoneError, match="BertModel: predicts no next token, expected a causal language model"):
        multiple_choice(encoder, tokenizer, items, "cpu")
    with pytest.raises(DuotoneError, match=r"BertModel: predicts no next token, .* for perplexity"):
        duotone.evaluate(tmp_path, [str(text_file)], seq_len=16, device="cpu")
    with pytest.raises(DuotoneError, match="LlamaForCausalLM: gives no last_hidden_state"):
        embed(bigrams, tokenizer, SENTENCES, "cpu")
    with pytest.raises(DuotoneError, match="found 1, expected at least 2"):
        multiple_choice(bigrams, tokenizer, items[:1], "cpu")
    with pytest.raises(DuotoneError, match="its tokenizer gives token 256, expected below 200"):
        multiple_choice(load(tiny_model(vocab_size=200), torch.float32, "cpu"), tokenizer, items, "cpu")
    bigrams.lm_head.weight.data[0, 0] = math.nan
    with pytest.raises(DuotoneError, match="NaN or infinite likelihoods"):
        multiple_choice(bigrams, tokenizer, [Item("!", ("!", "b"), 0)] * 2, "cpu")


def test_stories260k_tells_endings_apart(shared: Path) -> None:
    """A real model of such stories finds their endings more often than by chance."""
    folder = shared / "models" / "stories260K"
    model, tokenizer = load(folder, torch.float32, "cpu"), load_tokenizer(folder)
    path = shared / "data" / "tinystories" / "tinystories_val.txt"
    items = load_story_cloze(path, 40, seed=0, fits=fits_context(model, tokenizer))
    result = multiple_choice(model, tokenizer, items, "cpu")
    assert len(result.correct) == 40 and result.accuracy_norm > 0.64  # two standard errors above chance; 0.725 when written


@pytest.fixture
def encoder_folder(tmp_path: Path) -> Path:
    return save_encoder(tmp_path / "encoder")


def disturbed(folder: Path) -> BertModel:
    """The model with its last block changed enough to move neighbours."""
    model = load(folder, torch.float32, "cpu")
    generator = torch.Generator().manual_seed(5)
    for linear in (model.encoder.layer[1].output.dense, model.encoder.layer[1].intermediate.dense):
        linear.weight.data += 0.1 * torch.randn(linear.weight.shape, generator=generator)
    return model


def test_a_model_is_faithful_to_itself(encoder_folder: Path) -> None:
    """No error, every cosine and correlation 1, every neighbour the same."""
    model, tokenizer = load(encoder_folder, torch.float32, "cpu"), load_tokenizer(encoder_folder)
    result = embedding_fidelity(model, load(encoder_folder, torch.float32, "cpu"), tokenizer, SENTENCES, "cpu")
    assert result.sentences == len(SENTENCES)
    assert (result.relative_error, result.relative_error_stderr) == (0, 0)
    assert (result.neighbor_agreement, result.neighbor_agreement_stderr) == (1, 0)
    assert result.cosine == pytest.approx(1, abs=1e-12) and result.rank_correlation == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("budget", [1, 25, 10**6])
def test_embeddings_by_definition(encoder_folder: Path, monkeypatch: pytest.MonkeyPatch, budget: int) -> None:
    """One sentence at a time without padding: the mean of all hidden states, [CLS] and [SEP] with them, of length 1."""
    monkeypatch.setattr(tasks, "_BATCH_TOKENS", budget)
    model, tokenizer = load(encoder_folder, torch.float32, "cpu"), load_tokenizer(encoder_folder)
    found = embed(model, tokenizer, SENTENCES, "cpu")
    for sentence, e in zip(SENTENCES, found, strict=True):
        with torch.no_grad():
            hidden = model(torch.tensor([tokenizer(sentence)["input_ids"]])).last_hidden_state[0].double()
        assert len(hidden) == len(sentence.split()) + 2
        torch.testing.assert_close(e, hidden.mean(0) / hidden.mean(0).norm(), rtol=1e-4, atol=1e-6)


def average_ranks(values: list[float]) -> list[float]:
    return [sum(other < value for other in values) + (values.count(value) - 1) / 2 for value in values]


def spearman(x: list[float], y: list[float]) -> float:
    ranks = torch.tensor([average_ranks(x), average_ranks(y)], dtype=torch.float64)
    return torch.corrcoef(ranks)[0, 1].item()


@pytest.mark.parametrize("rows", [5, 256])
def test_fidelity_by_definition(encoder_folder: Path, monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """All figures and their errors from loops over the embeddings; a sentence that stands twice makes ties."""
    monkeypatch.setattr(tasks, "_RANKED_ROWS", rows)
    model, reference = disturbed(encoder_folder), load(encoder_folder, torch.float32, "cpu")
    tokenizer, sentences = load_tokenizer(encoder_folder), [*SENTENCES, SENTENCES[0]]
    count = len(sentences)
    e, e0 = (embed(one, tokenizer, sentences, "cpu") for one in (model, reference))
    rho, agree = [], []
    for i in range(count):
        others = [j for j in range(count) if j != i]
        near, near0 = ([(one[i] @ one[j]).item() for j in others] for one in (e, e0))
        rho.append(spearman(near, near0))
        agree.append(float(near.index(max(near)) == near0.index(max(near0))))
    squared = (e - e0).square().sum(-1)
    result = embedding_fidelity(model, reference, tokenizer, sentences, "cpu")
    assert result.relative_error == pytest.approx((squared.sum() / e0.square().sum()).item(), rel=1e-9)
    assert result.relative_error_stderr == pytest.approx(squared.std().item() / math.sqrt(count), rel=1e-9)
    assert result.cosine == pytest.approx(sum((e[i] @ e0[i]).item() for i in range(count)) / count)
    assert result.relative_error == pytest.approx(2 - 2 * result.cosine)
    assert 0.2 < result.rank_correlation < 0.999 and 0 < result.neighbor_agreement < 1
    assert result.rank_correlation == pytest.approx(sum(rho) / count, abs=1e-6)
    assert result.rank_correlation_stderr == pytest.approx(torch.tensor(rho).std().item() / math.sqrt(count), rel=1e-3)
    share = sum(agree) / count
    assert result.neighbor_agreement == pytest.approx(share)
    assert result.neighbor_agreement_stderr == pytest.approx(math.sqrt(share * (1 - share) / (count - 1)))


def test_ranks_of_equal_values() -> None:
    """Ties share the mean of their ranks, and ranks sum to nothing."""
    ranks = tasks._centered_ranks(torch.tensor([[3.0, 1.0, 3.0, 2.0], [1.0, 1.0, 1.0, 1.0]]))
    assert ranks.tolist() == [[1.0, -1.5, 1.0, -0.5], [0.0, 0.0, 0.0, 0.0]]


def test_long_sentences_are_cut(encoder_folder: Path) -> None:
    """Beyond what the model reads nothing counts, and no warning is given."""
    model, tokenizer = load(encoder_folder, torch.float32, "cpu"), load_tokenizer(encoder_folder)
    long = " ".join(WORDS[:100])
    cut, same = embed(model, tokenizer, [long, " ".join(WORDS[:62])], "cpu")
    torch.testing.assert_close(cut, same)


def test_bad_sentences_are_refused(encoder_folder: Path) -> None:
    """Too few to rank, one without a token, models of other widths, a model that gives NaN: each one sentence."""
    model, tokenizer = load(encoder_folder, torch.float32, "cpu"), load_tokenizer(encoder_folder)
    with pytest.raises(DuotoneError, match="found 2, expected at least 3"):
        embedding_fidelity(model, model, tokenizer, SENTENCES[:2], "cpu")
    bare = Tokenizer(models.WordLevel({"[UNK]": 0, "fox": 1}, unk_token="[UNK]"))
    bare.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(DuotoneError, match=r"sentences\[1\]: '  ' gives no token"):
        embed(model, PreTrainedTokenizerFast(tokenizer_object=bare, unk_token="[UNK]"), ["fox", "  "], "cpu")
    narrow = BertModel(type(model.config)(**(model.config.to_dict() | {"hidden_size": 64}))).eval()
    with pytest.raises(DuotoneError, match="reference's embeddings have 64 values, expected 128"):
        embedding_fidelity(model, narrow, tokenizer, SENTENCES, "cpu")
    with pytest.raises(DuotoneError, match="all equally similar"):
        embedding_fidelity(model, model, tokenizer, [SENTENCES[0]] * 4, "cpu")
    model.encoder.layer[0].output.dense.bias.data[0] = math.nan
    with pytest.raises(DuotoneError, match="BertModel: gives NaN"):
        embedding_fidelity(model, load(encoder_folder, torch.float32, "cpu"), tokenizer, SENTENCES, "cpu")
