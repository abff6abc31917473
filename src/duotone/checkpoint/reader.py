"""Quantized weights out of a checkpoint folder, one at a time."""

from duotone.checkpoint.compressed_tensors import fp8_from_tensors, from_tensors, scheme_from_config, tensor_specs
from duotone.checkpoint.sidecar import layer_scales, read_sidecar
from duotone.checkpoint.source import Source
from duotone.errors import DuotoneError
from duotone.qweight import AnyWeight
from duotone.scheme import AnyScheme, Fp8Scheme

_PACKED, _WEIGHT = ".weight_packed", ".weight"


def packed_layers(source: Source) -> list[str]:
    """Names of the linears a quantized checkpoint holds. Raises DuotoneError when it has none."""
    layers = [name.removesuffix(_PACKED) for name in source.tensors if name.endswith(_PACKED)]
    layers += [name.removesuffix(_WEIGHT) for name in source.tensors if is_fp8_weight(source, name)]
    if not layers:
        raise DuotoneError(f"{source.path}: config.json says it is quantized, found no packed weight")
    return layers


def is_fp8_weight(source: Source, name: str) -> bool:
    """Is a tensor the weight of a linear in FP8?"""
    spec = source.tensors[name]
    return spec.dtype == "F8_E4M3" and len(spec.shape) == 2 and name.endswith(_WEIGHT)


class WeightReader:
    """Reads the quantized weights of one checkpoint; its scheme and sidecar are read once. scheme: of those in 4 bits."""

    def __init__(self, source: Source) -> None:
        """Raises DuotoneError when config.json or duotone.json describe something else."""
        self._source = source
        self.scheme = scheme_from_config(source.config.get("quantization_config", {}))
        self._sidecar = read_sidecar(source.path)

    def scheme_of(self, layer: str) -> AnyScheme:
        """How one linear is stored."""
        is_packed = f"{layer}{_PACKED}" in self._source.tensors
        return self.scheme if is_packed else Fp8Scheme(self.scheme.target)

    def read(self, layer: str) -> AnyWeight:
        """The weight of one linear. Raises DuotoneError naming the layer when its tensors are missing or do not fit."""
        scheme = self.scheme_of(layer)
        names = tensor_specs(layer, (0, 0), scheme)
        tensors = self._source.load(name for name in names if name in self._source.tensors)
        ending = _WEIGHT if isinstance(scheme, Fp8Scheme) else _PACKED
        written = self._source.written_as(f"{layer}{ending}").removesuffix(ending)
        scales = layer_scales(self._sidecar, written)
        if isinstance(scheme, Fp8Scheme):
            return fp8_from_tensors(layer, tensors, scheme, scales)
        return from_tensors(layer, tensors, scheme, scales)
