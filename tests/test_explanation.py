"""`explain`: what it says from headers is what loading then does."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import duotone
from duotone.checkpoint.source import SourceFolder
from duotone.errors import DuotoneError
from duotone.explanation import explain_model
from duotone.kernels import cpu, dispatch, native, reference
from duotone.models.skeleton import find_linears
from duotone.runtime.linear import QuantizedLinear
from duotone.scheme import HOPPER, Scheme

ModelMaker = Callable[..., Path]
CPU = torch.device("cpu")
COMPILED = pytest.mark.skipif(not native.available(), reason=f"compiled linear: {native.unavailable()}")


def quantized(source: Path, out: Path, **options: Any) -> Path:
    """A checkpoint that takes no calibration text."""
    duotone.quantize(source, out, **({"method": "rtn", "group_size": 32, "device": "cpu"} | options))
    return out


@pytest.mark.parametrize("group_size", [32, 16], ids=["g32", "g16, which the compiled linear refuses"])
@pytest.mark.parametrize("options", [{}, {"tie_word_embeddings": True}], ids=["untied", "tied"])
def test_says_what_loading_does(tiny_model: ModelMaker, tmp_path: Path, group_size: int, options: dict[str, Any]) -> None:
    """Every linear, in module order: its backend, path and refusals are those of the loaded module, its shape too."""
    out = quantized(tiny_model(**options), tmp_path / "out", group_size=group_size)
    explanation, model = explain_model(out, "cpu"), duotone.load(out, device="cpu")
    linears = {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear | torch.nn.Linear)}
    assert [layer.layer for layer in explanation.layers] == list(linears)
    for layer in explanation.layers:
        module = linears[layer.layer]
        assert layer.shape == (module.out_features, module.in_features)
        if isinstance(module, QuantizedLinear):
            assert (layer.backend, layer.runs) == (module.backend.NAME, module.backend.describe(module.scheme))
            assert layer.refusals == (*module.refusals, *module.backend.path_refusals(module.scheme))
            assert (layer.scheme, layer.kept_because) == (f"w4a8 hopper g{group_size}", None)
        else:
            assert (layer.backend, layer.runs, layer.refusals) == ("nn.Linear", "torch's own linear in bfloat16", ())
            assert layer.scheme == ("tied" if options else "BF16")
            assert "output head" in (layer.kept_because or "")
    if group_size == 16 and native.available():
        assert explanation.kernels[0].refusals[0] == "cpu: group_size: found 16, expected a multiple of 32"


def test_shares_add_up(tiny_model: ModelMaker, tmp_path: Path) -> None:
    """Each kernel's share of the work is that of its layers; what is quantized is what duotone.json says is."""
    ignored = "model.layers.1.mlp.down_proj"
    out = quantized(tiny_model(), tmp_path / "out", ignore=(ignored,))
    explanation = explain_model(out, "cpu")
    ours, torchs = explanation.kernels
    sidecar = json.loads((out / "duotone.json").read_text())
    assert (ours.layers, torchs.layers) == (13, 2)
    assert ours.macs_share == pytest.approx(
        sidecar["quantized_macs_share"]
    ) and ours.macs_share + torchs.macs_share == pytest.approx(1)
    assert torchs.weights == 128 * 256 + 260 * 128
    assert torchs.macs_share == pytest.approx(torchs.weights / (ours.weights + torchs.weights))
    assert sum(layer.macs_share for layer in explanation.layers) == pytest.approx(1)
    reasons = {layer.layer: layer.kept_because for layer in explanation.layers if layer.kept_because}
    assert reasons.keys() == {"lm_head", ignored} and reasons[ignored] == f"ignored by the rule {ignored}"


def test_of_an_original(tiny_model: ModelMaker) -> None:
    """Nothing is quantized: all of it is torch's, and the reason says so."""
    explanation = explain_model(tiny_model(), "cpu")
    assert {layer.kept_because for layer in explanation.layers} == {"the model is not quantized"}
    assert [(kernel.backend, kernel.layers) for kernel in explanation.kernels] == [("nn.Linear", 2 * 7 + 1)]


def test_reads_no_weights(tiny_model: ModelMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the tensors only the logical shapes, two numbers a layer."""
    out = quantized(tiny_model(), tmp_path / "out")
    read: list[str] = []
    load = SourceFolder.load

    def noting(self: SourceFolder, names: Iterable[str]) -> dict[str, Tensor]:
        wanted = list(names)
        read.extend(wanted)
        return load(self, wanted)

    monkeypatch.setattr(SourceFolder, "load", noting)
    explain_model(out, "cpu")
    assert read and all(name.endswith(".weight_shape") for name in read)


def test_without_the_extension(tiny_model: ModelMaker, tmp_path: Path) -> None:
    """DUOTONE_NATIVE=0 in a process of its own: the torch fallback is named, and the reason."""
    out = quantized(tiny_model(), tmp_path / "out")
    command = [sys.executable, "-m", "duotone", "explain", str(out), "--device", "cpu", "--json"]
    environment = {**os.environ, "DUOTONE_NATIVE": "0"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, timeout=300)
    kernel = json.loads(done.stdout)["kernels"][0]
    assert (kernel["backend"], kernel["runs"]) == (reference.NAME, reference.describe(Scheme()))
    assert kernel["refusals"] == [
        "cpu: DUOTONE_NATIVE=0", "triton: runs on NVIDIA GPUs, not on cpu", "scaled_mm: multiplies FP8 weights, not 4-bit codes"
    ]  # fmt: skip
    assert kernel["layers"] == 14


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU, and this one has one")
def test_for_a_gpu_that_is_not_there() -> None:
    """The compiled linear is a CPU's, the kernels for GPUs want one; plain torch would run, and both say why not they."""
    verdict = dispatch.explain(Scheme(HOPPER, 128), torch.device("cuda"))
    assert verdict.backend == "torch" and verdict.refusals[0] == "cpu: runs on a CPU, not on cuda"
    assert verdict.refusals[1] in {
        "triton: found no NVIDIA GPU",
        "triton: the package triton is not installed; pip install 'triton>=3.6' brings it",
    }


@COMPILED
@pytest.mark.parametrize("path", cpu.paths() if native.available() else [])
def test_faster_paths_and_why_not(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every path faster than the one that runs is there once: asked not to, or lacking on this machine."""
    monkeypatch.setenv("DUOTONE_NATIVE", path)
    verdict = dispatch.explain(Scheme(HOPPER, 128), CPU)
    assert verdict.runs == f"compiled for CPUs, {path}"
    faster = list(cpu.PATHS[cpu.PATHS.index(path) + 1 :])
    reasons = {True: f"DUOTONE_NATIVE={path}", False: "this machine lacks it"}
    assert list(verdict.refusals) == [f"{name}: {reasons[name in cpu.paths()]}" for name in reversed(faster)]


def test_a_packed_weight_without_a_linear(tiny_model: ModelMaker, tmp_path: Path) -> None:
    """What loading refuses is not explained: a layer more than the config has."""
    out = Path(shutil.copytree(quantized(tiny_model(), tmp_path / "out"), tmp_path / "more"))
    tensors = load_file(out / "model.safetensors")
    extra = {name.replace("layers.1.", "layers.2."): tensor.clone() for name, tensor in tensors.items() if "layers.1." in name}
    save_file(tensors | extra, out / "model.safetensors", {"format": "pt"})
    for run in (explain_model, duotone.load):
        with pytest.raises(DuotoneError, match=r"holds a packed weight 'model\.layers\.2\..*', found no such linear"):
            run(out, device="cpu")


def test_linears_of_the_skeleton_are_those_of_the_model(tiny_model: ModelMaker) -> None:
    """The list begins with what the architecture has, not with what a file names."""
    source = tiny_model("qwen2")
    assert [layer.layer for layer in explain_model(source, "cpu").layers] == list(find_linears(duotone.load(source)))
