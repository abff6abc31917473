"""vLLM's own loading code on a CPU that it takes for an H100: what its W4A8 kernel would be given of a checkpoint.

    .venvs/vllm/bin/python -O vllm_loader.py CHECKPOINT OUT.safetensors --ranks 1 2 [--plugin]

--plugin: on a CPU that it takes for an L40S, with Duotone's plugin, which takes the checkpoint by itself: what QuantizedLinear
has.

Real: config parsing, choice of scheme and kernel, the fused linears with their weight loaders and tensor parallelism, the
split of scales at load, and the scales of an FP8 cache through the loader of whole models into attention's own. Emulated,
because it is CUDA code: the reordering of nibbles (left out), the table of eight products for each scale (FP8 of scale times
level). -O: asserts want CUDA tensors. Packages that only other parts of vLLM need are stand-ins.
"""

import argparse
import contextlib
import copy
import importlib.abc
import importlib.machinery
import json
import os
import sys
import types
from pathlib import Path
from typing import Any
from unittest import mock

os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
#: Imported by vLLM's servers and structured output, never called here.
_STAND_INS = {"llguidance", "xgrammar", "openai_harmony", "uvloop", "mistral_common", "tvm_ffi"}


class _Module(types.ModuleType):
    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__ = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = type(name, (), {}) if name[:1].isupper() else mock.MagicMock()
        setattr(self, name, value)
        return value


class _StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Comes last: for packages that are not installed."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        del path, target
        wanted = name.partition(".")[0] in _STAND_INS
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if wanted else None

    def create_module(self, spec: Any) -> types.ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        del module


sys.meta_path.append(_StandIns())

import torch  # noqa: E402
import vllm.platforms  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from vllm.platforms.cpu import CpuPlatform  # noqa: E402
from vllm.platforms.interface import DeviceCapability, PlatformEnum  # noqa: E402

#: Of an H100, or of an L40S.
_CAPABILITY = (8, 9) if "--plugin" in sys.argv else (9, 0)


class _Gpu(CpuPlatform):
    """A CPU that answers as a GPU."""

    _enum = PlatformEnum.CUDA

    def is_cuda(self) -> bool:
        return True

    @classmethod
    def get_device_capability(cls, device_id: int = 0) -> DeviceCapability:
        del device_id
        return DeviceCapability(*_CAPABILITY)

    @classmethod
    def fp8_dtype(cls) -> torch.dtype:
        return torch.float8_e4m3fn


vllm.platforms._current_platform = CpuPlatform()  # while modules are imported, some of which look for CUDA operations

from vllm import _custom_ops as ops  # noqa: E402
from vllm.config import VllmConfig, set_current_vllm_config  # noqa: E402
from vllm.model_executor import parameter  # noqa: E402
from vllm.model_executor.kernels.linear.mixed_precision import cutlass  # noqa: E402
from vllm.model_executor.layers import linear as linears  # noqa: E402
from vllm.model_executor.layers.attention import attention  # noqa: E402
from vllm.model_executor.layers.quantization import get_quantization_config  # noqa: E402
from vllm.model_executor.layers.quantization.compressed_tensors import compressed_tensors  # noqa: E402
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig  # noqa: E402
from vllm.model_executor.layers.quantization.input_quant_fp8 import QuantFP8  # noqa: E402
from vllm.model_executor.models.llama import LlamaModel  # noqa: E402
from vllm.model_executor.models.utils import AutoWeightsLoader  # noqa: E402

from duotone.vllm_plugin import register  # noqa: E402

vllm.platforms._current_platform.__class__ = _Gpu  # they hold the object

#: As vLLM's Llama has them: the fused linear, its shards with their names in it.
_FUSED = {
    "self_attn.qkv_proj": (("q_proj", "q"), ("k_proj", "k"), ("v_proj", "v")),
    "self_attn.o_proj": (("o_proj", None),),
    "mlp.gate_up_proj": (("gate_proj", 0), ("up_proj", 1)),
    "mlp.down_proj": (("down_proj", None),),
}


def main() -> None:
    """Every layer on every rank of each number of ranks."""
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--plugin", action="store_true")
    arguments = parser.parse_args()
    config = json.loads((arguments.checkpoint / "config.json").read_text())
    tensors = {name: tensor for file in arguments.checkpoint.glob("*.safetensors") for name, tensor in load_file(file).items()}
    found: dict[str, Tensor] = {}
    for ranks in arguments.ranks:
        for rank in range(ranks):
            with _parallel(rank, ranks), _emulated(), set_current_vllm_config(VllmConfig()):
                for index in range(config["num_hidden_layers"]):
                    for path in _FUSED:
                        prefix = f"model.layers.{index}.{path}"
                        quantization = _quantization(arguments.checkpoint, config, arguments.plugin)
                        values, channel = _loaded(prefix, config, tensors, quantization)
                        found |= {f"{ranks}.{rank}.{prefix}.values": values, f"{ranks}.{rank}.{prefix}.channel": channel}
                scales = {} if arguments.plugin else _cache_scales(config, tensors, ranks)
                found |= {f"{ranks}.{rank}.{name}": scale for name, scale in scales.items()}
    save_file(found, arguments.out, {"vllm": vllm.__version__})


def _quantization(checkpoint: Path, config: dict[str, Any], plugin: bool) -> CompressedTensorsConfig:
    """vLLM's config of a checkpoint, or the plugin's where it is registered and says that it takes it."""
    kind, stored = CompressedTensorsConfig, copy.deepcopy(config["quantization_config"])
    if plugin:
        register()
        kind = get_quantization_config("duotone")
        if kind.override_quantization_method(stored, None) != "duotone":
            raise SystemExit("the plugin leaves this checkpoint to vLLM")
    quantization = kind.from_config(stored)
    quantization.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
    quantization.maybe_update_config(str(checkpoint))
    return quantization


def _loaded(
    prefix: str, config: dict[str, Any], tensors: dict[str, Tensor], quantization: CompressedTensorsConfig
) -> tuple[Tensor, Tensor]:
    """FP8 weights [N, K] as float32 and channel scales [N, 1], from vLLM's layer."""
    layer = _layer(prefix, config, quantization)
    parent, path = prefix.rpartition(".")[0], ".".join(prefix.split(".")[3:])
    for name, shard in _FUSED[path]:
        for part in ("weight_packed", "weight_scale", "weight_shape"):
            given = layer.get_parameter(part)
            shards = () if shard is None else (shard,)
            given.weight_loader(given, tensors[f"{parent}.{name}.{part}"], *shards)
    layer.quant_method.process_weights_after_loading(layer)
    if hasattr(layer, "duotone"):
        parts = [(part.backend.values(part._packed), part._packed.outer_scale) for part in layer.duotone]
        return torch.cat([values for values, _ in parts]), torch.cat([outer.expand(len(values)) for values, outer in parts])
    words_KN, scale_GN = layer.weight_packed.data, layer.weight_scale.data
    nibble = (words_KN.unsqueeze(1) >> torch.arange(0, 32, 4).view(1, 8, 1)) & 15
    level_KN = (nibble - 16 * (nibble > 7)).flatten(0, 1).float()
    scale_KN = scale_GN.float().repeat_interleave(128, 0)
    return (level_KN * scale_KN).to(torch.float8_e4m3fn).float().T.contiguous(), layer.weight_chan_scale.data.contiguous()


def _cache_scales(config: dict[str, Any], tensors: dict[str, Tensor], ranks: int) -> dict[str, Tensor]:
    """What attention divides keys and values by, as it lies there once a model of nothing but attention has been loaded."""
    stored = dict(config["quantization_config"])
    if stored.get("kv_cache_scheme") is None:
        return {}
    heads = config["num_key_value_heads"]
    stored |= {"total_num_heads": config["num_attention_heads"], "total_num_kv_heads": heads}  # as get_quant_config does
    root, layers = nn.Module(), nn.ModuleList()
    root.quant_config = CompressedTensorsConfig.from_config(stored)
    for index in range(config["num_hidden_layers"]):
        attn = attention.Attention.__new__(attention.Attention)  # its __init__ looks for CUDA's kernels
        nn.Module.__init__(attn)
        attn.num_kv_heads, attn.kv_cache_dtype = max(1, heads // ranks), "fp8"
        attention._init_kv_cache_quant(attn, root.quant_config, f"model.layers.{index}.self_attn.attn")
        layers.append(nn.Module())
        layers[index].self_attn = nn.Module()
        layers[index].self_attn.attn = attn
    root.model = nn.Module()
    root.model.layers = layers
    given = [(name, tensor) for name, tensor in tensors.items() if name.endswith(("k_scale", "v_scale"))]
    loaded = AutoWeightsLoader(root).load_weights(given, mapper=LlamaModel.hf_to_vllm_mapper)
    if len(loaded) != 2 * len(layers):
        raise SystemExit(f"vLLM loaded {len(loaded)} scales of the cache, expected {2 * len(layers)}")
    found: dict[str, Tensor] = {}
    for index, layer in enumerate(layers):
        attn = layer.self_attn.attn
        attn.quant_method.process_weights_after_loading(attn)
        for part in ("k_scale", "v_scale"):
            found[f"model.layers.{index}.self_attn.{part}"] = getattr(attn, f"_{part}").detach().clone().reshape(-1)
    return found


def _layer(prefix: str, config: dict[str, Any], quantization: Any) -> nn.Module:
    hidden, wide, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    dim = config.get("head_dim") or hidden // heads
    common = {"bias": False, "quant_config": quantization, "prefix": prefix, "params_dtype": torch.bfloat16}
    if prefix.endswith("qkv_proj"):
        return linears.QKVParallelLinear(hidden, dim, heads, config["num_key_value_heads"], **common)
    if prefix.endswith("gate_up_proj"):
        return linears.MergedColumnParallelLinear(hidden, [wide, wide], **common)
    return linears.RowParallelLinear(heads * dim if prefix.endswith("o_proj") else wide, hidden, **common)


def _parallel(rank: int, ranks: int) -> Any:
    """A rank of several, without the others."""
    answers = {"get_tensor_model_parallel_rank": rank, "get_tensor_model_parallel_world_size": ranks}
    stack = contextlib.ExitStack()
    for module in (linears, parameter, compressed_tensors):
        for name, answer in answers.items():
            stack.enter_context(mock.patch.object(module, name, lambda answer=answer: answer))
    return stack


def _emulated() -> Any:
    """The CUDA operations of loading."""
    stack = contextlib.ExitStack()
    stack.enter_context(mock.patch.object(ops, "cutlass_encode_and_reorder_int4b", lambda words: words, create=True))
    for name in ("cutlass_scaled_mm_supports_fp8", "cutlass_scaled_mm_supports_block_fp8"):
        stack.enter_context(mock.patch.object(ops, name, lambda _: True))
    stack.enter_context(mock.patch.object(ops, "cutlass_pack_scale_fp8", lambda scale: scale, create=True))
    stack.enter_context(mock.patch.object(cutlass.torch.accelerator, "synchronize", lambda: None))
    stack.enter_context(mock.patch.object(QuantFP8, "forward", QuantFP8.forward_native))
    return stack


if __name__ == "__main__":
    main()
