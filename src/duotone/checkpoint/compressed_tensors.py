# Shapes: N out_features, K in_features, G groups along K.
"""The layout vLLM and transformers read: compressed-tensors `pack-quantized` (FORMATS.md section 1), and its `gaudi` variant.

Linears in FP8 lie beside in compressed-tensors' `float-quantized`: the values, and the outer scale as `weight_scale`.

`hopper`: the file holds the one BF16 product of group and outer scale; every reader splits it back bit for bit.
`gaudi`: the file holds the BF16 group scale alone; outer scale and static activation scale live in duotone.json. A reader
that ignored them would compute garbage, so the variant carries a `format` of its own, which every such reader refuses.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from duotone.checkpoint.headers import TensorSpec
from duotone.checkpoint.kv_cache import kv_cache_scheme
from duotone.checkpoint.packing import pack_int4, unpack_int4
from duotone.contract import join_scale, split_scale
from duotone.errors import DuotoneError
from duotone.qweight import AnyWeight, Fp8Weight, QuantizedWeight
from duotone.scheme import GAUDI, HOPPER, AnyScheme, Fp8Scheme, Scheme, Target

#: Version of compressed-tensors whose config this is; informative in the file.
_FORMAT_VERSION = "0.19.0"
_METHOD = "compressed-tensors"
_FORMAT_OF_TARGET = {HOPPER.name: "pack-quantized", GAUDI.name: "duotone-gaudi"}
_FP8_FORMAT_OF_TARGET = {HOPPER.name: "float-quantized", GAUDI.name: "duotone-gaudi-fp8"}
#: What compressed-tensors calls a checkpoint whose groups differ in format.
_MIXED = "mixed-precision"
_ZERO_CODE = 8


@dataclass(frozen=True)
class SideScales:
    """What the one file scale cannot hold (gaudi): the power-of-two outer scale and the static activation scale."""

    outer_scale: float
    input_scale: float


def tensor_specs(layer: str, shape: tuple[int, int], scheme: AnyScheme) -> dict[str, TensorSpec]:
    """Names, dtypes and shapes that `to_tensors` will give for a weight [N, K]; no arithmetic."""
    rows, columns = shape
    if isinstance(scheme, Fp8Scheme):
        values = {f"{layer}.weight": TensorSpec("F8_E4M3", shape)}
        return values | ({f"{layer}.weight_scale": TensorSpec("BF16", (rows, 1))} if scheme.target.channel_outer_scale else {})
    groups = scheme.groups(columns)
    specs = {
        f"{layer}.weight_packed": TensorSpec("I32", (rows, groups * scheme.group_size // 8)),
        f"{layer}.weight_scale": TensorSpec("BF16", (rows, groups)),
        f"{layer}.weight_shape": TensorSpec("I64", (2,)),
    }
    if not scheme.symmetric:
        specs[f"{layer}.weight_zero_point"] = TensorSpec("I32", (-(-rows // 8), groups))
    return specs


def to_tensors(layer: str, weight: AnyWeight) -> dict[str, Tensor]:
    """The file's tensors of one weight. K is padded with zeros to whole groups; `weight_shape` keeps the logical shape."""
    rows, columns = weight.shape
    if isinstance(weight, Fp8Weight):
        scale = weight.outer_scale[:, None].to(torch.bfloat16)
        scales = {f"{layer}.weight_scale": scale} if weight.scheme.target.channel_outer_scale else {}
        return {f"{layer}.weight": weight.values} | scales
    padding = weight.group_scale.shape[1] * weight.scheme.group_size - columns
    codes = torch.nn.functional.pad(weight.codes, (0, padding), value=_ZERO_CODE)
    if weight.scheme.target.channel_outer_scale:
        scale = join_scale(weight.group_scale, weight.outer_scale)
    else:
        scale = weight.group_scale.to(torch.bfloat16)
    tensors = {
        f"{layer}.weight_packed": pack_int4(codes),
        f"{layer}.weight_scale": scale,
        f"{layer}.weight_shape": torch.tensor([rows, columns], dtype=torch.int64),
    }
    if weight.zero_point is not None:
        stored = (weight.zero_point - weight.scheme.levels[0]).to(torch.uint8)
        stored = torch.nn.functional.pad(stored, (0, 0, 0, -rows % 8), value=_ZERO_CODE)
        tensors[f"{layer}.weight_zero_point"] = pack_int4(stored.T.contiguous()).T.contiguous()
    return tensors


def from_tensors(layer: str, tensors: dict[str, Tensor], scheme: Scheme, side: SideScales | None = None) -> QuantizedWeight:
    """The quantized weight a file describes. Raises DuotoneError naming the layer when tensors are missing or do not fit."""
    try:
        packed, scale = tensors[f"{layer}.weight_packed"], tensors[f"{layer}.weight_scale"]
        rows, columns = (int(size) for size in tensors[f"{layer}.weight_shape"])
        stored_zero = None if scheme.symmetric else tensors[f"{layer}.weight_zero_point"]
    except (KeyError, ValueError, TypeError, OverflowError) as error:
        raise DuotoneError(f"{layer}: the checkpoint lacks {error}, expected a pack-quantized weight") from None
    expected = tensor_specs(layer, (rows, columns), scheme)
    for suffix, tensor in (("weight_packed", packed), ("weight_scale", scale), ("weight_zero_point", stored_zero)):
        if tensor is not None:
            _check_stored(f"{layer}.{suffix}", tensor, expected[f"{layer}.{suffix}"])
    zero = None
    if stored_zero is not None:
        zero = unpack_int4(stored_zero.T.contiguous(), rows).T.contiguous().float() + scheme.levels[0]
    input_scale = None
    if scheme.target.channel_outer_scale:
        group, outer = split_scale(scale, scheme)
    elif side is None:
        raise DuotoneError(f"{layer}: duotone.json has no scales for it, expected them for target {scheme.target.name}")
    else:
        outer = torch.tensor([side.outer_scale], dtype=torch.float32)
        group, input_scale = scale.float(), torch.tensor(side.input_scale, dtype=torch.float32)
    try:
        return QuantizedWeight(unpack_int4(packed, columns), group, outer, scheme, zero, input_scale)
    except ValueError as error:
        raise DuotoneError(f"{layer}: the checkpoint's scales are not valid: {error}") from None


def fp8_from_tensors(layer: str, tensors: dict[str, Tensor], scheme: Fp8Scheme, side: SideScales | None = None) -> Fp8Weight:
    """The FP8 weight a file describes. Raises DuotoneError naming the layer when tensors are missing or do not fit."""
    values, scale, input_scale = tensors[f"{layer}.weight"], tensors.get(f"{layer}.weight_scale"), None
    if not scheme.target.channel_outer_scale:
        if side is None:
            raise DuotoneError(f"{layer}: duotone.json has no scales for it, expected them for target {scheme.target.name}")
        scale = torch.tensor([side.outer_scale], dtype=torch.float32)
        input_scale = torch.tensor(side.input_scale, dtype=torch.float32)
    elif scale is None or tuple(scale.shape) != (len(values), 1):
        found = "none" if scale is None else list(scale.shape)
        raise DuotoneError(f"{layer}.weight_scale: found {found}, expected [{len(values)}, 1] for FP8 weights of {layer}")
    try:
        return Fp8Weight(values, scale.float().flatten(), scheme, input_scale)
    except ValueError as error:
        raise DuotoneError(f"{layer}: the checkpoint's FP8 weight is not valid: {error}") from None


def _check_stored(name: str, tensor: Tensor, spec: TensorSpec) -> None:
    """Raise DuotoneError unless a stored tensor has its shape and kind: scales are positive floats, the others int32."""
    is_right = tensor.is_floating_point() if spec.is_float else tensor.dtype == torch.int32
    if tuple(tensor.shape) != spec.shape or not is_right:
        raise DuotoneError(f"{name}: found {tensor.dtype} {list(tensor.shape)}, expected {spec.dtype} {list(spec.shape)}")
    if spec.is_float and not bool((torch.isfinite(tensor) & (tensor >= 0)).all()):
        raise DuotoneError(f"{name}: found negative or non-finite scales, expected positive ones")


def side_scales(weight: AnyWeight) -> dict[str, float]:
    """The entries of duotone.json without which this weight could not be read back; empty for `hopper`."""
    if weight.scheme.target.channel_outer_scale:
        return {}
    if weight.input_scale is None:
        raise ValueError("input_scale: must be calibrated before a static target is written")
    return {"outer_scale": float(weight.outer_scale), "input_scale": float(weight.input_scale)}


def quantization_config(
    scheme: Scheme, ignore: list[str], kv_strategy: str | None = None, fp8: Sequence[str] = ()
) -> dict[str, Any]:
    """The `quantization_config` of config.json. Both `format` keys and the status are needed: FORMATS.md 1.2.

    kv_strategy: of the scales of an FP8 cache; None: there are none. fp8: names of the linears that are stored in FP8; readers
    let a name win over `Linear`.
    """
    target = scheme.target
    dynamic = target.dynamic_activations
    strategy = "token" if dynamic else "tensor"
    file_format = _FORMAT_OF_TARGET[target.name]
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": scheme.group_size, "dynamic": False}
    activations = {"num_bits": 8, "type": "float", "strategy": strategy, "dynamic": dynamic, "symmetric": True}
    shared = {"input_activations": activations, "output_activations": None}
    groups = {
        "group_0": {
            "targets": ["Linear"],
            "format": file_format,
            "weights": weights | {"symmetric": scheme.symmetric, "actorder": None},
            **shared,
        }
    }
    if fp8:
        strategy = "channel" if target.channel_outer_scale else "tensor"
        groups["group_1"] = {
            "targets": list(fp8),
            "format": _FP8_FORMAT_OF_TARGET[target.name],
            "weights": {"num_bits": 8, "type": "float", "strategy": strategy, "dynamic": False, "symmetric": True},
            **shared,
        }
    return {
        "quant_method": _METHOD,
        "format": _MIXED if fp8 else file_format,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ignore,
        "kv_cache_scheme": kv_cache_scheme(kv_strategy),
        "version": _FORMAT_VERSION,
    }


def scheme_from_config(config: dict[str, Any]) -> Scheme:
    """The scheme a `quantization_config` describes. Raises DuotoneError for any layout other than W4A8 pack-quantized."""
    if not isinstance(config, dict):  # pyright: ignore[reportUnnecessaryIsInstance] - it comes from a stranger's file
        raise DuotoneError(f"config.json: found a quantization_config of {config!r}, expected an object")
    if config.get("quant_method") != _METHOD:
        raise DuotoneError(f"config.json: found quant_method {config.get('quant_method')!r}, expected {_METHOD!r}")
    try:
        group = config["config_groups"]["group_0"]
        weights, activations = group["weights"], group["input_activations"]
        found = (
            config["quantization_status"],
            weights["num_bits"],
            weights["type"],
            weights["strategy"],
            activations["num_bits"],
            activations["type"],
            activations["strategy"],
        )
        size, symmetric = int(weights["group_size"]), bool(weights["symmetric"])
        target = _target_of_format(group.get("format", config.get("format")))
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise DuotoneError(
            f"config.json: quantization_config is not W4A8 pack-quantized ({error!r} is missing or wrong)"
        ) from None
    expected = ("compressed", 4, "int", "group", 8, "float", "token" if target.dynamic_activations else "tensor")
    if found != expected:
        raise DuotoneError(f"config.json: quantization_config is {found}, expected {expected}")
    for name, other in config["config_groups"].items():
        if name != "group_0":
            _check_fp8_group(other, target)
    return Scheme(target, size, symmetric)


def layout_of(config: dict[str, Any]) -> tuple[str, int, bool]:
    """How a quantized checkpoint of any tool is stored (`FORMATS`), its group size and whether it has no zero points.

    Raises DuotoneError for a layout that is not known.
    """
    method = config.get("quant_method")
    try:
        if method in {"gptq", "auto-round"}:
            return "gptq", int(config["group_size"]), bool(config.get("sym", True))
        if method == "awq":
            return "awq", int(config["group_size"]), not config.get("zero_point", True)
        if method == "neural-compressor-dpq":
            return "gaudi-inc", int(config["group_size"]), bool(config.get("sym", True))
        if method == "w4afp8":
            return "sglang-w4afp8", int(config.get("group_size", 128)), True
        if method == "modelopt" and config.get("quant_algo") == "W4A8_AWQ":
            return "modelopt", int(config.get("group_size", 128)), True
        if method == _METHOD:
            group, *others = config["config_groups"].values()
            weights, stored = group["weights"], group.get("format") or config.get("format")
            for other in others:
                _check_fp8_group(other, GAUDI if stored == _FORMAT_OF_TARGET[GAUDI.name] else HOPPER)
            if weights["num_bits"] == 4 and weights["type"] == "int" and weights["strategy"] == "group":
                packed = "compressed-tensors" if group.get("input_activations") else "w4a16"
                named = {_FORMAT_OF_TARGET[GAUDI.name]: "duotone-gaudi", "int-quantized": "int-quantized"}
                return named.get(str(stored), packed), int(weights["group_size"]), bool(weights["symmetric"])
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise DuotoneError(f"config.json: quantization_config is damaged ({error!r} is missing or wrong)") from None
    raise DuotoneError(
        f"config.json: found quantization by {method!r} with settings that are not known, expected 4-bit weights in groups of "
        "compressed-tensors, gptq, auto-round, awq or modelopt"
    )


def _check_fp8_group(group: Any, target: Target) -> None:
    """Raise DuotoneError unless a second config group is the FP8 one that `quantization_config` writes."""
    dynamic = target.dynamic_activations
    expected = (_FP8_FORMAT_OF_TARGET[target.name], 8, "float", "channel" if target.channel_outer_scale else "tensor", dynamic)
    try:
        weights = group["weights"]
        kinds = weights["num_bits"], weights["type"], weights["strategy"], bool(group["input_activations"]["dynamic"])
        found = (group["format"], *kinds)
    except (KeyError, TypeError) as error:
        raise DuotoneError(f"config.json: a config group beside the 4-bit one lacks {error}, expected W8A8 in FP8") from None
    if found != expected:
        raise DuotoneError(f"config.json: a config group beside the 4-bit one is {found}, expected {expected}")


def _target_of_format(file_format: object) -> Target:
    for target in (HOPPER, GAUDI):
        if file_format == _FORMAT_OF_TARGET[target.name]:
            return target
    raise DuotoneError(f"config.json: found format {file_format!r}, expected one of {sorted(_FORMAT_OF_TARGET.values())}")
