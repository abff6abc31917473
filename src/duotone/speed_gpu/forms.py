# Shapes: M tokens, N out_features, K in_features.
# pyright: reportMissingImports=false
"""Who takes part: ways to hold a weight and to multiply with it, ours, torch's, and those of packages that may be installed.

All of them are made of the same quantized weight, so that models of different forms say nearly the same.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from duotone.contract import split_scale
from duotone.kernels.gpu import backend
from duotone.qweight import QuantizedWeight, dequantize, fp8_values
from duotone.scheme import HOPPER, Scheme
from duotone.speed_gpu.clock import fp8_product

#: Of what is compiled: one sequence or token is a case of its own, and so is each pair of sizes that happen to be equal.
_VARIANTS = 64
#: x [M, K] in BF16 -> [M, N]. What it holds is copied with it by `copy.deepcopy`.
Linear = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Form:
    """A candidate. weight_bits, group_bytes, row_bytes: what a call reads for each weight, group and row."""

    name: str
    prepare: Callable[[QuantizedWeight], Linear]
    weight_bits: int
    group_bytes: int = 0
    row_bytes: int = 0
    package: str | None = None

    def nbytes(self, shape: tuple[int, int], group_size: int) -> int:
        """What a call has to read of a weight [N, K]."""
        rows, columns = shape
        weights = rows * columns
        return weights * self.weight_bits // 8 + weights // group_size * self.group_bytes + rows * self.row_bytes

    @property
    def refusal(self) -> str | None:
        """Why it cannot take part, or None."""
        missing = self.package is not None and importlib.util.find_spec(self.package) is None
        return f"the package {self.package} is not installed" if missing else None

    @property
    def origin(self) -> str | None:
        """Its package and which version of it, where it has one."""
        return f"{self.package} {version(self.package)}" if self.package and not self.refusal else None


def random_weight(shape: tuple[int, int], group_size: int, device: torch.device, seed: int) -> QuantizedWeight:
    """A weight of random codes and scales in the canonical form, made where it is to be; sums over K stay about as large."""
    (rows, columns), scheme = shape, Scheme(HOPPER, group_size)
    generator = torch.Generator(device).manual_seed(seed)
    codes = torch.randint(0, 16, shape, generator=generator, device=device, dtype=torch.uint8)
    scale_NG = torch.rand(rows, scheme.groups(columns), generator=generator, device=device) + 0.2
    return QuantizedWeight(codes, *split_scale((0.3 * columns**-0.5 * scale_NG).bfloat16(), scheme), scheme)


def _ours(weight: QuantizedWeight) -> Linear:
    return partial(_multiply_packed, backend.prepack(weight))


def _multiply_packed(packed: backend.Packed, x: Tensor) -> Tensor:
    return backend.linear(x, packed)


def _bf16(weight: QuantizedWeight) -> Linear:
    return partial(_multiply_wide, dequantize(weight).bfloat16())


def _multiply_wide(weight: Tensor, x: Tensor) -> Tensor:
    return torch.nn.functional.linear(x, weight)


def _fp8(weight: QuantizedWeight) -> Linear:
    return partial(_multiply_fp8, fp8_values(weight).to(torch.float8_e4m3fn), weight.outer_scale)


def _fp8_fast(weight: QuantizedWeight) -> Linear:
    return partial(_multiply_fp8, fp8_values(weight).to(torch.float8_e4m3fn), weight.outer_scale, fast=True)


def _multiply_fp8(w8: Tensor, outer: Tensor, x: Tensor, fast: bool = False) -> Tensor:
    """Activations are quantized by the same program as ours are."""
    from duotone.kernels.gpu import launch

    chunks = -(-x.shape[1] // 128)
    x8, scales = launch.quantize(x, chunks, None, HOPPER.fp8.max, HOPPER.smallest_activation_scale)
    return fp8_product(x8[:, : x.shape[1]], w8, scales[:, None], outer[:, None], fast)


def _int4(weight: QuantizedWeight) -> Linear:
    """tinygemm, which torch has for GPUs and CPUs under two names."""
    scale_NG = _real_scale(weight)
    both_GN2 = torch.stack([scale_NG.T, torch.zeros_like(scale_NG.T)], -1).contiguous()
    ops, codes = torch.ops.aten, weight.codes
    if codes.device.type == "cuda":
        packed = ops._convert_weight_to_int4pack((codes[:, ::2] << 4 | codes[:, 1::2]).contiguous(), 8)
    else:
        packed = ops._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
    return partial(_multiply_int4, packed, both_GN2, weight.scheme.group_size)


def _multiply_int4(packed: Tensor, both_GN2: Tensor, group_size: int, x: Tensor) -> Tensor:
    ops = torch.ops.aten
    multiply = ops._weight_int4pack_mm if x.device.type == "cuda" else ops._weight_int4pack_mm_for_cpu
    return multiply(x, packed, group_size, both_GN2)


def _real_scale(weight: QuantizedWeight) -> Tensor:
    """BF16 [N, G]: what a step of the codes is worth."""
    return (weight.group_scale * weight.outer_scale[:, None]).bfloat16()


def _torchao_int4(weight: QuantizedWeight) -> Linear:
    """torchao 0.18: its own choice of scales, tinygemm's layout."""
    from torchao.quantization import Int4WeightOnlyConfig, quantize_

    linear = _module(weight)
    layout: Any = "tile_packed_to_4d"
    size = weight.scheme.group_size
    quantize_(linear, Int4WeightOnlyConfig(group_size=size, int4_packing_format=layout, set_inductor_config=False))
    return linear


def _torchao_fp8(weight: QuantizedWeight) -> Linear:
    """torchao 0.18, compiled as its documentation asks, since it quantizes activations by torch's own small ops."""
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_

    linear = _module(weight)
    quantize_(linear, Float8DynamicActivationFloat8WeightConfig(granularity=PerRow(), set_inductor_config=False))
    return compiled(linear)


def compiled(function: Any, backend: str = "inductor") -> Any:
    """A function or module compiled by torch for any sizes, in one graph."""
    torch._dynamo.config.recompile_limit = _VARIANTS
    return torch.compile(function, backend=backend, dynamic=True, fullgraph=True)


def _module(weight: QuantizedWeight) -> torch.nn.Linear:
    rows, columns = weight.shape
    linear = torch.nn.Linear(columns, rows, bias=False, device="meta")
    linear.weight = torch.nn.Parameter(dequantize(weight).bfloat16(), requires_grad=False)
    return linear


def _gemlite(kind: str, weight: QuantizedWeight) -> Linear:
    """gemlite 0.6: weights (code - 8) * scale."""
    from gemlite import helper

    scale_NG, device = _real_scale(weight), str(weight.codes.device)
    make = getattr(helper, kind)(device=device, dtype=torch.bfloat16)
    return make.from_weights(weight.codes, scale_NG, torch.full_like(scale_NG, 8))


OURS = Form("duotone triton", _ours, 4, 1, 4)
BF16 = Form("cuBLAS BF16", _bf16, 16)
FP8 = Form("torch FP8, row-wise", _fp8, 8, 0, 4)
INT4 = Form("torch int4pack (W4A16)", _int4, 4, 4)
#: Its sums keep fewer bits, as Hopper's units by themselves do: ours do not for prompts, so this is no like for like there.
FP8_FAST = Form("torch FP8, fast sums", _fp8_fast, 8, 0, 4)
#: Whose linears a whole model may have; and those of linears by themselves.
OWN = (OURS, BF16, FP8, INT4)
ALONE = (*OWN, FP8_FAST)
#: Compared with ours where they are installed; what the first call of some compiles or tries out takes its time.
PEERS = (
    Form("gemlite W4A8", partial(_gemlite, "A8W4_HQQ_INT_dynamic"), 4, 4, package="gemlite"),
    Form("gemlite W4A16", partial(_gemlite, "A16W4_HQQ_INT"), 4, 4, package="gemlite"),
    Form("torchao INT4 (W4A16)", _torchao_int4, 4, 4, package="torchao"),
    Form("torchao FP8, row-wise", _torchao_fp8, 8, 0, 4, package="torchao"),
)
