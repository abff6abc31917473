"""A model on this machine: a local folder as it is, or a hub id downloaded once into the hub's own cache."""

import json
import shutil
from pathlib import Path

from huggingface_hub import snapshot_download  # pyright: ignore[reportUnknownVariableType]
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from duotone.checkpoint.writer import reporting_full_disk
from duotone.errors import DuotoneError

#: What of a model folder is read or travels along. Never code, never a pickle.
_PATTERNS = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.tiktoken", "LICENSE*", "NOTICE*"]
#: Read for its license, and never copied: a checkpoint has a card of its own.
_CARD = "README.md"
#: Second copies of the weights in other layouts.
_NOT_FETCHED = ["consolidated*", "original/*"]
#: Rewritten, or describing the weights that were replaced.
_NOT_COPIED = {
    "config.json", "model.safetensors.index.json", "duotone.json", "duotone-run.json", "duotone-evaluation.json",
    "calibration.txt", "evaluation.txt", "quantize_config.json", "hf_quant_config.json",
}  # fmt: skip


def locate_model(model: str | Path) -> Path:
    """The folder of a model. Raises DuotoneError when it is neither a local folder nor a hub id that can be had."""
    path, name = Path(model), str(model)
    try:
        if path.is_file():
            raise DuotoneError(f"{name}: is a file, expected a model folder or a hub id such as owner/name")
        if path.exists():
            return path
    except OSError as error:  # such as a name that no file system takes
        raise DuotoneError(f"{name}: cannot be a model folder ({error.strerror})") from None
    if name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise DuotoneError(f"{name}: found no such folder, expected a model folder or a hub id such as owner/name")
    try:
        return Path(snapshot_download(name, allow_patterns=[*_PATTERNS, _CARD], ignore_patterns=_NOT_FETCHED))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise DuotoneError(f"{name}: is no local folder, and the hub does not give it ({_reason(error)})") from None


def _reason(error: Exception) -> str:
    """Why the hub gives nothing, and what to do where that is known; else the error's first line."""
    if isinstance(error, GatedRepoError):
        return "it is gated: accept its terms on its page there, then hf auth login"
    if isinstance(error, RepositoryNotFoundError):
        return "it has no model of that name, or a private one: hf auth login"
    if isinstance(error, LocalEntryNotFoundError):
        return "it cannot be reached from here, and nothing of that name was downloaded before"
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def copy_companions(source: Path, out: Path) -> None:
    """Copy tokenizer, generation config, chat template and licence beside the new weights.

    Of a sentence-transformers model also the folders that its modules.json names, such as 1_Pooling, with their weights. Raises
    DuotoneError when one of them is no folder directly in `source`.
    """
    for folder in _module_folders(source):
        (out / folder.name).mkdir()
    for file in companions(source):
        _copy(file, out / file.relative_to(source))


def companions(source: Path) -> list[Path]:
    """The files that `copy_companions` copies."""
    own = [file for file in _matching(source) if file.suffix != ".safetensors" and file.name not in _NOT_COPIED]
    return own + [file for folder in _module_folders(source) for file in _matching(folder)]


def _matching(folder: Path) -> list[Path]:
    return sorted({file for pattern in _PATTERNS for file in folder.glob(pattern) if file.is_file()})


def _copy(file: Path, to: Path) -> None:
    with reporting_full_disk(to.parent):
        shutil.copyfile(file, to)


def _module_folders(source: Path) -> list[Path]:
    """The folders of modules after the transformer: pooling, dense layers. One without settings (Normalize) may have none."""
    listing = source / "modules.json"
    if not listing.is_file():
        return []
    try:
        names = [module["path"] for module in json.loads(listing.read_text(encoding="utf-8"))]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise DuotoneError(f"{listing}: found no list of modules, expected one with a path each") from None
    folders = [source / str(name) for name in dict.fromkeys(names) if name]
    for folder in folders:
        # A link may lead anywhere; what lies there is not this model's.
        outside = folder.parent != source or folder.name == ".." or folder.is_symlink()
        if outside or (folder.exists() and not folder.is_dir()):
            raise DuotoneError(f"{listing}: found the path {folder.name!r}, expected a folder directly beside it")
    return [folder for folder in folders if folder.exists()]
