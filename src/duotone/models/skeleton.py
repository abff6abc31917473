"""A transformers model without its weights: parameters on the meta device, buffers real, filled block by block.

Code of the model comes from the installed transformers; code that lies in a model folder is never run.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from duotone.errors import DuotoneError
from duotone.models.adapter import model_class
from duotone.models.convolutions import why_not
from duotone.models.diffusion import is_diffusers, model_maker
from duotone.models.rewrite import all_linears

#: What transformers and diffusers raise, from validators or from torch, for a config that describes no model.
_BAD_CONFIG = (
    ValueError, LookupError, TypeError, AttributeError, ImportError, RuntimeError, ArithmeticError, AssertionError,
    StrictDataclassError,
)  # fmt: skip


def build_skeleton(config: dict[str, Any], dtype: torch.dtype) -> PreTrainedModel:
    """The model of a config, parameters on meta. Raises DuotoneError when its library cannot build it.

    A model of diffusers is no PreTrainedModel: `text_config` and `tie_weights` here know both.
    """
    try:
        make = model_maker(config, dtype) if is_diffusers(config) else _maker(config, dtype)
        with _parameters_on_meta(), _empty_on_meta():
            model: Any = make()
        if any(buffer.is_meta for buffer in model.buffers()):  # made with torch.empty and filled
            with _parameters_on_meta():
                model = make()
    except _BAD_CONFIG as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        kind = f"diffusers cannot build {config['_class_name']!r}" if is_diffusers(config) else ""
        kind = kind or f"transformers cannot build model_type {config['model_type']!r}"
        raise DuotoneError(f"config.json: {kind}: {reason}") from None
    all_linears(model)
    model.requires_grad_(False)
    return model.eval()


def text_config(model: nn.Module) -> PreTrainedConfig | None:
    """What a config says of the language model, defaults and all; None for what is no model of transformers."""
    return model.config.get_text_config() if isinstance(model, PreTrainedModel) else None


def tie_weights(model: nn.Module) -> None:
    """Give tied weights one memory again, after they were filled."""
    if isinstance(model, PreTrainedModel):
        model.tie_weights()


def placed(inputs: Mapping[str, Any], dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Inputs as a model takes them that is of a dtype and on a device."""
    return tree_map(lambda x: x.to(device, dtype if x.is_floating_point() else x.dtype), dict(inputs))


def _maker(config: dict[str, Any], dtype: torch.dtype) -> Callable[[], PreTrainedModel]:
    """What makes a model of transformers."""
    auto = model_class(config)
    plain = {key: value for key, value in config.items() if key not in {"quantization_config", "auto_map"}}
    model_config = AutoConfig.for_model(**plain)
    return lambda: _make(auto, model_config, dtype)


def _make(kind: Any, config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """A model with torch's own attention, where its class knows it."""
    make = kind._from_config if issubclass(kind, PreTrainedModel) else kind.from_config
    try:
        return make(config, dtype=dtype, attn_implementation="sdpa")
    except ValueError as error:
        if "scaled_dot_product_attention" not in str(error):
            raise
        return make(config, dtype=dtype, attn_implementation="eager")


def fill(model: nn.Module, tensors: dict[str, Tensor], dtype: torch.dtype, device: torch.device) -> None:
    """Put tensors in the places of parameters and buffers, by full name. Raises DuotoneError naming a wrong shape."""
    for name, tensor in tensors.items():
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        current = getattr(module, leaf)
        if tuple(current.shape) != tuple(tensor.shape):
            raise DuotoneError(f"{name}: found shape {list(tensor.shape)}, expected {list(current.shape)} from config.json")
        value = tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else tensor.dtype)
        if isinstance(current, nn.Parameter):
            setattr(module, leaf, nn.Parameter(value, requires_grad=False))
        else:
            module.register_buffer(leaf, value)


def place_buffers(model: nn.Module, device: torch.device) -> None:
    """Bring buffers to a device: those that no checkpoint brings, such as rotary tables, were made on the CPU."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if not buffer.is_meta and buffer.device != device:
                setattr(module, name, buffer.to(device))


def release(module: nn.Module, names: Iterable[str] | None = None) -> None:
    """Send a module's parameters, all or those named, back to meta; their memory is free again."""
    for name in [name for name, _ in module.named_parameters(remove_duplicate=False)] if names is None else names:
        path, _, leaf = name.rpartition(".")
        parent = module.get_submodule(path)
        setattr(parent, leaf, nn.Parameter(parent.get_parameter(leaf).to("meta"), requires_grad=False))


def expected_tensors(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors a checkpoint has to bring: parameters and persistent buffers, tied ones once."""
    seen: set[int] = set()
    expected: dict[str, tuple[int, ...]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            expected[name] = tuple(tensor.shape)
    return expected


def is_parameter(model: nn.Module, name: str) -> bool:
    """Is there a parameter of this full name?"""
    try:
        model.get_parameter(name)
    except AttributeError:
        return False
    return True


def find_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Every linear of the model by full name, in module order; not those of a kind of its own, such as routers."""
    return {name: module for name, module in model.named_modules() if type(module) is nn.Linear}


def find_others(model: nn.Module) -> dict[str, tuple[str, int]]:
    """What multiplies as a linear does and cannot be quantized as one: why, and how many weights it has, by name."""
    found: dict[str, tuple[str, int]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and type(module) is not nn.Linear:
            found[name] = f"a linear of a kind of its own, {type(module).__name__}", module.weight.numel()
        elif isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose2d):
            found[name] = why_not(module), module.weight.numel()
        elif not isinstance(module, nn.Embedding):
            wide = [parameter for parameter in module.parameters(recurse=False) if parameter.ndim == 3 and len(parameter) > 1]
            if wide and min(min(parameter.shape[1:]) for parameter in wide) > 1:
                weights = sum(parameter.numel() for parameter in wide)
                found[name] = f"a bank of matrices of a kind that is not known, {type(module).__name__}", weights
    return found


def check_causal(model: PreTrainedModel, purpose: str) -> None:
    """Raise DuotoneError unless the model predicts each next token, as `purpose` needs."""
    if not isinstance(model, PreTrainedModel) or not model.can_generate():
        raise DuotoneError(f"{type(model).__name__}: predicts no next token, expected a causal language model for {purpose}")


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Register every new parameter on the meta device. Buffers stay real: rotary tables have no tensor in the checkpoint."""
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and param.device.type != "meta":
            param = nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)
        register(module, name, param)

    nn.Module.register_parameter = register_on_meta  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # pyright: ignore[reportAttributeAccessIssue]


@contextmanager
def _empty_on_meta() -> Iterator[None]:
    """What is made with torch.empty takes no memory, not even until it is registered: glibc would not give all of it back."""
    empty = torch.empty

    def empty_on_meta(*size: Any, **options: Any) -> Tensor:
        return empty(*size, **{**options, "device": options.get("device") or "meta"})

    torch.empty = empty_on_meta
    try:
        yield
    finally:
        torch.empty = empty
