# safetensors and JSON come without types.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""Reading a Hugging Face model folder: its config, its index, its safetensors shards, all of it distrusted.

Tensors are read one at a time through safetensors' memory map; nothing is unpickled and no path leaves the folder.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from duotone.checkpoint.headers import TORCH_NAMES, TensorSpec, read_header
from duotone.errors import DuotoneError

#: What the weights' files are called: by transformers, and by diffusers.
_STEMS = ("model", "diffusion_pytorch_model")
#: Configs and indexes are small; a larger one is not what it says it is.
_MAX_JSON_BYTES = 256 * 1024 * 1024


class Source(Protocol):
    """A model's tensors by name and the config they belong to: a folder as it is, or one seen through a transform."""

    @property
    def path(self) -> Path:
        """The folder."""
        ...

    @property
    def config(self) -> dict[str, Any]:
        """config.json, of the model that the tensors make."""
        ...

    @property
    def tensors(self) -> dict[str, TensorSpec]:
        """Dtype and shape in which `load` gives each tensor, and the file it comes from."""
        ...

    @property
    def weight_bytes(self) -> int:
        """Bytes of all tensors of the folder."""
        ...

    def load(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Tensors by name, on the CPU. Raises DuotoneError naming a missing tensor or a bad file."""
        ...

    def written_as(self, name: str) -> str:
        """The name that a tensor, or a part of the quantized weight that takes its place, has in a new folder."""
        ...

    def as_stored(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor that `load` gave, in the form in which a new folder holds it."""
        ...


@dataclass(frozen=True)
class SourceFolder:
    """A local model folder whose headers have been read and checked.

    config: the parsed config.json. tensors: every tensor's dtype, shape and file, by name, from the shards' headers.
    """

    path: Path
    config: dict[str, Any]
    tensors: dict[str, TensorSpec]

    def load(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Tensors by name, on the CPU in their stored dtype. Raises DuotoneError naming a missing tensor or a bad file."""
        wanted: dict[str, list[str]] = {}
        for name in names:
            if name not in self.tensors:
                raise DuotoneError(f"{self.path}: found no tensor {name!r}, expected it for this architecture")
            wanted.setdefault(self.tensors[name].file, []).append(name)
        loaded: dict[str, Tensor] = {}
        for file, members in wanted.items():
            try:
                with safe_open(self.path / file, framework="pt") as shard:
                    loaded.update({name: shard.get_tensor(name) for name in members})
            except (SafetensorError, OSError) as error:
                raise DuotoneError(f"{self.path / file}: cannot be read as safetensors ({error})") from None
        return loaded

    def written_as(self, name: str) -> str:
        """The same name."""
        return name

    def as_stored(self, name: str, tensor: Tensor) -> Tensor:  # noqa: ARG002 - the protocol's
        """The same tensor."""
        return tensor

    @property
    def weight_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(spec.nbytes for spec in self.tensors.values())


@dataclass(frozen=True)
class MemorySource:
    """Tensors that are in memory already: those of a module given in Python. path: what to call it by."""

    path: Path
    members: dict[str, Tensor]

    @property
    def config(self) -> dict[str, Any]:
        """A module has none."""
        return {}

    @property
    def tensors(self) -> dict[str, TensorSpec]:
        """Dtype and shape of each tensor."""
        return {name: TensorSpec(TORCH_NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in self.members.items()}

    @property
    def weight_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.members.values())

    def load(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Tensors by name."""
        return {name: self.members[name] for name in names}

    def written_as(self, name: str) -> str:
        """The same name."""
        return name

    def as_stored(self, name: str, tensor: Tensor) -> Tensor:  # noqa: ARG002 - the protocol's
        """The same tensor."""
        return tensor


def load_finite(source: Source, names: Iterable[str]) -> dict[str, Tensor]:
    """Tensors of a source. Raises DuotoneError naming one that holds NaN or infinity."""
    tensors = source.load(names)
    check_finite(source, tensors)
    return tensors


def check_finite(source: Source, tensors: dict[str, Tensor]) -> None:
    """Raise DuotoneError naming a tensor of a source, wherever it lies, that holds NaN or infinity."""
    for name, tensor in tensors.items():
        if source.tensors[name].is_float and not bool(torch.isfinite(tensor).all()):
            bad = int((~torch.isfinite(tensor)).sum())
            raise DuotoneError(f"{source.path / source.tensors[name].file}: {name} holds {bad} NaN or infinite values")


def open_source(path: Path) -> SourceFolder:
    """Read config.json and all shard headers of a local folder; check that each named shard and tensor is really there."""
    if not path.is_dir():
        raise DuotoneError(f"{path}: is not a folder, expected a model folder with config.json and *.safetensors")
    config = read_json(path / "config.json")
    if not architecture_of(config):
        raise DuotoneError(f"{path / 'config.json'}: found no 'model_type', expected the architecture's name, such as 'llama'")
    return SourceFolder(path, config, _read_tensors(path))


def architecture_of(config: dict[str, Any]) -> str:
    """What a config calls its architecture: `model_type`, or in diffusers' folders `_class_name`; "" where it does not."""
    found = config.get("model_type", config.get("_class_name"))
    return found if isinstance(found, str) else ""


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises DuotoneError when it is missing, too large, not JSON or not an object."""
    if not path.is_file():
        raise DuotoneError(f"{path}: found no such file, expected it in a model folder")
    if path.stat().st_size > _MAX_JSON_BYTES:
        raise DuotoneError(f"{path}: found {path.stat().st_size} bytes, expected at most {_MAX_JSON_BYTES} of JSON")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DuotoneError(f"{path}: is not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise DuotoneError(f"{path}: found a JSON {type(value).__name__}, expected an object")
    return value


def _read_tensors(path: Path) -> dict[str, TensorSpec]:
    files = [(path / f"{stem}.safetensors", path / f"{stem}.safetensors.index.json") for stem in _STEMS]
    single, index_path = next((both for both in files if any(file.exists() for file in both)), files[0])
    if not index_path.exists():
        if not single.exists():
            other = sorted(file.name for file in path.iterdir() if file.suffix in {".bin", ".pt", ".pth", ".gguf"})
            hint = f"; found {other[0]}, convert it to safetensors first" if other else ""
            raise DuotoneError(f"{path}: found neither {single.name} nor {index_path.name}{hint}")
        return read_header(single)
    weight_map = read_json(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise DuotoneError(f"{index_path}: found no 'weight_map', expected a table from tensor names to shard files")
    tensors: dict[str, TensorSpec] = {}
    for file in sorted({_plain_name(index_path, value) for value in weight_map.values()}):
        if not (path / file).is_file():
            raise DuotoneError(f"{path / file}: found no such shard, expected it because {index_path.name} names it")
        header = read_header(path / file)
        tensors.update({name: spec for name, spec in header.items() if weight_map.get(name) == file})
    missing = sorted(str(name) for name in weight_map if name not in tensors)
    if missing:
        raise DuotoneError(f"{index_path}: names {missing[0]!r} in {weight_map[missing[0]]!r}, found no such tensor there")
    return tensors


def _plain_name(index_path: Path, value: object) -> str:
    """The shard's file name, refused if it could lead out of the folder or is no safetensors file."""
    if not isinstance(value, str) or PurePosixPath(value).name != value or "\\" in value or "\0" in value:
        raise DuotoneError(f"{index_path}: found the shard path {value!r}, expected a plain file name inside the folder")
    if not value.endswith(".safetensors"):
        raise DuotoneError(f"{index_path}: found the shard {value!r}, expected a .safetensors file")
    return value
