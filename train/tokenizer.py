"""Train the byte-level BPE tokenizer on the training split and turn documents into rows of token ids."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from corpus import read_split

VOCABULARY = 4096
BOS, EOS = "<s>", "</s>"
BOS_ID, EOS_ID = 0, 1


def train_tokenizer(build: Path) -> Tokenizer:
    """Return the tokenizer trained on the training split, reading it from `build` if it is already there."""
    target = build / "tokenizer.json"
    if target.exists():
        return Tokenizer.from_file(str(target))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((d.text for d in read_split(build, "train")), trainer)
    # As with Llama's own tokenizer, a plain call puts BOS first.
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, BOS_ID)]
    )
    tokenizer.save(str(target))
    return tokenizer


def token_stream(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    """Return all texts as one stream of ids, each text followed by EOS and none preceded by BOS."""
    encoded = tokenizer.encode_batch(texts, add_special_tokens=False)
    return np.concatenate([np.array([*e.ids, EOS_ID], dtype=np.int64) for e in encoded])


def rows(stream: np.ndarray, length: int) -> np.ndarray:
    """Cut a stream into rows of BOS followed by `length` ids; the incomplete last row is left out.

    Every row begins with BOS because that is how the model is calibrated, evaluated and prompted.
    """
    count = len(stream) // length
    body = stream[: count * length].reshape(count, length)
    return np.concatenate([np.full((count, 1), BOS_ID, dtype=np.int64), body], axis=1)
