# Shapes: N out_features, K in_features, G groups along K.
"""A checkpoint that `duotone export` wrote, read by the tool whose layout it is; runs in that tool's environment.

    PYTHON read_layout.py READER FOLDER OUT.npz

OUT gets what the tool makes of each linear, float32 [N, K] by its name, and the tool's version. Of llama.cpp, which shows no
weights, it gets the logits of TOKENS instead.

- gptqmodel: `GPTQModel.load` on a CPU; each module's own `dequantize_weight`.
- inc: Neural Compressor's `load(format="huggingface")`; each module's own `recover()`, which is level * scale in FP16, and its
  `scale_bf16_to_fp8`. On Gaudi an FP8 cast of the first comes in between (`convert_from_uint4`): the caller does it.
- modelopt: it has no reader of W4A8_AWQ for a CPU, only TensorRT-LLM does. Its own writer packs what the file means,
  `to_quantized_weight` of level * scale with the file's scales, and has to come to the file's bytes; its converter of
  hf_quant_config.json has to come to what config.json says. What is written out is read by the inverse of that packing.
- llamacpp: llama-cpp-python on the .gguf file.
"""

import contextlib
import importlib.metadata
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

TOKENS = [(7 * i + 3) % 250 for i in range(48)]


def gptqmodel(folder: Path) -> dict[str, Any]:
    """On two cores its pool of workers is too small for its loader, see gptqmodel_peer.py."""
    if (os.cpu_count() or 1) < 3:
        os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    from gptqmodel import BACKEND, GPTQModel

    model = GPTQModel.load(str(folder), device="cpu", backend=BACKEND.TORCH)
    linears = {name: module for name, module in model.model.named_modules() if hasattr(module, "dequantize_weight")}
    return {name: module.dequantize_weight().T for name, module in linears.items()}


def inc(folder: Path) -> dict[str, Any]:
    """The tool's loader builds the model, replaces linears that have a qweight, and unpacks them."""
    from neural_compressor.torch.quantization import load

    model = load(str(folder), format="huggingface", device="cpu")
    if not getattr(model, "dpq_quantized", False):
        raise SystemExit("Neural Compressor does not take it for a DPQ checkpoint")
    found = {}
    for name, module in model.named_modules():
        if hasattr(module, "recover"):
            found[name], found[f"{name}.outer"] = module.recover(), module.scale_bf16_to_fp8
    return found


def modelopt(folder: Path) -> dict[str, Any]:
    """Packing by the tool's own code, of the weights that the file means."""
    import torch
    from modelopt.torch.export.convert_hf_config import convert_hf_quant_config_format
    from modelopt.torch.export.quant_utils import QUANTIZATION_W4A8_AWQ, to_quantized_weight
    from safetensors.torch import load_file

    stored = json.loads((folder / "hf_quant_config.json").read_text())
    ours = json.loads((folder / "config.json").read_text())["quantization_config"]
    theirs = convert_hf_quant_config_format(stored)
    for key in ("quant_method", "quant_algo", "ignore"):
        if theirs[key] != ours[key]:
            raise SystemExit(f"config.json has {key} {ours[key]!r}, ModelOpt makes {theirs[key]!r} of hf_quant_config.json")
    tensors: dict[str, Any] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    size, found = stored["quantization"]["group_size"], {}
    for name in (name.removesuffix(".weight_scale_2") for name in tensors if name.endswith(".weight_scale_2")):
        packed, scale = tensors[f"{name}.weight"], tensors[f"{name}.weight_scale"]
        level = torch.stack((packed & 15, packed >> 4), 1).flatten(0, 1).to(torch.int8)
        weight = (level - 16 * (level > 7)).float() * scale.repeat_interleave(size, 1)
        outer = tensors[f"{name}.weight_scale_2"]
        again = to_quantized_weight(weight, scale, QUANTIZATION_W4A8_AWQ, outer, size)
        if not torch.equal(again, packed):
            raise SystemExit(f"{name}: ModelOpt packs its weights into other bytes")
        found[name], found[f"{name}.outer"] = weight, outer
    return found


def llamacpp(folder: Path) -> dict[str, Any]:
    """Logits float32 [tokens, vocabulary]."""
    import llama_cpp

    (file,) = folder.glob("*.gguf")
    model = llama_cpp.Llama(str(file), n_ctx=len(TOKENS) + 8, n_threads=1, verbose=False, logits_all=True)
    model.eval(TOKENS)
    return {"logits": np.array(model.scores[: len(TOKENS)], dtype=np.float32)}


#: reader -> (its package, function)
READERS: dict[str, tuple[str, Callable[[Path], dict[str, Any]]]] = {
    "gptqmodel": ("GPTQModel", gptqmodel),
    "inc": ("neural-compressor-pt", inc),
    "modelopt": ("nvidia-modelopt", modelopt),
    "llamacpp": ("llama-cpp-python", llamacpp),
}


@contextlib.contextmanager
def _elsewhere() -> Iterator[None]:
    """Some tools leave folders where they run."""
    with tempfile.TemporaryDirectory() as scratch, contextlib.chdir(scratch):
        yield


def main() -> None:
    """Read, and write what was read as .npz: numpy is in every environment."""
    reader, folder, out = sys.argv[1], Path(sys.argv[2]).absolute(), Path(sys.argv[3]).absolute()
    package, read = READERS[reader]
    with _elsewhere():
        found = read(folder)
    arrays = {name: value if isinstance(value, np.ndarray) else value.detach().float().numpy() for name, value in found.items()}
    np.savez(out, version=importlib.metadata.version(package), **arrays)


if __name__ == "__main__":
    main()
