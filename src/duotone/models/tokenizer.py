"""The tokenizer that lies in a model folder."""

from pathlib import Path
from typing import cast

from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from duotone.errors import DuotoneError


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder; its code, if it brings any, is never run. Raises DuotoneError when there is none."""
    try:
        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise DuotoneError(f"{folder}: found no usable tokenizer, expected tokenizer.json or its kin ({reason})") from None


def check_tokens(tokens: Tensor, model: PreTrainedModel, folder: Path) -> None:
    """Raise DuotoneError when a token lies beyond the model's embedding table: its tokenizer belongs to another model."""
    rows = cast("Tensor", model.get_input_embeddings().weight).shape[0]
    if tokens.numel() and int(tokens.max()) >= rows:
        raise DuotoneError(
            f"{folder}: its tokenizer gives token {int(tokens.max())}, expected below {rows}, the rows of the embedding"
        )
