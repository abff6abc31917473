"""A model on this machine: a local folder as it is, or a hub id downloaded once into the hub's own cache."""

import shutil
from pathlib import Path

from huggingface_hub import snapshot_download  # pyright: ignore[reportUnknownVariableType]
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from duotone.checkpoint.writer import reporting_full_disk
from duotone.errors import DuotoneError

#: What of a model folder is read or travels along. Never code, never a pickle.
_PATTERNS = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.tiktoken", "LICENSE*", "NOTICE*"]
#: Second copies of the weights in other layouts.
_NOT_FETCHED = ["consolidated*", "original/*"]
#: Rewritten, or describing the weights that were replaced.
_NOT_COPIED = {"config.json", "model.safetensors.index.json", "duotone.json", "calibration.txt", "evaluation.txt"}


def locate_model(model: str | Path) -> Path:
    """The folder of a model. Raises DuotoneError when it is neither a local folder nor a hub id that can be had."""
    path, name = Path(model), str(model)
    try:
        if path.exists():
            return path
    except OSError as error:  # such as a name that no file system takes
        raise DuotoneError(f"{name}: cannot be a model folder ({error.strerror})") from None
    if name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise DuotoneError(f"{name}: found no such folder, expected a model folder or a hub id such as owner/name")
    try:
        return Path(snapshot_download(name, allow_patterns=_PATTERNS, ignore_patterns=_NOT_FETCHED))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DuotoneError(f"{name}: is no local folder, and the hub does not give it ({reason})") from None


def copy_companions(source: Path, out: Path) -> None:
    """Copy tokenizer, generation config, chat template and licence beside the new weights."""
    for pattern in _PATTERNS:
        for file in sorted(source.glob(pattern)):
            if file.suffix != ".safetensors" and file.name not in _NOT_COPIED and file.is_file():
                with reporting_full_disk(out):
                    shutil.copyfile(file, out / file.name)
