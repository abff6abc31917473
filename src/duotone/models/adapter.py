"""One table describes an architecture: where its blocks are and which linears read the same input."""

from typing import Any

import transformers
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.auto_factory import _BaseAutoModelClass
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from duotone.checkpoint.source import architecture_of
from duotone.errors import DuotoneError
from duotone.models.table import Adapter, NormedStream
from duotone.models.text import TEXT_ADAPTERS

_ADAPTERS: tuple[Adapter, ...] = TEXT_ADAPTERS


def find_adapter(config: dict[str, Any]) -> Adapter:
    """The table of a model's `model_type` and architecture. Raises DuotoneError that says which there are and where to add."""
    model_type = architecture_of(config)
    tables = _tables_of(model_type)
    if not tables:
        known = ", ".join(sorted({name for adapter in _ADAPTERS for name in adapter.model_types}))
        raise DuotoneError(
            f"config.json: found model_type {model_type!r}, expected one of {known}; a new architecture is one table in "
            "src/duotone/models/text.py"
        )
    named = config.get("architectures") or list(tables[0].architectures)
    for adapter in tables:
        if not adapter.architectures or (isinstance(named, list) and any(name in adapter.architectures for name in named)):
            return adapter
    known = ", ".join(name for adapter in tables for name in adapter.architectures)
    raise DuotoneError(
        f"config.json: found architectures {named!r} of model_type {model_type!r}, expected one of {known}; a new "
        "architecture is one table in src/duotone/models/text.py"
    )


def normed_stream(config: dict[str, Any], option: str) -> NormedStream:
    """What a transform has to know of the residual stream. Raises DuotoneError naming the option when the table has none."""
    residual = find_adapter(config).residual
    if residual is None:
        able = ", ".join(sorted({name for adapter in _ADAPTERS if adapter.residual for name in adapter.model_types}))
        raise DuotoneError(
            f"{option}: found model_type {architecture_of(config)!r}, expected one that reads its residual stream "
            f"through RMS norms: {able}"
        )
    return residual


def has_adapter(config: dict[str, Any]) -> bool:
    """Whether there is a table of a model's `model_type`."""
    return bool(_tables_of(architecture_of(config)))


def model_class(config: dict[str, Any]) -> type[_BaseAutoModelClass] | type[PreTrainedModel]:
    """The transformers class that builds a model: its table's, else the one that config.json names, else a language model."""
    if has_adapter(config):
        return find_adapter(config).auto
    for name in config.get("architectures") or ():
        kind = getattr(transformers, str(name), None)
        if isinstance(kind, type) and issubclass(kind, PreTrainedModel) and _is_of(kind, config["model_type"]):
            return kind
    return AutoModelForCausalLM if config["model_type"] in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES else AutoModel


def _is_of(kind: type[PreTrainedModel], model_type: str) -> bool:
    """Is a class built from configs of this model_type? Another's may build it too, with defaults for all it does not say."""
    return getattr(kind.config_class, "model_type", None) == model_type


def _tables_of(model_type: str) -> list[Adapter]:
    return [adapter for adapter in _ADAPTERS if model_type in adapter.model_types]
