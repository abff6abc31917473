"""Modules given in Python: networks of convolutions, multilayer perceptrons and transformers that no table knows."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

import duotone
from duotone.calibrate.samples import are_tensors, read_samples
from duotone.contract import quantize_activations
from duotone.errors import DuotoneError
from duotone.models.convolutions import UnfoldedConv2d, is_linear
from duotone.models.norms import fold_norms
from duotone.modules import QuantizedModule
from duotone.qweight import fp8_values
from duotone.runtime.linear import QuantizedLinear

SETTINGS = {"group_size": 32, "device": "cpu"}


class Field(nn.Module):
    """A NeRF-like field: positions encoded, an input that comes in again half way, two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.ModuleList([nn.Linear(36, 64), nn.Linear(64, 64)])
        self.again = nn.Linear(100, 64)
        self.density, self.color = nn.Linear(64, 32), nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 20))
        self.never = nn.Linear(64, 64)

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        waves = [positions * 2**i for i in range(6)]
        x = encoded = torch.cat([f(wave) for wave in waves for f in (torch.sin, torch.cos)], -1)
        for layer in self.first:
            x = functional.relu(layer(x))
        x = functional.relu(self.again(torch.cat([x, encoded], -1)))
        return self.density(x).exp(), self.color(x)


class Residual(nn.Module):
    """Convolutions with batch norms, one of them behind an addition, in-place activations, a depthwise one, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32)
        self.conv1, self.norm1 = nn.Conv2d(32, 32, 3, stride=1, padding=1, bias=False), nn.BatchNorm2d(32)
        self.conv2, self.norm2 = nn.Conv2d(32, 32, 3, padding=2, dilation=2, bias=False), nn.BatchNorm2d(32)
        self.after, self.depthwise = nn.BatchNorm2d(32), nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.down, self.head = nn.Conv2d(32, 48, 1, stride=2), nn.Linear(48, 20)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu_(self.norm(self.stem(x)))
        y = functional.relu(self.norm1(self.conv1(x)), inplace=True)
        x = self.after(x + self.norm2(self.conv2(y)))
        return self.head(self.down(self.depthwise(x)).mean((-2, -1)))


def made(kind: type[nn.Module]) -> tuple[Any, list[Tensor]]:
    """A random module in eval mode, its batch norms in use, and calibration batches."""
    torch.manual_seed(0)
    module = kind().eval()
    for child in module.modules():
        if isinstance(child, nn.BatchNorm2d):
            for name, low, high in (
                ("running_mean", -0.3, 0.3),
                ("running_var", 0.5, 2),
                ("weight", 0.5, 1.5),
                ("bias", -1, 1),
            ):
                getattr(child, name).data.uniform_(low, high)
    batches = [torch.randn(4, 3, 12, 12) for _ in range(6)] if kind is Residual else [torch.randn(200, 3) for _ in range(6)]
    return module, batches


def flat(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    return torch.cat([part.flatten() for part in (output if isinstance(output, tuple) else (output,))])


def by_hand(quantized: QuantizedModule) -> nn.Module:
    """The module with the contract written out in float64 in each quantized linear."""
    for layer, weight in quantized.weights.items():
        linear = quantized.module.get_submodule(layer)

        def forward(x: Tensor, weight=weight, linear=linear) -> Tensor:
            x8, scale = quantize_activations(x, weight.scheme.target, weight.input_scale)
            y = (x8.double() @ fp8_values(weight).double().T) * weight.outer_scale.double() * scale.double()
            return (y if linear.bias is None else y + linear.bias.double()).float()

        linear.forward = forward
    return quantized.module


@pytest.mark.parametrize("target", ["hopper", "gaudi"])
@pytest.mark.parametrize("kind", [Field, Residual])
def test_runs_in_the_contract(kind: type[nn.Module], target: str) -> None:
    """The quantized module is the contract in every linear it reports; what it leaves alone is listed; the given one stays."""
    module, batches = made(kind)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    quantized = duotone.quantize_module(module, batches, target=target, **SETTINGS)
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    layers = {layer.layer for layer in quantized.report.layers}
    if kind is Field:
        assert layers == {"first.0", "first.1", "again", "color.0", "density"}
        assert quantized.report.kept.keys() == {"color.2", "never"}
    else:
        assert layers == {"conv1.linear", "conv2.linear", "down.linear"}
        assert "first layer" in quantized.report.kept["stem"] and "32 groups" in quantized.report.kept["depthwise"]
        assert isinstance(quantized.module.norm1, nn.Identity) and isinstance(quantized.module.after, nn.BatchNorm2d)
    assert all(isinstance(quantized.module.get_submodule(layer), QuantizedLinear) for layer in layers)
    found, original = flat(quantized.module(batches[0])), flat(module(batches[0]))
    expected = flat(by_hand(quantized)(batches[0]))
    assert ((found - expected).norm() / expected.norm()).item() < 2e-3
    assert 0 < ((found - original).norm() / original.norm()).item() < 0.2


@pytest.mark.parametrize("kind", [Field, Residual])
def test_calibration_is_worth_it(kind: type[nn.Module]) -> None:
    """`dpq` is nearer to the original than rounding on batches it has not seen."""
    module, batches = made(kind)
    distance = {}
    for method in ("rtn", "dpq"):
        quantized = duotone.quantize_module(module, batches[:5], method=method, **SETTINGS)
        distance[method] = (flat(quantized.module(batches[5])) - flat(module(batches[5]))).norm().item()
    assert distance["dpq"] < 0.8 * distance["rtn"]


@pytest.mark.parametrize("kind", [Field, Residual])
def test_saved_and_loaded(tmp_path: Path, kind: type[nn.Module]) -> None:
    """A folder brings back the same bits into a module of the same shape."""
    module, batches = made(kind)
    quantized = duotone.quantize_module(module, batches, **SETTINGS)
    quantized.save(tmp_path / "saved")
    torch.manual_seed(1)
    loaded = duotone.load_module(kind(), tmp_path / "saved", batches[0], device="cpu")
    assert torch.equal(flat(loaded(batches[0])), flat(quantized.module(batches[0])))
    with pytest.raises(DuotoneError, match="not empty"):
        quantized.save(tmp_path / "saved")
    other = Residual if kind is Field else Field
    with pytest.raises(DuotoneError, match="found None in the module"):
        duotone.load_module(other(), tmp_path / "saved", made(other)[1][0])


def test_named_and_several_inputs() -> None:
    """Batches may be dicts or tuples; what is called twice is left alone with its reason."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared, self.once, self.head = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, left: Tensor, right: Tensor) -> Tensor:
            return self.head(self.once(self.shared(left) * self.shared(right)).relu())

    torch.manual_seed(0)
    module, pairs = Twice().eval(), [(torch.randn(64, 32), torch.randn(64, 32)) for _ in range(3)]
    found = duotone.quantize_module(module, pairs, **SETTINGS)
    same = duotone.quantize_module(module, [{"left": left, "right": right} for left, right in pairs], **SETTINGS)
    assert [layer.layer for layer in found.report.layers] == ["once"]
    assert found.report.kept["shared"] == "runs 2 times in one forward pass"
    assert torch.equal(found.weights["once"].codes, same.weights["once"].codes)


@pytest.mark.parametrize(
    ("batches", "options", "message"),
    [
        ([], {}, "no calibration batch"),
        (["text"], {}, "of type str"),
        ([torch.randn(4, 5)], {}, "cannot be run on a calibration batch"),
        ([torch.randn(4, 3)], {"effort": "high"}, "expected a language model"),
        ([torch.full((4, 3), float("nan"))], {}, "not finite"),
        ([torch.randn(4, 3)], {"ignore": ("nothing",)}, "matches no linear"),
    ],
)
def test_refuses(batches: list[Any], options: dict[str, Any], message: str) -> None:
    """Bad batches and options end in a sentence."""
    with pytest.raises(DuotoneError, match=message):
        duotone.quantize_module(made(Field)[0], batches, **SETTINGS, **options)


@settings(max_examples=60, deadline=None)
@given(
    channels=st.sampled_from([16, 17, 32]),
    outputs=st.integers(1, 9),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.integers(1, 3),
    padding=st.integers(0, 3),
    dilation=st.integers(1, 2),
    bias=st.booleans(),
    size=st.tuples(st.integers(8, 13), st.integers(8, 13)),
)
def test_unfolded_equals_the_convolution(
    channels: int,
    outputs: int,
    kernel: tuple[int, int],
    stride: int,
    padding: int,
    dilation: int,
    bias: bool,
    size: tuple[int, int],
) -> None:
    """im2col and one product give what torch's own convolution gives."""
    conv = nn.Conv2d(channels, outputs, kernel, stride, padding, dilation, bias=bias).double()
    x = torch.randn(2, channels, *size, dtype=torch.float64)
    assert is_linear(conv)
    torch.testing.assert_close(UnfoldedConv2d(conv)(x), conv(x))


def test_norms_fold_where_they_alone_read() -> None:
    """Folding changes nothing but rounding, and leaves the norm behind an addition and a convolution that two read."""
    module, batches = made(Residual)
    expected = module.double()(batches[0].double())
    assert fold_norms(module, (batches[0].double(),), {}) == ["norm", "norm1", "norm2"]
    torch.testing.assert_close(module(batches[0].double()), expected)

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return self.norm(y) + y

    assert fold_norms(Shared().eval(), (torch.randn(2, 16, 4, 4),), {}) == []


def test_norms_fold_into_what_wrote_their_input() -> None:
    """Not into what later lay in its place: a convolution's output where the sum was that a norm read, and let go."""

    class Behind(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norms = nn.ModuleList(nn.BatchNorm2d(16) for _ in range(20))
            self.convs = nn.ModuleList(nn.Conv2d(16, 16, 1) for _ in range(20))

        def forward(self, x: Tensor) -> Tensor:
            for norm, conv in zip(self.norms, self.convs, strict=True):
                x = conv(norm(x + 1).relu())
            return x

    assert fold_norms(Behind().eval(), (torch.randn(2, 16, 4, 4),), {}) == []


def test_samples_from_files(tmp_path: Path) -> None:
    """Tensors by the model's input names; a wrong name, shapes that do not belong together, NaN and other kinds are named."""
    good, values = tmp_path / "a.safetensors", torch.randn(10, 3, 4, 4)
    save_file({"pixel_values": values}, good)
    samples = read_samples([str(good), str(good)], ["pixel_values", "labels"], 12, seed=0)
    assert len(samples) == 12 == sum(len(batch["pixel_values"]) for batch in samples.batches())
    assert all((values == row).flatten(1).all(1).any() for row in samples.tensors["pixel_values"])
    assert "holds 10 samples" in read_samples([str(good)], ["pixel_values"], 12, seed=0).notes[0]
    assert are_tensors([str(good)]) and not are_tensors(["text.txt"])
    with pytest.raises(DuotoneError, match="alone, or none"):
        are_tensors([str(good), "text.txt"])
    bad = tmp_path / "b.safetensors"
    for tensors, message in (
        ({"pixels": values}, r"\['pixels'\], expected inputs of the model: pixel_values"),
        ({"pixel_values": values, "labels": values[:3].clone()}, "same first dimension"),
        ({"pixel_values": values / 0}, "NaN or infinite"),
    ):
        save_file(tensors, bad)
        with pytest.raises(DuotoneError, match=message):
            read_samples([str(bad)], ["pixel_values", "labels"], 4, seed=0)
    bad.write_bytes(b"nothing")
    with pytest.raises(DuotoneError, match="cannot be read as safetensors"):
        read_samples([str(bad)], ["pixel_values"], 4, seed=0)
