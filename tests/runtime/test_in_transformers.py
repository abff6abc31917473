"""from_pretrained with our linears where that is asked for, and compressed-tensors' own where it is not."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    PreTrainedConfig,
    pipeline,
)

import duotone
from duotone.errors import DuotoneError
from duotone.runtime.linear import QuantizedLinear

ModelMaker = Callable[..., Path]
TOKENS = torch.randint(0, 256, (2, 17), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def nothing_is_left_behind() -> Iterator[None]:
    """transformers' tables are after each test what they were before."""
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

    before = dict(AUTO_QUANTIZER_MAPPING), dict(AUTO_QUANTIZATION_CONFIG_MAPPING)
    yield
    assert before == (AUTO_QUANTIZER_MAPPING, AUTO_QUANTIZATION_CONFIG_MAPPING)


@pytest.fixture(scope="module")
def make_checkpoint(tiny_model: ModelMaker, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """make(model_type, target, **of the model) -> a quantized tiny model; made once."""
    made: dict[str, Path] = {}

    def make(model_type: str = "llama", target: str = "hopper", **overrides: object) -> Path:
        key = json.dumps([model_type, target, overrides])
        if key not in made:
            made[key], sizes = tmp_path_factory.mktemp("checkpoint") / "out", {"samples": 4, "seq_len": 64, "group_size": 32}
            text = () if target == "hopper" else (str(text_file),)
            model = tiny_model(model_type, **overrides)
            duotone.quantize(model, made[key], method="rtn", target=target, calibration=text, device="cpu", **sizes)
        return made[key]

    return make


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("model_type", "target", "overrides"),
    [
        ("llama", "hopper", {}),
        ("llama", "hopper", {"tie_word_embeddings": True}),
        ("llama", "gaudi", {}),
        ("qwen2", "hopper", {}),  # with biases
        ("qwen3", "gaudi", {}),
    ],
)
def test_the_model_of_our_own_loader(
    make_checkpoint: Callable[..., Path], dtype: torch.dtype, model_type: str, target: str, overrides: dict
) -> None:
    """Nothing missing, nothing left over, the same parameters, and the same bits; generation takes the same shortcuts."""
    path = make_checkpoint(model_type, target, **overrides)
    ours = duotone.load(path, dtype, "cpu")
    with duotone.use_in_transformers():
        model, info = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, output_loading_info=True)
    assert not any(info.values()), info
    assert sum(isinstance(module, QuantizedLinear) for module in model.modules()) == 14 and not model.training
    assert {name: p.dtype for name, p in model.named_parameters()} == {name: p.dtype for name, p in ours.named_parameters()}
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(logits(model), logits(ours))
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 257}
    assert torch.equal(model.generate(TOKENS, **options), ours.generate(TOKENS, **options))


def test_only_where_it_is_asked_for(make_checkpoint: Callable[..., Path]) -> None:
    """Before and after it is compressed-tensors' model, whose logits are near; closing ends what a plain call began."""
    path = make_checkpoint()
    meant = logits(duotone.load(path, torch.float32, "cpu"))
    asked = duotone.use_in_transformers()
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)), meant)
    asked.close()
    theirs = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    assert not any(isinstance(module, QuantizedLinear) for module in theirs.modules())
    distance = float((logits(theirs) - meant).norm() / meant.norm())
    assert 0 < distance < 0.1, "without the second rounding of the weights, and with that of activations"


def test_what_calls_from_pretrained_itself(make_checkpoint: Callable[..., Path]) -> None:
    """A pipeline by name; one device by every way to say it; a model of another quant_method or of none as ever."""
    path = make_checkpoint()
    with duotone.use_in_transformers(), duotone.use_in_transformers():
        writer = pipeline("text-generation", model=str(path))
        assert isinstance(writer.model.model.layers[0].mlp.down_proj, QuantizedLinear)
        for device_map in ("cpu", {"": "cpu"}, torch.device("cpu")):
            model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, device_map=device_map)
            assert model.device.type == "cpu" and isinstance(model.model.layers[0].mlp.down_proj, QuantizedLinear)


def test_a_plain_model_is_not_touched(tiny_model: ModelMaker) -> None:
    """There is nothing quantized in it."""
    with duotone.use_in_transformers():
        model = AutoModelForCausalLM.from_pretrained(tiny_model())
    assert type(model.model.layers[0].mlp.down_proj) is nn.Linear


def test_it_does_not_save_what_it_cannot(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """Without its codes a checkpoint would be none."""
    with duotone.use_in_transformers():
        model = AutoModelForCausalLM.from_pretrained(make_checkpoint())
    with pytest.raises(ValueError, match="not serializable"):
        model.save_pretrained(tmp_path / "saved")


def test_a_model_without_its_head(make_checkpoint: Callable[..., Path]) -> None:
    """AutoModel: hidden states, from the same linears, which share their calls."""
    path = make_checkpoint()
    ours = duotone.load(path, torch.bfloat16, "cpu").base_model
    with duotone.use_in_transformers():
        model = AutoModel.from_pretrained(path, dtype=torch.bfloat16)
    assert sum(isinstance(module, QuantizedLinear) for module in model.modules()) == 14
    with torch.no_grad():
        assert torch.equal(model(TOKENS).last_hidden_state, ours(TOKENS).last_hidden_state)
    assert [part._shared is None for part in model.modules() if isinstance(part, QuantizedLinear)] == [
        part._shared is None for part in ours.modules() if isinstance(part, QuantizedLinear)
    ]


def quantized(config: PreTrainedConfig, path: Path) -> PreTrainedConfig:
    """Another model's config with a checkpoint's quantization_config."""
    config.quantization_config = json.loads((path / "config.json").read_text())["quantization_config"]
    return config


def edited(path: Path, out: Path, change: Callable[[dict], None]) -> Path:
    """A copy with another quantization_config."""
    shutil.copytree(path, out)
    config = json.loads((out / "config.json").read_text())
    change(config["quantization_config"])
    (out / "config.json").write_text(json.dumps(config))
    return out


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda found: found["config_groups"]["group_0"].update(input_activations=None), "not W4A8 pack-quantized"),
        (lambda found: found["config_groups"]["group_0"]["weights"].update(num_bits=8), r"\('compressed', 8"),
        (lambda found: found["config_groups"]["group_0"].update(format="int-quantized"), "found format 'int-quantized'"),
    ],
)
def test_another_tools_checkpoint(
    make_checkpoint: Callable[..., Path], tmp_path: Path, change: Callable[[dict], None], words: str
) -> None:
    """Is refused by name, not run by something else, and where it can be loaded is said."""
    other = edited(make_checkpoint(), tmp_path / "other", change)
    with duotone.use_in_transformers(), pytest.raises(DuotoneError, match=f"{words}.*; outside of use_in_transformers"):
        AutoModelForCausalLM.from_pretrained(other)


def test_refusals(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """A gaudi checkpoint without its scales, damaged files, another class of model, several devices, no files."""
    gaudi, path = make_checkpoint(target="gaudi"), make_checkpoint()
    shutil.copytree(gaudi, tmp_path / "bare")
    (tmp_path / "bare" / "duotone.json").unlink()
    with duotone.use_in_transformers():
        with pytest.raises(DuotoneError, match=r"duotone\.json has no scales for it"):
            AutoModelForCausalLM.from_pretrained(tmp_path / "bare")
        gpt2 = AutoConfig.for_model("gpt2", n_embd=128, n_layer=1, n_head=4, vocab_size=260)
        with pytest.raises(DuotoneError, match=r"holds a packed weight 'model\.layers.* no such linear in GPT2.*duotone\.load"):
            GPT2LMHeadModel.from_pretrained(path, config=quantized(gpt2, path))
        with pytest.raises(DuotoneError, match=r"device_map: found .*expected one device"):
            AutoModelForCausalLM.from_pretrained(path, device_map={"model": "cpu", "lm_head": "disk"})
        with pytest.raises(DuotoneError, match="found a state_dict and no files"):
            LlamaForCausalLM.from_pretrained(None, config=AutoConfig.from_pretrained(path), state_dict={})
