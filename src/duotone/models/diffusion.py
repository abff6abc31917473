"""Models of diffusers (denoisers, autoencoders): one component's folder, whose config.json names a class in `_class_name`.

diffusers is imported here alone, and only for such a folder. Code of the model comes from it; code in a folder is never run.
"""

import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from duotone.errors import DuotoneError

#: Keys of a config.json that are ours: no argument of a model.
_NO_ARGUMENTS = {"dtype", "torch_dtype", "quantization_config"}


def is_diffusers(config: Mapping[str, Any]) -> bool:
    """Is this the config of a model of diffusers?"""
    return "model_type" not in config and "_class_name" in config


def library_of(config: Mapping[str, Any]) -> str:
    """The library whose model a config describes."""
    return "diffusers" if is_diffusers(config) else "transformers"


def model_maker(config: Mapping[str, Any], dtype: torch.dtype) -> Callable[[], nn.Module]:
    """What makes the model of a config, its parameters of a dtype, random or on meta as its caller has it.

    Raises DuotoneError where diffusers is not installed or has no such model. The call raises what diffusers raises.
    """
    name = str(config["_class_name"])
    try:
        diffusers = importlib.import_module("diffusers")
    except ImportError as error:
        raise DuotoneError(
            f"config.json: describes {name}, a model of diffusers, which cannot be imported ({error}); "
            "pip install 'duotone[diffusers]'"
        ) from None
    kind = getattr(diffusers, name, None)
    if not (isinstance(kind, type) and issubclass(kind, diffusers.ModelMixin)):
        raise DuotoneError(f"config.json: found _class_name {name!r}, expected a model of diffusers {diffusers.__version__}")

    def make() -> nn.Module:
        model: Any = kind.from_config({key: value for key, value in config.items() if key not in _NO_ARGUMENTS})
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
        return model

    return make


def nested(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Inputs as a forward takes them: `a.b` is what its argument `a` holds under `b`, as SDXL's added_cond_kwargs.time_ids."""
    found: dict[str, Any] = {}
    for name, tensor in tensors.items():
        argument, _, key = name.partition(".")
        if key:
            found.setdefault(argument, {})[key] = tensor
        else:
            found[argument] = tensor
    return found


def input_names(model: nn.Module) -> tuple[str, ...]:
    """The names of what a model's forward takes, what it works on first."""
    return tuple(name for name in inspect.signature(model.forward).parameters if name not in {"return_dict", "args", "kwargs"})
