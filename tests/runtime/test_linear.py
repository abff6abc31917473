"""The module that replaces nn.Linear, and loading."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

import duotone
from duotone.device import resolve_device
from duotone.errors import DuotoneError
from duotone.kernels import cpu, dispatch, native, reference
from duotone.qweight import dequantize
from duotone.runtime.generate import generate
from duotone.runtime.linear import QuantizedLinear, share_call
from duotone.runtime.load import load
from duotone.scheme import GAUDI, HOPPER, Scheme
from tests.kernels.test_reference import make_weight

ModelMaker = Callable[..., Path]


def test_dtype_casts_leave_the_contract_alone() -> None:
    """`.to(bfloat16)`, `.half()` and `.float()` change the bias only, never scales or FP8 values."""
    weight = make_weight(8, 64, Scheme(HOPPER, 32))
    linear = QuantizedLinear(weight, torch.randn(8))
    for cast in (torch.bfloat16, torch.float16, torch.float32):
        linear.to(cast)
        assert linear.bias is not None and linear.bias.dtype == cast
        assert linear._packed.outer_scale.dtype == torch.float32
    assert torch.equal(linear.dequantize(), dequantize(weight))


@pytest.mark.skipif(not native.available(), reason=f"compiled linear: {native.unavailable()}")
@pytest.mark.parametrize("bias", [False, True])
def test_linears_of_one_input_share_a_call(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits in any order, one call for one input, none kept; another or a changed input is computed anew."""
    weights = [make_weight(rows, 64, Scheme(HOPPER, 32)) for rows in (32, 16, 12)]
    biases = [torch.randn(len(weight.codes)).bfloat16() if bias else None for weight in weights]
    alone = [QuantizedLinear(*pair) for pair in zip(weights, biases, strict=True)]
    together = [QuantizedLinear(*pair) for pair in zip(weights, biases, strict=True)]
    assert share_call(together)
    calls: list[int] = []
    original = cpu.linear
    monkeypatch.setattr(cpu, "linear", lambda *given: calls.append(1) or original(*given))
    x, other = torch.randn(2, 3, 64).bfloat16(), torch.randn(2, 3, 64).bfloat16()
    with torch.no_grad():
        meant, calls[:] = [layer(x) for layer in alone], []
        assert all(torch.equal(together[i](x), meant[i]) for i in (0, 1, 2)) and len(calls) == 1
        assert together[0]._shared is not None and together[0]._shared[0]._last.x is None, "activations are not kept"
        assert all(torch.equal(together[i](x), meant[i]) for i in (2, 0)) and len(calls) == 2
        assert torch.equal(together[1](other), alone[1](other))
        assert torch.equal(together[0](x), meant[0]), "what was computed for another tensor is no answer"
        x.mul_(2)
        assert torch.equal(together[2](x), alone[2](x)), "nor what was computed before the tensor changed"
        assert all(torch.equal(layer.dequantize(), one.dequantize()) for layer, one in zip(together, alone, strict=True))


def test_linears_that_cannot_share_stay_as_they_are() -> None:
    """An ordinary linear among them, or one alone."""
    layer = QuantizedLinear(make_weight(16, 64, Scheme(HOPPER, 32)), None)
    assert not share_call([layer]) and not share_call([layer, torch.nn.Linear(64, 16)])
    assert layer._shared is None


@pytest.mark.parametrize("backend", dispatch.BACKENDS, ids=lambda backend: backend.NAME)
def test_a_missing_activation_scale_is_refused(backend: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """A static target's weight never calibrated becomes no linear, on any backend; with its scale, or dynamic, it does."""
    if backend.refuses(Scheme(GAUDI, 32), torch.device("cpu")):
        pytest.skip(f"{backend.NAME}: {backend.refuses(Scheme(GAUDI, 32), torch.device('cpu'))}")
    monkeypatch.setattr(dispatch, "BACKENDS", (backend,))
    calibrated = make_weight(8, 64, Scheme(GAUDI, 32))
    with pytest.raises(ValueError, match=r"^input_scale: found none, expected the calibrated one: .* target gaudi are static$"):
        QuantizedLinear(dataclasses.replace(calibrated, input_scale=None), None)
    assert QuantizedLinear(calibrated, None).backend is backend
    assert QuantizedLinear(make_weight(8, 64, Scheme(HOPPER, 32)), None).input_scale is None


def test_repr_names_scheme_and_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """`print(model)` says what runs."""
    weight = make_weight(8, 64, Scheme(HOPPER, 32))
    for module in (cpu, reference):
        monkeypatch.setattr(dispatch, "BACKENDS", (module,))
        if module.refuses(weight.scheme, torch.device("cpu")) is None:
            text = repr(QuantizedLinear(weight, None))
            assert f"in_features=64, out_features=8, bias=False, w4a8 hopper g32, backend={module.NAME}" in text


def test_ordinary_folder_loads_as_transformers_loads_it(tiny_model: ModelMaker) -> None:
    """Logits of our loader and of from_pretrained are bit for bit the same, tied embeddings included."""
    from transformers import AutoModelForCausalLM

    tokens = torch.arange(40)[None]
    for tied in (False, True):
        folder = tiny_model(tie_word_embeddings=tied)
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
        with torch.no_grad():
            assert torch.equal(load(folder, torch.float32, "cpu")(tokens).logits, theirs(tokens).logits)


@pytest.fixture(scope="module")
def checkpoint(tiny_model: ModelMaker, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runtime") / "out"
    duotone.quantize(tiny_model("qwen2"), out, method="rtn", device="cpu")
    return out


def test_generate_streams_what_it_returns(checkpoint: Path) -> None:
    """Greedy text is deterministic, and the streamed pieces are the returned text; biases (qwen2) survive."""
    pieces: list[str] = []
    first = generate(checkpoint, "The red fox", 12, device="cpu", on_text=pieces.append)
    again = generate(checkpoint, "The red fox", 12, device="cpu")
    assert first.text == again.text == "".join(pieces)
    assert first.new_tokens <= 12 and first.tokens_per_second > 0
    sampled = {generate(checkpoint, "The red fox", 12, 1.0, seed, "cpu").text for seed in (0, 0, 1)}
    assert len(sampled) == 2


@pytest.fixture(scope="module")
def llama_checkpoint(tiny_model: ModelMaker, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runtime") / "llama"
    duotone.quantize(tiny_model(), out, method="rtn", device="cpu")
    return out


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda c: c["quantization_config"].update(quant_method="gptq"), "found quant_method 'gptq'"),
        (
            lambda c: c["quantization_config"]["config_groups"]["group_0"]["weights"].update(num_bits=8),
            "quantization_config is",
        ),
        (lambda c: c["quantization_config"]["config_groups"]["group_0"]["weights"].update(group_size=64), "expected"),
        (lambda c: c.update(intermediate_size=384), r"mlp\.\w+_proj: found shape"),
        (lambda c: c.update(num_hidden_layers=1), "found no such linear"),
        (lambda c: c.update(num_hidden_layers=3), "found no tensor"),
        (lambda c: c.update(dtype="int8"), "found dtype 'int8'"),
        (lambda c: c.update(hidden_size="wide"), "transformers cannot build model_type 'llama'"),
    ],
)
def test_checkpoint_that_does_not_fit_is_refused(
    llama_checkpoint: Path, tmp_path: Path, damage: Callable[[dict], None], message: str
) -> None:
    """A config that contradicts the tensors is one sentence, not a model with random weights."""
    shutil.copytree(llama_checkpoint, tmp_path / "bad")
    config = json.loads((tmp_path / "bad" / "config.json").read_text())
    damage(config)
    (tmp_path / "bad" / "config.json").write_text(json.dumps(config))
    with pytest.raises(DuotoneError, match=message):
        load(tmp_path / "bad", device="cpu")


def test_unused_tensors_are_warned_of(tiny_model: ModelMaker, tmp_path: Path) -> None:
    """A tensor no module takes is not dropped in silence."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(tiny_model(), tmp_path / "extra")
    path = tmp_path / "extra" / "model.safetensors"
    save_file(load_file(path) | {"stray.weight": torch.zeros(2, 2)}, path, metadata={"format": "pt"})
    with pytest.warns(UserWarning, match=r"1 tensors are not used by the model, first stray\.weight"):
        load(tmp_path / "extra", device="cpu")


def test_devices_that_are_not_there() -> None:
    """A wish that cannot be met is a sentence with the way out."""
    with pytest.raises(DuotoneError, match="expected auto, cpu, cuda"):
        resolve_device("abacus")
    if not torch.cuda.is_available():
        with pytest.raises(DuotoneError, match="use --device cpu"):
            resolve_device("cuda")
