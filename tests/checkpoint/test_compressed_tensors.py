# Shapes: N out_features, K in_features, G groups along K.
"""The pack-quantized layout: there and back bit for bit, and as compressed_tensors itself reads it."""

import copy
import dataclasses
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus, QuantizationStrategy
from hypothesis import given, settings
from hypothesis import strategies as st

from duotone.checkpoint.compressed_tensors import (
    SideScales,
    from_tensors,
    quantization_config,
    scheme_from_config,
    side_scales,
    tensor_specs,
    to_tensors,
)
from duotone.checkpoint.headers import TORCH_NAMES
from duotone.errors import DuotoneError
from duotone.qweight import QuantizedWeight, dequantize
from duotone.scheme import GAUDI, HOPPER, Scheme

THOROUGH = settings(max_examples=80, deadline=None, derandomize=True)
LAYER = "model.layers.0.mlp.up_proj"

schemes = st.builds(Scheme, st.sampled_from([HOPPER, GAUDI]), st.sampled_from([32, 64, 128]), st.booleans())
hopper_schemes = st.builds(Scheme, st.just(HOPPER), st.sampled_from([32, 64, 128]), st.booleans())


#: Every positive E4M3FN value, and every BF16 value between 2^-40 and 2^40, as float32.
e4m3_values = torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
bf16_values = torch.arange((127 - 40) << 7, ((127 + 40) << 7) + 1, dtype=torch.int16).view(torch.bfloat16).float()


def choose(generator: torch.Generator, values: torch.Tensor, *shape: int) -> torch.Tensor:
    """Values drawn with equal chance."""
    return values[torch.randint(len(values), shape, generator=generator)]


def random_weight(scheme: Scheme, rows: int, columns: int, seed: int) -> QuantizedWeight:
    """Any legal weight: on hopper every canonical split (rows of the clamped outer scale too), on gaudi any BF16 scales."""
    generator = torch.Generator().manual_seed(seed)
    groups = scheme.groups(columns)
    codes = torch.randint(0, 16, (rows, columns), generator=generator).to(torch.uint8)
    zero = None if scheme.symmetric else torch.randint(-8, 8, (rows, groups), generator=generator).float()
    if not scheme.target.channel_outer_scale:
        outer = 2.0 ** torch.randint(-20, 4, (1,), generator=generator)
        activation = 2.0 ** torch.randint(-20, 10, (), generator=generator)
        return QuantizedWeight(codes, choose(generator, bf16_values, rows, groups), outer, scheme, zero, activation)
    peak = scheme.peak_group_scale
    group_NG = choose(generator, e4m3_values[e4m3_values <= peak], rows, groups)
    outer_N = choose(generator, bf16_values[bf16_values >= 1 / 512], rows) / peak
    clamped_N = torch.rand(rows, generator=generator) < 0.3
    peak_at_N = torch.randint(groups, (rows,), generator=generator)
    for n in range(rows):
        if clamped_N[n]:
            outer_N[n] = scheme.smallest_outer_scale
        else:
            group_NG[n, peak_at_N[n]] = peak
    return QuantizedWeight(codes, group_NG, outer_N, scheme, zero)


@st.composite
def weights(draw: st.DrawFn, of: st.SearchStrategy[Scheme] = schemes, whole_groups: bool = False) -> QuantizedWeight:
    """Random weights: N not always a multiple of 8, K (unless asked for) not always one of the group or of 8."""
    scheme, rows, seed = draw(of), draw(st.integers(1, 20)), draw(st.integers(0, 2**32))
    if whole_groups:
        columns = scheme.group_size * draw(st.integers(1, 4))
    else:
        columns = draw(st.one_of(st.integers(1, 300), st.sampled_from([27, 64, 128, 192, 256, 384])))
    return random_weight(scheme, rows, columns, seed)


def assert_same(found: QuantizedWeight, expected: QuantizedWeight) -> None:
    """Every field, bit for bit."""
    for field in dataclasses.fields(QuantizedWeight):
        a, b = getattr(found, field.name), getattr(expected, field.name)
        if isinstance(b, torch.Tensor):
            assert a.dtype == b.dtype, field.name
            assert torch.equal(a, b), field.name
        else:
            assert a == b, field.name


@THOROUGH
@given(weight=weights())
def test_round_trip(weight: QuantizedWeight) -> None:
    """Tensors and, for gaudi, the sidecar's numbers through JSON give the weight back bit for bit, its real values too."""
    scales = side_scales(weight)
    side = SideScales(**json.loads(json.dumps(scales))) if scales else None
    back = from_tensors(LAYER, to_tensors(LAYER, weight), weight.scheme, side)
    assert_same(back, weight)
    assert torch.equal(dequantize(back), dequantize(weight))
    assert bool(scales) == (weight.scheme.target is GAUDI)


@THOROUGH
@given(weight=weights())
def test_specs_are_what_is_written(weight: QuantizedWeight) -> None:
    """What is foreseen without arithmetic is what is written: 4 bits a code, 16 a scale, 4 a zero point."""
    tensors = to_tensors(LAYER, weight)
    specs = tensor_specs(LAYER, weight.shape, weight.scheme)
    assert {name: (TORCH_NAMES[t.dtype], tuple(t.shape)) for name, t in tensors.items()} == {
        name: (spec.dtype, spec.shape) for name, spec in specs.items()
    }
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    counted = 8 * sum(spec.nbytes for name, spec in specs.items() if not name.endswith("weight_shape"))
    (rows, groups), symmetric = weight.group_scale.shape, weight.scheme.symmetric
    zero_points = 0 if symmetric else 4 * (rows + -rows % 8) * groups
    assert counted == 4 * rows * groups * weight.scheme.group_size + 16 * rows * groups + zero_points


@THOROUGH
@given(weight=weights())
def test_padding_is_zero(weight: QuantizedWeight) -> None:
    """Columns that complete the last group hold code 8, level 0: a reader that keeps them adds nothing."""
    rows, columns = weight.shape
    tensors = to_tensors(LAYER, weight)
    packed = tensors[f"{LAYER}.weight_packed"]
    signed = unpack_from_int32(packed, 4, torch.Size([rows, packed.shape[1] * 8]))
    assert torch.equal(signed[:, :columns] + 8, weight.codes.to(torch.int8))
    assert not signed[:, columns:].any()
    assert tensors[f"{LAYER}.weight_shape"].tolist() == [rows, columns]


@THOROUGH
@given(weight=weights(hopper_schemes))
def test_the_file_scale_is_the_product(weight: QuantizedWeight) -> None:
    """`hopper` stores bf16(group * outer): FORMATS.md 1.4."""
    stored = to_tensors(LAYER, weight)[f"{LAYER}.weight_scale"]
    assert torch.equal(stored, (weight.group_scale * weight.outer_scale[:, None]).to(torch.bfloat16))


@THOROUGH
@given(weight=weights())
def test_zero_points_as_compressed_tensors_packs_them(weight: QuantizedWeight) -> None:
    """Word for word pack_to_int32 along the rows where 8 divides N, and read back by its unpacking for every N."""
    stored = to_tensors(LAYER, weight).get(f"{LAYER}.weight_zero_point")
    assert (stored is None) == weight.scheme.symmetric
    if stored is None or weight.zero_point is None:
        return
    signed = weight.zero_point.to(torch.int8)
    assert torch.equal(unpack_from_int32(stored, 4, signed.shape, packed_dim=0), signed)
    whole = weight.shape[0] // 8
    assert torch.equal(stored[:whole], pack_to_int32(signed[: whole * 8], 4, packed_dim=0))


@THOROUGH
@given(weight=weights(hopper_schemes, whole_groups=True))
def test_decompressed_by_compressed_tensors(weight: QuantizedWeight) -> None:
    """Its own decompression of our tensors, under our config, gives (q - zero) * bf16 scale."""
    tensors = {name.removeprefix(f"{LAYER}."): tensor for name, tensor in to_tensors(LAYER, weight).items()}
    config = QuantizationConfig.model_validate(quantization_config(weight.scheme, ["lm_head"]))
    found = PackedQuantizationCompressor.decompress(tensors, config.config_groups["group_0"])["weight"]
    scale_NG, size = tensors["weight_scale"].float(), weight.scheme.group_size
    expected = weight.codes.float() - 8
    for g in range(scale_NG.shape[1]):
        span = slice(g * size, (g + 1) * size)
        if weight.zero_point is not None:
            expected[:, span] -= weight.zero_point[:, g : g + 1]
        expected[:, span] *= scale_NG[:, g : g + 1]
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected.to(torch.bfloat16))


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("symmetric", [True, False])
def test_compressed_tensors_accepts_our_config(symmetric: bool, group_size: int) -> None:
    """Its pydantic model, which forbids unknown keys in a group, reads from our dict what we mean."""
    scheme = Scheme(HOPPER, group_size, symmetric)
    config = QuantizationConfig.model_validate(json.loads(json.dumps(quantization_config(scheme, ["lm_head"]))))
    group = config.config_groups["group_0"]
    assert (config.quant_method, config.format) == ("compressed-tensors", "pack-quantized")
    assert config.quantization_status is QuantizationStatus.COMPRESSED
    assert config.ignore == ["lm_head"]
    assert group.targets == ["Linear"]
    weights, activations = group.weights, group.input_activations
    assert weights is not None
    assert activations is not None
    assert (weights.num_bits, weights.type, weights.strategy) == (4, "int", QuantizationStrategy.GROUP)
    assert (weights.group_size, weights.symmetric, weights.dynamic) == (group_size, symmetric, False)
    assert (activations.num_bits, activations.type, activations.strategy) == (8, "float", QuantizationStrategy.TOKEN)
    assert (activations.symmetric, activations.dynamic) == (True, True)


def test_gaudi_is_refused_by_other_readers() -> None:
    """Its file scale alone is not the weight's, so its format is our own, and activations are static per tensor."""
    config = quantization_config(Scheme(GAUDI), [])
    assert config["format"] == config["config_groups"]["group_0"]["format"] == "duotone-gaudi"
    activations = config["config_groups"]["group_0"]["input_activations"]
    assert (activations["strategy"], activations["dynamic"]) == ("tensor", False)


@THOROUGH
@given(scheme=schemes)
def test_scheme_round_trip(scheme: Scheme) -> None:
    """The scheme written into config.json is the scheme read from it."""
    assert scheme_from_config(json.loads(json.dumps(quantization_config(scheme, ["lm_head"])))) == scheme


def changed(**changes: Any) -> dict[str, Any]:
    """Our config with some values replaced; `weights__num_bits` is num_bits of the weights, a group's key otherwise."""
    config = copy.deepcopy(quantization_config(Scheme(), []))
    for path, value in changes.items():
        *parents, leaf = path.split("__")
        place = config["config_groups"]["group_0"] if parents or leaf in {"weights", "input_activations"} else config
        for parent in parents:
            place = place[parent]
        place[leaf] = value
    return config


OTHER_LAYOUTS = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128},
    "no method": changed(quant_method=None),
    "method a list": changed(quant_method=["compressed-tensors"]),
    "empty": {},
    "no groups": changed(config_groups={}),
    "groups null": changed(config_groups=None),
    "groups a list": changed(config_groups=["group_0"]),
    "another group name": changed(config_groups={"group_1": {}}),
    "group a string": changed(config_groups={"group_0": "W4A8"}),
    "group empty": changed(config_groups={"group_0": {}}),
    "W4A16": changed(input_activations=None),
    "no weights": changed(weights=None),
    "eight bits": changed(weights__num_bits=8),
    "float weights": changed(weights__type="float"),
    "channel scales": changed(weights__strategy="channel", weights__group_size=None),
    "int8 activations": changed(input_activations__type="int"),
    "four-bit activations": changed(input_activations__num_bits=4),
    "static activations": changed(input_activations__strategy="tensor"),
    "group of 12": changed(weights__group_size=12),
    "group of zero": changed(weights__group_size=0),
    "group a word": changed(weights__group_size="many"),
    "group not finite": changed(weights__group_size=float("inf")),
}


@pytest.mark.parametrize("config", OTHER_LAYOUTS.values(), ids=OTHER_LAYOUTS.keys())
def test_other_layouts_are_refused(config: dict[str, Any]) -> None:
    """Any other layout is one DuotoneError of one line, never a guess."""
    with pytest.raises(DuotoneError) as caught:
        scheme_from_config(config)
    assert len(str(caught.value).splitlines()) == 1
    assert "expected" in str(caught.value) or "is not W4A8 pack-quantized" in str(caught.value)


@pytest.mark.parametrize("format_", ["int-quantized", "marlin-24", None])
def test_another_format_is_refused(format_: str | None) -> None:
    """The group's `format` decides what the tensors are; a config without any is not ours."""
    config = copy.deepcopy(quantization_config(Scheme(), []))
    config["config_groups"]["group_0"]["format"] = config["format"] = format_
    with pytest.raises(DuotoneError, match="pack-quantized"):
        scheme_from_config(config)


@pytest.mark.parametrize("config", [None, "gptq", ["compressed-tensors"], 4], ids=repr)
def test_config_that_is_no_object(config: Any) -> None:
    """config.json comes from strangers: a quantization_config that is no object is a sentence too."""
    with pytest.raises(DuotoneError, match=r"quantization_config|quant_method"):
        scheme_from_config(config)


def edited(suffix: str, edit: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict[str, torch.Tensor]], None]:
    """An edit of one of the layer's tensors."""

    def apply(tensors: dict[str, torch.Tensor]) -> None:
        name = f"{LAYER}.{suffix}"
        tensors[name] = edit(tensors[name].clone())

    return apply


def with_first(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """Its first entry replaced."""

    def edit(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[0] = value
        return tensor

    return edit


DAMAGE = {
    "packed too wide": edited("weight_packed", lambda t: torch.cat([t, t], 1)),
    "packed too few rows": edited("weight_packed", lambda t: t[:-1]),
    "packed flat": edited("weight_packed", lambda t: t.reshape(-1)),
    "packed not int32": edited("weight_packed", lambda t: t.float()),
    "scale transposed": edited("weight_scale", lambda t: t.T.contiguous()),
    "scale NaN": edited("weight_scale", with_first(float("nan"))),
    "scale infinite": edited("weight_scale", with_first(float("inf"))),
    "scale negative": edited("weight_scale", with_first(-1.0)),
    "scale not a float": edited("weight_scale", lambda t: t.to(torch.int64)),
    "shape three": edited("weight_shape", lambda t: torch.cat([t, t[:1]])),
    "shape scalar": edited("weight_shape", lambda t: t[0]),
    "shape negative": edited("weight_shape", lambda t: -t),
    "shape zero": edited("weight_shape", lambda t: t * 0),
    "shape swapped": edited("weight_shape", lambda t: t.flip(0)),
    "zero point too short": edited("weight_zero_point", lambda t: t[:-1]),
    "zero point not int32": edited("weight_zero_point", lambda t: t.float()),
    "no zero point": lambda tensors: tensors.pop(f"{LAYER}.weight_zero_point"),
    "no packed": lambda tensors: tensors.pop(f"{LAYER}.weight_packed"),
    "no scale": lambda tensors: tensors.pop(f"{LAYER}.weight_scale"),
    "no shape": lambda tensors: tensors.pop(f"{LAYER}.weight_shape"),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_damaged_tensors_are_refused(damage: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Tensors that are missing, of another shape or dtype, or hold no scales: one DuotoneError that names the layer."""
    scheme = Scheme(HOPPER, 32, symmetric=False)
    tensors = to_tensors(LAYER, random_weight(scheme, 16, 72, seed=3))
    damage(tensors)
    with pytest.raises(DuotoneError) as caught:
        from_tensors(LAYER, tensors, scheme)
    assert LAYER in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_gaudi_needs_its_side_scales() -> None:
    """Without the sidecar's scales a gaudi weight cannot be read, and without calibration it cannot be written."""
    weight = random_weight(Scheme(GAUDI, 32), 4, 64, seed=5)
    with pytest.raises(DuotoneError, match=r"duotone\.json has no scales") as caught:
        from_tensors(LAYER, to_tensors(LAYER, weight), weight.scheme)
    assert LAYER in str(caught.value)
    with pytest.raises(ValueError, match="input_scale: must be calibrated"):
        side_scales(dataclasses.replace(weight, input_scale=None))
