"""One table describes an architecture: where its blocks are and which linears read the same input."""

from typing import Any

from duotone.errors import DuotoneError
from duotone.models.table import Adapter
from duotone.models.text import TEXT_ADAPTERS

_ADAPTERS: tuple[Adapter, ...] = TEXT_ADAPTERS


def find_adapter(config: dict[str, Any]) -> Adapter:
    """The table of a model's `model_type`. Raises DuotoneError that says which there are and where to write another."""
    model_type = config["model_type"]
    for adapter in _ADAPTERS:
        if model_type in adapter.model_types:
            return adapter
    known = ", ".join(sorted(name for adapter in _ADAPTERS for name in adapter.model_types))
    raise DuotoneError(
        f"config.json: found model_type {model_type!r}, expected one of {known}; a new architecture is one table in "
        "src/duotone/models/text.py"
    )
