"""Models of diffusers: their folders and their classes, in the contract; what a folder of theirs may be that is none."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import duotone
from duotone.calibrate.samples import first_sample, input_shapes, read_samples
from duotone.checking import check
from duotone.checkpoint.hub import locate_model
from duotone.checkpoint.reader import WeightReader, packed_layers
from duotone.checkpoint.sidecar import recorded_inputs
from duotone.checkpoint.source import open_source
from duotone.contract import quantize_activations
from duotone.errors import DuotoneError
from duotone.models.anatomy import anatomy_of, anatomy_of_module
from duotone.models.diffusion import nested
from duotone.models.names import named_source
from duotone.models.rewrite import all_linears
from duotone.models.skeleton import build_skeleton
from duotone.qweight import QuantizedWeight, fp8_values
from duotone.runtime.linear import QuantizedLinear
from tests.models.denoisers import DENOISERS, denoiser, inputs_of

SETTINGS = {"group_size": 32, "device": "cpu"}


@pytest.fixture
def diffusers() -> Any:
    """The package."""
    return pytest.importorskip("diffusers", reason="needs the diffusers package (the extra diffusers)")


needs_diffusers = pytest.mark.usefixtures("diffusers")


def answer(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**nested(inputs), return_dict=False)[0]


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def furthest(model: nn.Module, weights: dict[str, QuantizedWeight], inputs: dict[str, Tensor]) -> float:
    """How far any quantized linear's output is from the contract written out in float64, on what the linear really reads."""
    apart: list[float] = []

    def compare(weight: QuantizedWeight) -> Any:
        def hook(linear: Any, given: tuple[Tensor, ...], output: Tensor) -> None:
            x8, scale = quantize_activations(given[0], weight.scheme.target, weight.input_scale)
            y = (x8.double() @ fp8_values(weight).double().T) * weight.outer_scale.double() * scale.double()
            apart.append(relative(output, y if linear.bias is None else y + linear.bias.double()))

        return hook

    for layer, weight in weights.items():
        model.get_submodule(layer).register_forward_hook(compare(weight))
    answer(model, inputs)
    assert len(apart) == len(weights)
    return max(apart)


def macs_of(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, int]:
    """Multiply-accumulates of every linear and convolution in one forward pass."""
    macs: dict[str, int] = {}

    def count(name: str) -> Any:
        def hook(module: Any, _: Any, output: Tensor) -> None:
            places = output.numel() // module.weight.shape[0]
            macs[name] = macs.get(name, 0) + places * module.weight.numel()

        return hook

    handles = [
        module.register_forward_hook(count(name))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    ]
    answer(model, inputs)
    for handle in handles:
        handle.remove()
    return macs


@needs_diffusers
@pytest.mark.parametrize("name", DENOISERS)
def test_folder(tmp_path: Path, name: str) -> None:
    """A folder of diffusers is quantized from samples of its inputs and loaded; the module given in Python is the same."""
    model, inputs = denoiser(name), inputs_of(name, 40)
    model.save_pretrained(tmp_path / "model")
    calibration = {key: tensor[:32].contiguous() for key, tensor in inputs.items()}
    save_file(calibration, tmp_path / "samples.safetensors")
    options = SETTINGS | {"method": "gptq"}
    report = duotone.quantize(
        tmp_path / "model", tmp_path / "out", calibration=(str(tmp_path / "samples.safetensors"),), samples=32, **options
    )
    held_out = {key: tensor[32:] for key, tensor in inputs.items()}
    macs = macs_of(model, held_out)
    names = [layer.layer if layer.layer in macs else layer.layer.removesuffix(".linear") for layer in report.layers]
    least = 0.8 if name.startswith("DiT") else 0.9  # a tiny DiT has much beside its blocks
    assert sum(macs[path] for path in names) >= least * sum(macs.values())
    found = duotone.load(tmp_path / "out", torch.float32, "cpu")
    assert type(found) is type(model)
    layers = {layer.layer for layer in report.layers}
    assert layers == {path for path, module in found.named_modules() if isinstance(module, QuantizedLinear)}
    given, expected = answer(found, held_out), answer(model, held_out)
    assert 0 < relative(given, expected) < 0.25
    source = open_source(tmp_path / "out")
    reader = WeightReader(named_source(source, build_skeleton(source.config, torch.float32)))
    weights = {layer: reader.read(layer) for layer in layers}
    assert furthest(found, weights, held_out) < 1e-5

    made = duotone.quantize_module(model, [nested(calibration)], **options)
    assert layers <= made.weights.keys()
    if not name.startswith("DiT"):  # whose blocks are walked one at a time in a folder
        assert all(torch.equal(made.weights[layer].codes, weights[layer].codes) for layer in layers)
    made.save(tmp_path / "saved")
    torch.manual_seed(1)
    fresh = type(model)(**DENOISERS[name]).eval()
    again = duotone.load_module(fresh, tmp_path / "saved", nested(calibration), device="cpu")
    assert torch.equal(answer(again, held_out), answer(made.module, held_out))


@needs_diffusers
def test_rounding_alone(tmp_path: Path) -> None:
    """`rtn` looks at no sample, but their shapes are needed to find out what reads what, when it is loaded too."""
    model, inputs = denoiser("SD3Transformer2DModel"), inputs_of("SD3Transformer2DModel", 2)
    model.save_pretrained(tmp_path / "model")
    save_file(inputs, tmp_path / "samples.safetensors")
    samples = (str(tmp_path / "samples.safetensors"),)
    duotone.quantize(tmp_path / "model", tmp_path / "out", method="rtn", calibration=samples, **SETTINGS)
    found = duotone.load(tmp_path / "out", torch.float32, "cpu")
    assert 0 < relative(answer(found, inputs), answer(model, inputs)) < 0.25


@needs_diffusers
def test_dit_goes_block_by_block(tmp_path: Path) -> None:
    """DiT's blocks are a chain; a projection that all its blocks' embedding runs twice, and the last one, stay."""
    denoiser("DiTTransformer2DModel").save_pretrained(tmp_path)
    save_file(inputs_of("DiTTransformer2DModel", 4), tmp_path / "samples.safetensors")
    config = open_source(tmp_path).config
    model = build_skeleton(config, torch.float32)
    anatomy = anatomy_of(config, model, first_sample([str(tmp_path / "samples.safetensors")]))
    assert [block.path for block in anatomy.blocks] == ["transformer_blocks.0", "transformer_blocks.1"]
    assert "output head" in anatomy.keep["proj_out_2"]
    assert "runs 2 times" in anatomy.keep["transformer_blocks.0.norm1.emb.timestep_embedder.linear_1"]
    (attention,) = [group for group in anatomy.blocks[1].shared_inputs if "transformer_blocks.1.attn1.to_q" in group]
    assert [layer.rpartition(".")[2] for layer in attention] == ["to_q", "to_k", "to_v"]


def test_pipeline(diffusers: Any, tmp_path: Path) -> None:
    """Of a pipeline its denoiser is quantized, in BF16 where asked; the result is a component of diffusers' own pipeline."""
    model = denoiser("UNet2DModel")
    whole = diffusers.DDPMPipeline(model, diffusers.DDPMScheduler(num_train_timesteps=10))
    whole.save_pretrained(tmp_path / "pipeline")
    # As large models are saved: in shards with an index.
    model.save_pretrained(tmp_path / "pipeline" / "unet", max_shard_size="200KB")
    (tmp_path / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    whole.set_progress_bar_config(disable=True)
    with duotone.note_inputs(model, tmp_path / "samples.safetensors"):
        whole(batch_size=4, num_inference_steps=5, generator=torch.Generator().manual_seed(1))
    noted = load_file(tmp_path / "samples.safetensors")
    assert noted["sample"].shape == (20, 3, 8, 8) and noted["timestep"].tolist() == [
        t for t in (8, 6, 4, 2, 0) for _ in range(4)
    ]
    report = duotone.quantize(
        tmp_path / "pipeline", tmp_path / "out", method="gptq", dtype="bfloat16",
        calibration=(str(tmp_path / "samples.safetensors"),), **SETTINGS,
    )  # fmt: skip
    assert any("one component" in note for note in report.notes)
    assert not list((tmp_path / "out").glob("diffusion_pytorch_model*"))
    assert "library_name: diffusers" in (tmp_path / "out" / "README.md").read_text()
    assert duotone.load(tmp_path / "out", device="cpu").dtype == torch.bfloat16
    unet = duotone.load(tmp_path / "out", torch.float32, "cpu")
    assert len(packed_layers(open_source(tmp_path / "out"))) == len(report.layers)
    pipeline = diffusers.DDPMPipeline.from_pretrained(tmp_path / "pipeline", unet=unet)
    pipeline.set_progress_bar_config(disable=True)
    found = pipeline(batch_size=1, num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np").images
    meant = whole(batch_size=1, num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np").images
    assert found.shape == (1, 8, 8, 3) and 0 < abs(found - meant).mean() < 0.1
    outcomes = {one.runtime: one for one in check(tmp_path / "out", gpus=["h100"])}
    assert [name for name, one in outcomes.items() if one.loads] == ["duotone"]
    assert "transformers alone" in outcomes["vllm"].reasons[0]


@needs_diffusers
def test_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sentences: no samples, samples of something else, no such class, a class that is no model, and no diffusers."""
    denoiser("UNet2DModel").save_pretrained(tmp_path / "unet")
    config = json.loads((tmp_path / "unet" / "config.json").read_text())
    with pytest.raises(DuotoneError, match=r"UNet2DModel: reads sample, timestep.*expected --calibration FILE.safetensors"):
        duotone.quantize(tmp_path / "unet", tmp_path / "out", **SETTINGS)
    save_file({"pixels": torch.zeros(2, 3, 8, 8)}, tmp_path / "samples.safetensors")
    with pytest.raises(DuotoneError, match="cannot be traced"):
        duotone.quantize(tmp_path / "unet", tmp_path / "out", calibration=(str(tmp_path / "samples.safetensors"),), **SETTINGS)
    assert not (tmp_path / "out").exists()
    for name in ("NoSuchModel", "DDPMScheduler", "ModelMixin.__init__"):
        with pytest.raises(DuotoneError, match=f"found _class_name '{name}', expected a model of diffusers"):
            build_skeleton(config | {"_class_name": name}, torch.float32)
    for wrong in (
        {"down_block_types": ["NoBlock"]},
        {"block_out_channels": [32]},
        {"norm_num_groups": 0},
        {"layers_per_block": "two"},
    ):
        with pytest.raises(DuotoneError, match="diffusers cannot build 'UNet2DModel'"):
            build_skeleton(config | wrong, torch.float32)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(DuotoneError, match=r"pip install 'duotone\[diffusers\]'"):
        build_skeleton(config, torch.float32)


def test_which_component(tmp_path: Path) -> None:
    """Of a pipeline the denoiser is meant; without one the sentence lists what is there."""
    for part in ("vae", "text_encoder"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "config.json").write_text("{}")
    assert locate_model(tmp_path) == tmp_path
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(DuotoneError, match="of text_encoder, vae, expected transformer or unet"):
        locate_model(tmp_path)
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text("{}")
    assert locate_model(tmp_path) == tmp_path / "transformer"


def test_inputs_are_recorded(tmp_path: Path) -> None:
    """A sample's shapes go from the file to the sidecar and back; a dict's entries have dotted names; nonsense is refused."""
    tensors = {"sample": torch.randn(6, 3, 4, 4), "kwargs.ids": torch.ones(6, 2, dtype=torch.int64)}
    save_file(tensors, tmp_path / "samples.safetensors")
    samples = read_samples([str(tmp_path / "samples.safetensors")], ["sample", "timestep", "kwargs"], 4, seed=0)
    (batch,) = samples.batches()
    assert list(batch) == ["sample", "kwargs"] and batch["kwargs"]["ids"].shape == (4, 2)
    shapes = input_shapes([str(tmp_path / "samples.safetensors")])
    assert shapes == {"sample": ["float32", 1, 3, 4, 4], "kwargs.ids": ["int64", 1, 2]} and input_shapes(["text.txt"]) == {}

    def recorded(inputs: object) -> dict[str, Tensor] | None:
        sidecar = {"format_version": 1, "inputs": inputs}
        (tmp_path / "duotone.json").write_text(json.dumps(sidecar))
        return recorded_inputs(tmp_path)

    assert recorded_inputs(tmp_path) is None and recorded(None) is None
    found, first = recorded(shapes), first_sample([str(tmp_path / "samples.safetensors")])
    assert found is not None and first is not None and found.keys() == first.keys()
    assert all(torch.equal(found[name], first[name]) and found[name].dtype == first[name].dtype for name in found)
    for bad in ({"x": ["float32", 1 << 40]}, {"x": ["float32", -1]}, {"x": ["os", 1]}, {"x": 3}, [1], {"x": ["int64"]}):
        with pytest.raises(DuotoneError, match="expected a dtype and sizes for each"):
            recorded(bad)


def test_notes_what_a_module_is_called_with(tmp_path: Path) -> None:
    """By position, by name and in dicts; what is one for all samples goes to each; calls that do not fit are refused."""

    class Reads(nn.Module):
        def forward(self, x: Tensor, step: Tensor, more: dict[str, Tensor] | None = None, flag: bool = True) -> Tensor:
            return x + step if flag and more is None else x

    file = tmp_path / "noted.safetensors"
    with duotone.note_inputs(module := Reads(), file):
        module(torch.ones(2, 3), torch.tensor(7), more={"ids": torch.arange(5)}, flag=False)
        module(torch.zeros(4, 3), step=torch.arange(4), more={"ids": torch.arange(5)})
    found = load_file(file)
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == {"x": (6, 3), "step": (6,), "more.ids": (6, 5)}
    assert found["step"].tolist() == [7, 7, 0, 1, 2, 3]
    for calls in ([], [(torch.ones(2, 3), torch.tensor(1)), (torch.ones(2, 4), torch.tensor(1))]):
        with pytest.raises(DuotoneError, match="Reads: "), duotone.note_inputs(module, file):
            for call in calls:
                module(*call)


def test_inputs_that_never_vary() -> None:
    """A guidance that is the same in every sample leaves a covariance of rounding errors: second moments stand in for it."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 64), nn.Linear(64, 32)).eval().requires_grad_(False)
    found = duotone.quantize_module(module, [torch.full((50, 64), 0.3) + torch.arange(64) / 64], **SETTINGS)
    assert len(found.report.layers) == 2
    x = torch.full((1, 64), 0.3) + torch.arange(64) / 64
    assert relative(found.module(x), module(x)) < 0.05


def test_heads_behind_a_move() -> None:
    """What gives the answer is found behind a change of places: DiT's patches put together, pixels shuffled into a picture."""

    class Patches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum("nhwpqc->nchpwq", self.head(self.body(x)).reshape(-1, 2, 2, 2, 2, 8)).reshape(-1, 8, 4, 4)

    larger = nn.Sequential(nn.Conv2d(16, 32, 1), nn.Conv2d(32, 64, 1), nn.PixelShuffle(2))
    all_linears(larger)
    assert "output head" in anatomy_of_module(Patches(), (torch.randn(3, 4, 32),), {}).keep["head"]
    assert list(anatomy_of_module(larger, (torch.randn(2, 16, 4, 4),), {}).keep) == ["1.linear"]
