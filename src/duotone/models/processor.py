"""The processor that lies in a model folder: what makes tensors of images and text."""

from pathlib import Path
from typing import Any

from transformers.utils.import_utils import is_torchvision_available, is_vision_available

from duotone.errors import DuotoneError


def load_processor(folder: Path) -> Any:
    """The processor of a model folder; its code, if it brings any, is never run. Raises DuotoneError when there is none."""
    if not is_vision_available():
        raise DuotoneError(f"{folder}: images need Pillow, found none (pip install 'duotone[vision]')")
    try:
        from transformers import AutoProcessor  # here, since it imports torchvision, which may not fit this torch

        processor: Any = AutoProcessor.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, ImportError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        hint = "" if is_torchvision_available() else "; videos and some images need torchvision (pip install 'duotone[vision]')"
        raise DuotoneError(
            f"{folder}: found no usable processor of images, expected preprocessor_config.json ({reason}){hint}"
        ) from None
    if not hasattr(processor, "image_processor") or not hasattr(processor, "tokenizer"):
        raise DuotoneError(f"{folder}: found a {type(processor).__name__}, expected a processor of images and text")
    return processor
