"""BERT encoders: quantized, loaded and run under each head, against the contract done by hand."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    PreTrainedTokenizerFast,
)

import duotone
from duotone.calibrate.data import draw_windows, token_batches
from duotone.calibrate.stream import start_stream
from duotone.checkpoint.reader import WeightReader, packed_layers
from duotone.checkpoint.source import open_source
from duotone.contract import quantize_activations
from duotone.errors import DuotoneError
from duotone.inspection import inspect_model
from duotone.models.adapter import find_adapter, model_class
from duotone.models.skeleton import find_linears
from duotone.models.tokenizer import load_tokenizer
from duotone.outcome import QuantizeReport
from duotone.phases import Phases
from duotone.qweight import dequantize, fp8_values
from duotone.runtime.linear import QuantizedLinear
from duotone.runtime.load import load

WORDS = [f"{word}{i}" for i in range(60) for word in ("fox", "stone", "red")]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
LINEARS = 6


@pytest.fixture(scope="module")
def words_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("words") / "words.txt"
    generator = torch.Generator().manual_seed(0)
    path.write_text(" ".join(WORDS[i] for i in torch.randint(len(WORDS), (3000,), generator=generator).tolist()))
    return path


def save_encoder(folder: Path, model_class: type = BertModel) -> Path:
    """A random float32 model of two blocks; biases and norms random too, so that a test sees them lost."""
    config = BertConfig(
        vocab_size=len(SPECIAL) + len(WORDS),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model = model_class(config).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    return folder


def quantize(source: Path, out: Path, words_file: Path, **options: object) -> QuantizeReport:
    settings = {"samples": 8, "seq_len": 32, "device": "cpu", "calibration": (str(words_file),)}
    return duotone.quantize(source, out, **(settings | options))


def run(model: torch.nn.Module, padded: bool = False) -> torch.Tensor:
    """The model's main output on two sequences, the second one half padding if asked for."""
    tokens = torch.randint(5, 100, (2, 24), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(tokens)
    if padded:
        mask[1, 12:] = 0
    with torch.no_grad():
        output = model(input_ids=tokens, attention_mask=mask)
    hidden = output.last_hidden_state if hasattr(output, "last_hidden_state") else output.logits
    return hidden[mask.bool()] if hidden.ndim == 3 else hidden


@pytest.mark.parametrize("target", ["hopper", "gaudi"])
@pytest.mark.parametrize("method", ["rtn", "dpq"])
def test_runs_what_was_written(tmp_path: Path, words_file: Path, method: str, target: str) -> None:
    """Loaded embeddings equal the original model with the contract written out in each linear, padding or none.

    `dpq` gives each linear another bias, which the checkpoint holds; `rtn` leaves them.
    """
    source = save_encoder(tmp_path / "model")
    report = quantize(source, tmp_path / "out", words_file, method=method, target=target)
    model, by_hand = load(tmp_path / "out", torch.float32, "cpu"), load(source, torch.float32, "cpu")
    reader, written = WeightReader(open_source(tmp_path / "out")), load_file(tmp_path / "out" / "model.safetensors")
    assert type(model) is BertModel
    assert len(report.layers) == 2 * LINEARS == len(packed_layers(open_source(tmp_path / "out")))
    for layer in (layer.layer for layer in report.layers):
        assert isinstance(model.get_submodule(layer), QuantizedLinear)
        weight, linear, bias = reader.read(layer), by_hand.get_submodule(layer), written[f"{layer}.bias"]
        assert torch.equal(bias, linear.bias.bfloat16()) == (method == "rtn")
        linear.bias.data = bias.float()

        def forward(x: torch.Tensor, weight=weight, linear=linear) -> torch.Tensor:
            x8, scale = quantize_activations(x, weight.scheme.target, weight.input_scale)
            y = (x8.double() @ fp8_values(weight).double().T) * weight.outer_scale.double() * scale.double()
            return (y + linear.bias.double()).float()

        linear.forward = forward
    for name, parameter in by_hand.named_parameters():  # the checkpoint holds what is left as BF16
        if name.rpartition(".")[0] not in find_linears(by_hand):
            parameter.data = parameter.data.bfloat16().float()
    for padded in (False, True):
        found, expected = run(model, padded), run(by_hand, padded)
        # A float32 sum that falls on another side of an FP8 rounding moves one activation by 1/16 at most; few do.
        assert ((found - expected).norm() / expected.norm()).item() < 2e-3
        assert (found - expected).abs().median().item() < 1e-4 * expected.abs().max().item()


@pytest.mark.parametrize("method", ["rtn", "dpq"])
def test_near_the_dequantized_weights(tmp_path: Path, words_file: Path, method: str) -> None:
    """An ordinary float BERT with the dequantized weights differs from the W4A8 one by FP8 activations alone: a few percent."""
    source = save_encoder(tmp_path / "model")
    quantize(source, tmp_path / "out", words_file, method=method)
    reader, tensors = WeightReader(open_source(tmp_path / "out")), load_file(source / "model.safetensors")
    for layer in packed_layers(open_source(tmp_path / "out")):
        tensors[f"{layer}.weight"] = dequantize(reader.read(layer)).float()
    plain = BertModel(BertConfig.from_pretrained(source)).eval()
    plain.load_state_dict(tensors)
    found, expected = run(load(tmp_path / "out", torch.float32, "cpu")), run(plain)
    assert 0 < ((found - expected).norm() / expected.norm()).item() < 0.05


@pytest.mark.parametrize(
    ("model_class", "prefix", "kept"),
    [
        (BertModel, "", {"pooler.dense"}),
        (BertForMaskedLM, "bert.", {"cls.predictions.transform.dense", "cls.predictions.decoder"}),
        (BertForSequenceClassification, "bert.", {"bert.pooler.dense", "classifier"}),
    ],
)
def test_each_head(tmp_path: Path, words_file: Path, model_class: type, prefix: str, kept: set[str]) -> None:
    """The class that config.json names is built, its blocks are found under its prefix, its heads stay with a reason."""
    source = save_encoder(tmp_path / "model", model_class)
    report = quantize(source, tmp_path / "out", words_file)
    assert set(report.kept) == kept and all(report.kept.values())
    assert report.layers[0].layer == f"{prefix}encoder.layer.0.attention.self.query"
    assert len(report.layers) == 2 * LINEARS
    model = load(tmp_path / "out", torch.float32, "cpu")
    assert type(model) is model_class
    found, expected = run(model), run(load(source, torch.float32, "cpu"))
    assert ((found - expected).norm() / expected.norm()).item() < 0.3
    reasons = {layer.layer: layer.kept_because for layer in inspect_model(tmp_path / "out").layers}
    assert all(reasons[layer] == report.kept[layer] for layer in kept if layer in reasons)
    written, original = load_file(tmp_path / "out" / "model.safetensors"), load_file(source / "model.safetensors")
    corrected = {f"{layer.layer}.bias" for layer in report.layers}
    for name in original.keys() & written.keys():
        assert torch.equal(written[name], original[name].bfloat16()) == (name not in corrected)


def test_stream_equals_the_model(tmp_path: Path) -> None:
    """Blocks called by position: hidden states after each block, and X^T X, equal those of one whole forward."""
    model = load(save_encoder(tmp_path), torch.float32, "cpu")
    tokens = torch.randint(5, 100, (70, 64), generator=torch.Generator().manual_seed(0))
    blocks = list(model.encoder.layer)
    seen: list[torch.Tensor] = []
    handle = blocks[1].output.dense.register_forward_pre_hook(lambda _, x: seen.append(x[0].flatten(0, 1).double()))
    with torch.no_grad():
        whole = model(tokens, output_hidden_states=True).hidden_states
    handle.remove()
    stream = start_stream(model, blocks, token_batches(tokens), Phases())
    assert len(stream.hidden) == 2  # a full batch and a short one
    for i, block in enumerate(blocks):
        torch.testing.assert_close(torch.cat(stream.hidden), whole[i], rtol=1e-4, atol=1e-5)
        with stream.enter(i, block, {"down": "output.dense"}, {}) as observer:
            statistics = observer.observe("down")
            stream.leave(observer)
    torch.testing.assert_close(torch.cat(stream.hidden), whole[2], rtol=1e-4, atol=1e-5)
    assert statistics is not None
    torch.testing.assert_close(statistics.hessian.double(), seen[0].T @ seen[0] / len(seen[0]), rtol=1e-4, atol=1e-6)


def test_biases_keep_the_mean_stream(tmp_path: Path, words_file: Path) -> None:
    """Behind each linear the mean over the calibration is the original's, to BF16's precision: of the residual stream if it
    writes to one, as the norm behind it reads it, and of its own output if not."""
    source = save_encoder(tmp_path / "model")
    quantize(source, tmp_path / "out", words_file)
    original, quantized = load(source, torch.float32, "cpu"), load(source, torch.float32, "cpu")
    reader, written = WeightReader(open_source(tmp_path / "out")), load_file(tmp_path / "out" / "model.safetensors")
    layers = packed_layers(open_source(tmp_path / "out"))
    for layer in layers:
        linear = quantized.get_submodule(layer)
        linear.weight.data, linear.bias.data = dequantize(reader.read(layer)), written[f"{layer}.bias"].float()
    tokens = draw_windows(load_tokenizer(source), [str(words_file)], 32, 8, seed=0).tokens

    def means(model: torch.nn.Module) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}

        def watch(layer: str, reads: bool) -> Callable[..., None]:
            return lambda *call: found.update({layer: (call[1][0] if reads else call[2]).flatten(0, 1).mean(0)})

        for layer in layers:
            writes = layer.endswith("output.dense")
            module = model.get_submodule(layer.removesuffix("dense") + "LayerNorm" if writes else layer)
            module.register_forward_hook(watch(layer, writes))
        with torch.no_grad():
            model(input_ids=tokens)
        return found

    wanted, found = means(original), means(quantized)
    assert len(wanted) == 2 * LINEARS
    for layer in layers:
        bias = quantized.get_submodule(layer).bias
        assert bool(((found[layer] - wanted[layer]).abs() <= 2.0**-8 * bias.abs() + 1e-4).all())
        assert (bias - original.get_submodule(layer).bias).abs().max() > 5e-3, "the biases hardly moved: nothing was tested"


def test_windows_look_like_texts(tmp_path: Path, words_file: Path) -> None:
    """Where there is no BOS, [CLS] stands before each window and [SEP] behind it, and all between is text, as in a sentence."""
    tokenizer = load_tokenizer(save_encoder(tmp_path))
    windows = draw_windows(tokenizer, [str(words_file)], 16, 4, seed=0)
    assert windows.tokens.shape == (4, 16)
    assert windows.tokens[:, 0].tolist() == [2] * 4 and windows.tokens[:, -1].tolist() == [3] * 4
    assert not (windows.tokens[:, 1:-1] < len(SPECIAL)).any()


def test_buffers_of_old_checkpoints_are_no_surprise(tmp_path: Path, words_file: Path) -> None:
    """`embeddings.position_ids`, which older transformers stored, is copied, and neither load warns of it."""
    source = save_encoder(tmp_path / "model")
    tensors = load_file(source / "model.safetensors") | {"embeddings.position_ids": torch.arange(64)[None]}
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    quantize(source, tmp_path / "out", words_file, method="rtn")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = run(load(tmp_path / "out", torch.float32, "cpu"))
        load(source, torch.float32, "cpu")
    assert bool(torch.isfinite(found).all())
    assert "embeddings.position_ids" in load_file(tmp_path / "out" / "model.safetensors")


def test_architectures_choose_the_table() -> None:
    """The name in config.json decides; none means the bare encoder; an unknown one is refused by name, damaged ones too."""
    assert find_adapter({"model_type": "bert"}).blocks == "encoder.layer"
    assert find_adapter({"model_type": "bert", "architectures": ["BertForMaskedLM"]}).blocks == "bert.encoder.layer"
    for named in (["BertForQuestionAnswering"], "BertModelX", 5, [["BertModel"]], {"BertModel": 1}):
        with pytest.raises(DuotoneError, match=r"found architectures .* expected one of BertModel, BertForMaskedLM"):
            find_adapter({"model_type": "bert", "architectures": named})


def test_causal_models_are_built_as_before() -> None:
    """Decoders, and model types without a table, are causal language models whatever `architectures` says."""
    for model_type in ("llama", "mistral", "qwen2", "qwen3", "gpt2"):
        for named in (["SomethingElse"], None):
            assert model_class({"model_type": model_type, "architectures": named}) is AutoModelForCausalLM


def test_pooler_can_be_named_by_a_rule_and_nothing_else_is_lost(tmp_path: Path, words_file: Path) -> None:
    """--ignore works on an encoder's names, and strict accepts the table's own exceptions."""
    source = save_encoder(tmp_path / "model")
    report = quantize(source, tmp_path / "out", words_file, ignore=("re:encoder.layer.0.*",), method="rtn")
    assert len(report.layers) == LINEARS and report.kept["encoder.layer.0.output.dense"].startswith("ignored by the rule")
    report = quantize(source, tmp_path / "strict", words_file, strict=True, method="rtn")
    assert set(report.kept) == {"pooler.dense"}
    ignored = json.loads((tmp_path / "strict" / "config.json").read_text())["quantization_config"]["ignore"]
    assert ignored == ["pooler.dense"]
