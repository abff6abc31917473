"""transformers' own `from_pretrained` with our linears, where a program asks for them; without that nothing changes.

A checkpoint says `compressed-tensors`, since that is what every other reader loads. transformers looks that name up in two
tables; `use_in_transformers` puts ours into them. `register_quantizer`, its public way, is for names of one's own alone.
"""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from duotone.checkpoint.compressed_tensors import scheme_from_config
from duotone.checkpoint.reader import packed_layers
from duotone.checkpoint.source import Source, open_source
from duotone.device import resolve_device
from duotone.errors import DuotoneError
from duotone.models.anatomy import anatomy_of
from duotone.models.names import named_source
from duotone.models.skeleton import build_skeleton, find_linears
from duotone.runtime.kv_cache import install
from duotone.runtime.load import check_complete, place_quantized, share_calls, shorten

_METHOD = "compressed-tensors"
#: What of packed linears and of an FP8 cache lies in the files and is read by us: transformers need not report it as unknown.
_OURS = r"\.(weight_(packed|scale|shape|zero_point)|[kv]_scale)$"


class DuotoneConfig(QuantizationConfigMixin):
    """The `quantization_config` of config.json as it stands there."""

    def __init__(self, **settings: Any) -> None:
        """Raises DuotoneError for settings that are not W4A8 pack-quantized: another tool's checkpoint."""
        try:
            scheme_from_config(settings)
        except DuotoneError as error:
            raise DuotoneError(f"{error}; outside of use_in_transformers compressed-tensors itself loads it") from None
        self.quant_method = settings["quant_method"]
        self.__dict__.update(settings)


class DuotoneQuantizer(HfQuantizer):
    """Puts QuantizedLinears into a model that transformers has built, and reads their weights from the files."""

    requires_calibration = True
    _source: Source

    def update_device_map(self, device_map: Any) -> Any:
        """One device. Raises DuotoneError where it would be several."""
        if device_map is None:
            return None
        places = set(device_map.values()) if isinstance(device_map, dict) else {device_map}
        if len(places) > 1 or places & {"disk", "balanced", "balanced_low_0", "sequential"}:
            raise DuotoneError(f"device_map: found {device_map!r}, expected one device; duotone's linears are not spread")
        (place,) = places
        return {"": resolve_device(f"cuda:{place}" if isinstance(place, int) else str(place))}

    def _process_model_before_weight_loading(self, model: Any, **options: Any) -> Any:
        """Take away the weights that the files hold packed, so that nobody looks for them."""
        files = options.get("checkpoint_files")
        if not files:
            raise DuotoneError("from_pretrained: found a state_dict and no files, expected a folder or a hub id")
        self._source = named_source(open_source(Path(files[0]).parent), model)
        linears = find_linears(model)
        for layer in packed_layers(self._source):
            if layer not in linears:
                raise DuotoneError(
                    f"{self._source.path}: holds a packed weight {layer!r}, found no such linear in {type(model).__name__} as "
                    "transformers builds it; duotone.load loads this checkpoint"
                )
            linears[layer].register_parameter("weight", None)
        model._keys_to_ignore_on_load_unexpected = {*(model._keys_to_ignore_on_load_unexpected or ()), _OURS}
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        """The linears, and the shortcuts of `duotone.load`."""
        config = self._source.config
        check_complete(model, self._source)
        place_quantized(model, self._source, model.device)
        whole = build_skeleton(config, model.dtype)
        anatomy = anatomy_of(config, whole)
        share_calls(model, anatomy)
        install(model, self._source, anatomy, whole, model.device)
        model.requires_grad_(False)
        shorten(model, config, model.dtype, model.device)
        return model

    def is_serializable(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride] - the base has no type
        """No: the checkpoint is there already, `save_pretrained` would write it without its weights."""
        return False

    @property
    def is_trainable(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride] - the same
        """No gradient goes through 4-bit codes."""
        return False


def use_in_transformers() -> ExitStack:
    """Have transformers' `from_pretrained` load W4A8 checkpoints with Duotone's linears, as `duotone.load` does.

    Holds from the call on; as a context, or by `.close()` of what is returned, until its end:

        with duotone.use_in_transformers():
            model = AutoModelForCausalLM.from_pretrained("Llama-3.2-1B-W4AFP8")

    Also for what calls `from_pretrained` itself: pipelines, lm-evaluation-harness. Meanwhile from_pretrained raises
    DuotoneError for a compressed-tensors checkpoint that is not W4A8 (`pack-quantized` or `duotone-gaudi`), for a damaged one,
    for a `gaudi` one without its duotone.json, for more than one device, and for models whose linears transformers builds as
    something else (mixtures of experts, GPT-2), which duotone.load takes. Another `quant_method` is not touched.
    """
    before = ExitStack()
    tables: tuple[tuple[dict[str, Any], type], ...] = (
        (AUTO_QUANTIZER_MAPPING, DuotoneQuantizer),
        (AUTO_QUANTIZATION_CONFIG_MAPPING, DuotoneConfig),
    )
    for table, ours in tables:
        before.callback(table.__setitem__, _METHOD, table[_METHOD])
        table[_METHOD] = ours
    return before
