"""A model behind its rotation computes what it did: no fold is missing, none is too many."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from duotone.checkpoint.source import Source, open_source
from duotone.errors import DuotoneError
from duotone.models.skeleton import build_skeleton, expected_tensors, fill
from duotone.plan import make_plan
from duotone.settings import QuantizeConfig
from duotone.transforms.rotated import RotatedSource

ModelMaker = Callable[..., Path]
TOKENS = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(0))
CPU = torch.device("cpu")
#: Biases wherever a decoder of the Llama kind may have them.
BIASED = {"attention_bias": True, "mlp_bias": True}


def rotated(folder: Path, seed: int = 0) -> RotatedSource:
    """The source that a run with --rotate reads."""
    source = make_plan(open_source(folder), QuantizeConfig(rotate=True, seed=seed)).source
    assert isinstance(source, RotatedSource)
    return source


@torch.no_grad()
def logits(source: Source) -> Tensor:
    """Of the model that a source's tensors make, computed in float64."""
    return filled(source)(TOKENS).logits


def filled(source: Source) -> PreTrainedModel:
    model = build_skeleton(source.config, torch.float64)
    fill(model, source.load(expected_tensors(model)), torch.float64, CPU)
    model.tie_weights()
    return model


def difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@settings(max_examples=24, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    model_type=st.sampled_from(["llama", "mistral", "qwen2", "qwen3"]),
    hidden=st.sampled_from([64, 72, 128, 288]),
    heads=st.sampled_from([(4, 2, 32), (2, 2, 24), (6, 1, 10)]),
    tied=st.booleans(),
    biased=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_the_function_stays(
    tiny_model: ModelMaker, model_type: str, hidden: int, heads: tuple[int, int, int], tied: bool, biased: bool, seed: int
) -> None:
    """Logits are the original's to float32 rounding of the rotated weights, for any architecture of the table and any size."""
    sizes = dict(zip(("num_attention_heads", "num_key_value_heads", "head_dim"), heads, strict=True))
    biases = BIASED if biased and model_type == "llama" else {}
    folder = tiny_model(model_type, hidden_size=hidden, tie_word_embeddings=tied, initializer_range=0.1, **sizes, **biases)
    source = rotated(folder, seed)
    assert difference(logits(source), logits(open_source(folder))) < 2e-6
    changed = source.load(["model.embed_tokens.weight"])["model.embed_tokens.weight"]
    assert difference(changed, open_source(folder).load(["model.embed_tokens.weight"])["model.embed_tokens.weight"]) > 0.5


@pytest.mark.parametrize(
    ("model_type", "tied", "more", "biases"), [("llama", True, BIASED, 3), ("qwen2", False, {}, 1)], ids=["llama", "qwen2"]
)
def test_every_fold_is_needed(tiny_model: ModelMaker, model_type: str, tied: bool, more: dict, biases: int) -> None:
    """Leaving out any part of any of them is seen in the logits: the test above could not pass without it."""
    folder = tiny_model(model_type, tie_word_embeddings=tied, initializer_range=0.1, **more)
    source, expected = rotated(folder), logits(open_source(folder))
    assert len(source.folds) == 3 + 2 * (9 + biases)
    model = filled(source)
    for name, fold in source.folds.items():
        parts = {"columns": None, "rows": None, "scaled_by": None, "ones": False}
        for part in [part for part in parts if getattr(fold, part)]:
            without = replace(source, folds={name: replace(fold, **{part: parts[part]})})
            fill(model, without.load([name]), torch.float64, CPU)
            with torch.no_grad():
                assert difference(model(TOKENS).logits, expected) > 1e-3, (name, part)
        fill(model, source.load([name]), torch.float64, CPU)
    with torch.no_grad():
        assert difference(model(TOKENS).logits, expected) < 2e-6


def test_what_is_left_alone(tiny_model: ModelMaker) -> None:
    """Norms of queries and keys, their biases, those of gate and up: byte for byte; other norms are one."""
    for model_type, more in (("qwen3", {}), ("llama", BIASED)):
        folder = tiny_model(model_type, **more)
        source, original = rotated(folder), load_file(folder / "model.safetensors")
        found = source.load(source.tensors)
        kept = [name for name in original if name.endswith(("q_norm.weight", "k_norm.weight")) or name not in source.folds]
        assert kept and all(torch.equal(found[name], original[name]) for name in kept)
        norms = [name for name in original if name.endswith(("layernorm.weight", "model.norm.weight"))]
        assert len(norms) == 5 and all(torch.equal(found[name], torch.ones_like(original[name])) for name in norms)
        assert all(tuple(found[name].shape) == spec.shape for name, spec in source.tensors.items())
        dtypes = {"F32": torch.float32, "BF16": torch.bfloat16}
        assert all(found[name].dtype == dtypes[spec.dtype] for name, spec in source.tensors.items())


def test_a_tied_head_is_planned_as_a_tensor(tiny_model: ModelMaker) -> None:
    """It has its place in the layout before any work, config.json is told, and the note counts its bytes."""
    folder = tiny_model(tie_word_embeddings=True)
    plain, turned = (make_plan(open_source(folder), QuantizeConfig(rotate=rotate)) for rotate in (False, True))
    assert "lm_head.weight" not in plain.outputs and turned.outputs["lm_head.weight"].shape == (260, 128)
    assert turned.disk_bytes - plain.disk_bytes == 260 * 128 * 2
    assert turned.source.config["tie_word_embeddings"] is False and plain.source.config["tie_word_embeddings"] is True
    assert [note for note in turned.transforms if f"{260 * 128 * 2} bytes more" in note]
    assert turned.source.weight_bytes == plain.source.weight_bytes
    untied = make_plan(open_source(tiny_model()), QuantizeConfig(rotate=True))
    assert (
        len(untied.transforms) == 1
        and untied.outputs.keys() == make_plan(open_source(tiny_model()), QuantizeConfig()).outputs.keys()
    )


def test_a_stored_copy_of_a_tied_head_is_not_used(tiny_model: ModelMaker, tmp_path: Path) -> None:
    """Where the config ties the head, the model reads the embedding, whatever else the file holds."""
    folder = tiny_model(tie_word_embeddings=True)
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"lm_head.weight": torch.zeros(260, 128, dtype=torch.bfloat16)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    assert difference(logits(rotated(tmp_path)), logits(open_source(folder))) < 2e-6


def test_a_non_finite_norm_is_named(tiny_model: ModelMaker, tmp_path: Path) -> None:
    """The tensor that holds it, not the linears it would be folded into."""
    tensors = load_file(tiny_model() / "model.safetensors")
    tensors["model.layers.1.input_layernorm.weight"][3] = float("nan")
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((tiny_model() / "config.json").read_bytes())
    with pytest.raises(DuotoneError, match=r"model\.layers\.1\.input_layernorm\.weight holds 1 NaN"):
        rotated(tmp_path).load(["model.layers.1.self_attn.q_proj.weight"])


@pytest.mark.parametrize("option", [{"rotate": True}, {"equalize": 0.5}])
def test_other_norms_are_refused(tmp_path: Path, option: dict) -> None:
    """BERT's layer norms subtract a mean, and their output is the stream: one sentence before any work."""
    from transformers import BertConfig, BertModel

    config = BertConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=40)
    BertModel(config).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "bert"
    with pytest.raises(DuotoneError, match=rf"--{next(iter(option))}: found model_type 'bert', expected .*RMS norms: llama, "):
        make_plan(open_source(tmp_path), QuantizeConfig(**option))
