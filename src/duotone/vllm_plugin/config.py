# Shapes: M tokens, N out_features of a process, K in_features of a process.
# pyright: reportMissingImports=false
"""vLLM's side: its compressed-tensors config with our linear. Written for vLLM 0.32 and 0.33.

What vLLM does with such a checkpoint stays its own: which layers are quantized, how weights are fused and dealt to processes,
the scales of an FP8 cache. Exchanged is the scheme, which vLLM would look for in vain.
"""

import logging
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
from vllm.model_executor.parameter import (
    BasevLLMParameter,
    ChannelQuantScaleParameter,
    ModelWeightParameter,
    PackedColumnParameter,
    PackedvLLMParameter,
)
from vllm.platforms import current_platform
from vllm.transformers_utils.repo_utils import get_hf_file_to_dict

from duotone.checkpoint.compressed_tensors import SideScales, scheme_from_config
from duotone.checkpoint.sidecar import SIDECAR, checked_sidecar, layer_scales
from duotone.errors import DuotoneError
from duotone.kernels import reference
from duotone.runtime.linear import QuantizedLinear, share_call
from duotone.scheme import AnyScheme, Fp8Scheme, Scheme
from duotone.vllm_plugin import NAME
from duotone.vllm_plugin.shares import Share, is_left_to_vllm, weights_of

#: Below vLLM's, so that its handlers write what is said here.
_LOG = logging.getLogger("vllm.duotone")
_said: set[str] = set()


class DuotoneConfig(CompressedTensorsConfig):
    """The `quantization_config` of a W4A8 checkpoint, `pack-quantized` or `duotone-gaudi`; some linears may be in FP8."""

    w4a8: Scheme
    #: Of `gaudi`, by the names of vLLM's modules.
    sides: dict[str, SideScales]

    def get_name(self) -> str:
        """As vLLM knows it."""
        return NAME

    @classmethod
    def get_min_capability(cls) -> int:
        """Of NVIDIA's devices: none, torch's operations run on all."""
        return 0

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "DuotoneConfig":
        """Raises DuotoneError for settings that are not W4A8."""
        scheme = scheme_from_config(config)
        made = super().from_config(config)
        made.w4a8, made.sides = scheme, {}
        return made

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """`duotone` for what it takes. Raises DuotoneError for `--quantization duotone` with a checkpoint that is not W4A8."""
        del hf_config
        try:
            scheme = scheme_from_config(hf_quant_cfg)
        except DuotoneError:
            if user_quant == NAME:
                raise
            return None
        device = current_platform.get_device_capability()
        capability = None if device is None else (device.major, device.minor)
        return NAME if user_quant == NAME or (user_quant is None and not is_left_to_vllm(scheme, capability)) else None

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Read the scales that the target `gaudi` keeps beside the weights. Raises DuotoneError where they are missing."""
        del hf_config
        if self.w4a8.target.channel_outer_scale:
            return
        sidecar = get_hf_file_to_dict(SIDECAR, model_name, revision)
        if sidecar is None:
            raise DuotoneError(f"{model_name}: found no {SIDECAR}, expected the scales of target {self.w4a8.target.name} there")
        layers = checked_sidecar(sidecar, f"{model_name}/{SIDECAR}").get("layers", {})
        found = {name: layer_scales(sidecar, name) for name in layers}
        self.sides = {name: scales for name, scales in found.items() if scales is not None}

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """The file's names of layers become those of vLLM's modules."""
        super().apply_vllm_mapper(hf_to_vllm_mapper)
        renamed = {hf_to_vllm_mapper._map_name(name): scales for name, scales in self.sides.items()}
        self.sides = {name: scales for name, scales in renamed.items() if name is not None}

    def get_scheme(self, layer: nn.Module, layer_name: str | None = None) -> "DuotoneScheme | None":
        """Ours for every quantized linear, None for the others."""
        weights: Any = (self.get_scheme_dict(layer, layer_name) or {}).get("weights")
        if weights is None:
            return None
        return DuotoneScheme(self, layer_name or "", self.w4a8 if weights.num_bits == 4 else Fp8Scheme(self.w4a8.target))

    def sides_of(self, layer_name: str) -> list[SideScales | None]:
        """Of each linear that is fused in one of vLLM's."""
        parent, _, leaf = layer_name.rpartition(".")
        if layer_name in self.sides:  # fused in the file already: one tensor, one scale
            return [self.sides[layer_name]] * max(1, len(self.packed_modules_mapping.get(leaf, ())))
        names = self.packed_modules_mapping.get(leaf, [leaf])
        return [self.sides.get(f"{parent}.{name}" if parent else name) for name in names]


class DuotoneScheme:
    """What vLLM's CompressedTensorsLinearMethod asks of a scheme: parameters to load, what becomes of them, the product."""

    def __init__(self, config: DuotoneConfig, layer_name: str, scheme: AnyScheme) -> None:
        """layer_name: of vLLM's module, which may be several linears."""
        self._config, self._name, self._scheme = config, layer_name, scheme
        self._share: Share | None = None

    def create_weights(
        self,
        layer: Any,
        input_size: int,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        **options: Any,
    ) -> None:
        """The tensors of the file, as this process loads them."""
        start = layer.tp_rank * input_size_per_partition if input_size != input_size_per_partition else 0
        share = Share(self._name, tuple(output_partition_sizes), input_size_per_partition, input_size, start, self._scheme)
        self._share = share
        for name, shape in share.shapes.items():
            layer.register_parameter(name, _parameter(name, shape, options["weight_loader"]))
        if "weight_packed" in share.shapes:
            shape = BasevLLMParameter(data=torch.empty(2, dtype=torch.int64), weight_loader=options["weight_loader"])
            layer.register_parameter("weight_shape", shape)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Put QuantizedLinears in the place of the parameters. Raises DuotoneError for scales that are not valid."""
        assert self._share is not None
        stored = {name: layer.get_parameter(name).data for name in self._share.shapes}
        sides = self._config.sides_of(self._name)
        parts = nn.ModuleList(
            QuantizedLinear(weight, None, weight.outer_scale.device) for weight in weights_of(self._share, stored, sides)
        )
        for name in [name for name, _ in layer.named_parameters() if name.startswith("weight")]:
            delattr(layer, name)
        share_call(list(parts))
        layer.duotone = parts
        _say(parts[0])

    def apply_weights(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [M, K] -> [M, N] in x's dtype; the bias is added after the rounding to it."""
        outputs = [part(x) for part in layer.duotone]
        y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
        return y if bias is None else y + bias


def _parameter(name: str, shape: tuple[int, int], loader: Any) -> BasevLLMParameter:
    """What vLLM loads one of the file's tensors into: how ranks and fused linears divide it."""
    common = {"weight_loader": loader, "output_dim": 0}
    if name == "weight":
        return ModelWeightParameter(data=torch.empty(shape, dtype=torch.float8_e4m3fn), input_dim=1, **common)
    if name == "weight_packed":
        words = torch.empty(shape, dtype=torch.int32)
        return PackedvLLMParameter(data=words, input_dim=1, packed_dim=1, packed_factor=8, **common)
    # Without an input_dim: all columns' on every process.
    if name == "weight_scale":
        return ChannelQuantScaleParameter(data=torch.empty(shape, dtype=torch.bfloat16), **common)
    return PackedColumnParameter(data=torch.empty(shape, dtype=torch.int32), packed_dim=0, packed_factor=8, **common)


def _say(linear: nn.Module) -> None:
    """Once in a process and for each backend: what runs, and why nothing faster does."""
    assert isinstance(linear, QuantizedLinear)
    runs = linear.backend.describe(linear.scheme)
    if runs in _said:
        return
    _said.add(runs)
    slow = linear.backend is reference
    why = f" ({'; '.join(linear.refusals)})" if slow else ""
    _LOG.log(logging.WARNING if slow else logging.INFO, "Duotone runs W4A8 linears: %s%s", runs, why)
