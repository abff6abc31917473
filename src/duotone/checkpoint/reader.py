"""Quantized weights out of a checkpoint folder, one at a time."""

from duotone.checkpoint.compressed_tensors import from_tensors, scheme_from_config, tensor_specs
from duotone.checkpoint.sidecar import layer_scales, read_sidecar
from duotone.checkpoint.source import Source
from duotone.errors import DuotoneError
from duotone.qweight import QuantizedWeight

_PACKED = ".weight_packed"


def packed_layers(source: Source) -> list[str]:
    """Names of the linears a quantized checkpoint holds. Raises DuotoneError when it has none."""
    layers = [name.removesuffix(_PACKED) for name in source.tensors if name.endswith(_PACKED)]
    if not layers:
        raise DuotoneError(f"{source.path}: config.json says it is quantized, found no packed weight")
    return layers


class WeightReader:
    """Reads the quantized weights of one checkpoint; its scheme and sidecar are read once."""

    def __init__(self, source: Source) -> None:
        """Raises DuotoneError when config.json or duotone.json describe something else."""
        self._source = source
        self.scheme = scheme_from_config(source.config.get("quantization_config", {}))
        self._sidecar = read_sidecar(source.path)

    def read(self, layer: str) -> QuantizedWeight:
        """The weight of one linear. Raises DuotoneError naming the layer when its tensors are missing or do not fit."""
        names = tensor_specs(layer, (0, 0), self.scheme)
        tensors = self._source.load(name for name in names if name in self._source.tensors)
        written = self._source.written_as(f"{layer}{_PACKED}").removesuffix(_PACKED)
        return from_tensors(layer, tensors, self.scheme, layer_scales(self._sidecar, written))
