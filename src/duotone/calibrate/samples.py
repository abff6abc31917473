"""Calibration samples that are tensors already: a model's inputs by name, out of a file or out of Python."""

import hashlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from duotone.calibrate.data import TokenWindows, batch_size
from duotone.calibrate.pairs import ImageTextPairs
from duotone.calibrate.sources import parse_sources
from duotone.errors import DuotoneError
from duotone.models.diffusion import nested

#: Numbers of one forward pass's inputs: pictures of 224 x 224 in threes and fours, small ones by the hundred.
_BATCH_NUMBERS = 2**19


@dataclass(frozen=True, eq=False)
class TensorSamples:
    """Samples by input name, each tensor [count, ...], and the files they came from. sha256: of those files."""

    tensors: dict[str, Tensor]
    sources: tuple[str, ...]
    sha256: str
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        """How many samples."""
        return len(next(iter(self.tensors.values())))

    @property
    def positions(self) -> int:
        """Samples; how many positions a linear sees of each is the model's affair."""
        return len(self)

    def batches(self, least: int = 1, written: int = 0) -> list[dict[str, Any]]:  # noqa: ARG002 - as TokenWindows
        """The inputs of forward passes."""
        one = sum(tensor[0].numel() for tensor in self.tensors.values())
        size = batch_size(len(self), _BATCH_NUMBERS // one, least)
        cut = {name: tensor.split(size) for name, tensor in self.tensors.items()}
        return [nested(dict(zip(cut, parts, strict=True))) for parts in zip(*cut.values(), strict=True)]


#: What can be calibrated on.
Samples = TokenWindows | ImageTextPairs | TensorSamples


def are_tensors(sources: Sequence[str]) -> bool:
    """Do these name files of tensors? Raises DuotoneError where some do and some do not."""
    found = [source.name for source in parse_sources(sources) if source.name.endswith(".safetensors")]
    if found and len(found) < len(sources):
        raise DuotoneError(f"--calibration: found {found[0]} beside other kinds, expected .safetensors files alone, or none")
    if found and found[0] not in sources:
        raise DuotoneError(f"{found[0]}: holds tensors, found a weight beside it, expected none: weights are for texts")
    return bool(found)


def first_sample(sources: Sequence[str]) -> dict[str, Tensor] | None:
    """Zeros in the place of a first sample, by name, None where the sources are no tensors; nothing but shapes is read.

    Raises DuotoneError as `are_tensors` and for a file that cannot be read.
    """
    if not are_tensors(sources):
        return None
    with _opened(sources[0]) as file:
        parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        if any(not part.get_shape() or not part.get_shape()[0] for part in parts.values()):
            raise DuotoneError(f"{sources[0]}: holds a tensor without samples, expected a first dimension of them")
        return {name: torch.zeros_like(part[:1]) for name, part in parts.items()}


def input_shapes(sources: Sequence[str]) -> dict[str, list[Any]]:
    """Of each input of a first sample: the dtype's name, then the sizes. Raises DuotoneError as `first_sample`."""
    first = first_sample(sources) or {}
    return {name: [str(tensor.dtype).removeprefix("torch."), *tensor.shape] for name, tensor in first.items()}


def read_samples(sources: Sequence[str], inputs: Sequence[str], count: int, seed: int) -> TensorSamples:
    """`count` samples from .safetensors files of a model's inputs, drawn by `seed` and kept in order.

    inputs: the names that the model's forward takes. Raises DuotoneError naming a file that cannot be read, an input that the
    model does not have, or tensors that do not belong together.
    """
    digest, parts = hashlib.sha256(), list[dict[str, Tensor]]()
    for source in sources:
        with _opened(source) as file:
            digest.update(Path(source).read_bytes())
            parts.append({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 - no mapping
        _check_part(source, parts[-1], parts[0], inputs)
    tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    whole = len(next(iter(tensors.values())))
    notes = (f"{Path(sources[0]).name}: holds {whole} samples, {count} were asked for",) if whole < count else ()
    chosen = torch.randperm(whole, generator=torch.Generator().manual_seed(seed))[:count].sort().values
    order = list(inputs)  # a whole model is called with its first input by position
    names = sorted(tensors, key=lambda name: order.index(name.partition(".")[0]))
    return TensorSamples({name: tensors[name][chosen] for name in names}, tuple(sources), digest.hexdigest(), notes)


@contextmanager
def note_inputs(module: nn.Module, path: str | Path) -> Iterator[None]:
    """Write down what a module is called with while this lasts, as samples to calibrate on: a .safetensors file at the end.

    Such as a pipeline's unet, while pictures are made. What one call gives once for all its samples (a time step, positions) is
    written for each. Raises DuotoneError when the module was not called, or with tensors that do not fit together.
    """
    noted: dict[str, list[Tensor]] = {}
    signature = inspect.signature(module.forward)

    def note(_: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
        given = signature.bind(*positional, **named).arguments
        flat = {name: value for name, value in given.items() if isinstance(value, Tensor)}
        for name, inner in given.items():
            if isinstance(inner, Mapping):
                flat |= {f"{name}.{key}": value for key, value in inner.items() if isinstance(value, Tensor)}
        count = len(next(iter(flat.values()), torch.zeros(0)))
        for name, value in flat.items():
            each = value if value.shape[:1] == (count,) else value.expand(count, *value.shape)
            noted.setdefault(name, []).append(each.detach().cpu())

    handle = module.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
    if not noted:
        raise DuotoneError(f"{type(module).__name__}: was not called, expected calls to note")
    try:
        tensors = {name: torch.cat(parts) for name, parts in noted.items()}
    except RuntimeError as error:
        raise DuotoneError(f"{type(module).__name__}: its calls differ, expected inputs of one shape each ({error})") from None
    if len({len(tensor) for tensor in tensors.values()}) != 1:
        raise DuotoneError(f"{type(module).__name__}: found calls with {sorted(noted)}, expected the same inputs in all")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


@contextmanager
def _opened(source: str) -> Iterator[Any]:
    try:
        with safe_open(source, framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise DuotoneError(f"{source}: cannot be read as safetensors ({error})") from None


def _check_part(source: str, part: Mapping[str, Tensor], first: Mapping[str, Tensor], inputs: Sequence[str]) -> None:
    unknown = sorted(name for name in part if name.partition(".")[0] not in inputs)
    if unknown or not part:
        raise DuotoneError(f"{source}: found tensors {sorted(part)}, expected inputs of the model: {', '.join(inputs[:8])}")
    counts = {name: tensor.shape[:1] for name, tensor in part.items()}
    if len(set(counts.values())) > 1 or () in {tuple(size) for size in counts.values()}:
        sizes: dict[str, Any] = {name: list(tensor.shape) for name, tensor in part.items()}
        raise DuotoneError(f"{source}: found shapes {sizes}, expected the same first dimension, one a sample")
    if part.keys() != first.keys():
        raise DuotoneError(f"{source}: found tensors {sorted(part)}, expected {sorted(first)} as in the file before")
    for name, tensor in part.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise DuotoneError(f"{source}: {name} holds NaN or infinite values")
