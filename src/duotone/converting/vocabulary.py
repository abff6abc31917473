"""A tokenizer.json as the keys of a GGUF file: byte-level BPE, and BPE with bytes to fall back on as Llama 2 has it."""

import logging
from pathlib import Path
from typing import Any

from duotone.checkpoint.source import read_json
from duotone.errors import DuotoneError

#: llama.cpp knows how text is cut before BPE by a name; here by what of the regular expression tells.
_CUTS = (("\\p{N}{1,3}", "llama-bpe"), ("\\p{N}", "qwen2"))


def add_vocabulary(writer: Any, gguf: Any, folder: Path, size: int) -> list[str]:
    """Tokens, merges and special tokens; returns what is not known of them, a sentence each. size: rows of the embedding.

    Raises DuotoneError for tokens that the embedding has no rows for, or that are none.
    """
    if not (folder / "tokenizer.json").is_file():
        writer.add_tokenizer_model("no_vocab")
        return ["found no tokenizer.json: the file has no vocabulary, and llama.cpp takes and gives token numbers only"]
    tokenizer = read_json(folder / "tokenizer.json")
    model = tokenizer.get("model") or {}
    notes: list[str] = []
    if model.get("type") != "BPE":
        writer.add_tokenizer_model("no_vocab")
        return [f"the tokenizer is {model.get('type')!r}, expected BPE: the file has no vocabulary"]
    fallback = bool(model.get("byte_fallback"))
    writer.add_tokenizer_model("llama" if fallback else "gpt2")
    if not fallback:
        cut = _cut(tokenizer.get("pre_tokenizer") or {})
        writer.add_tokenizer_pre(cut or "default")
        if cut is None:
            notes.append("how text is cut before BPE has no name here: llama.cpp uses its default, tokens may differ")
    try:
        texts, kinds = _tokens(gguf, tokenizer, size, fallback)
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        raise DuotoneError(
            f"{folder / 'tokenizer.json'}: its tokens are damaged ({error!r}), expected each with a number below {size}"
        ) from None
    writer.add_token_list(texts)
    if fallback:
        writer.add_token_scores([-float(i) for i in range(len(texts))])
    writer.add_token_types(kinds)
    log = logging.getLogger("gguf.vocab")
    before, log.disabled = log.disabled, True  # it tells of templates for pairs of texts, which no decoder reads
    try:
        gguf.SpecialVocab(folder, load_merges=not fallback, n_vocab=len(texts)).add_to_gguf(writer, quiet=True)
    finally:
        log.disabled = before
    return notes


def _tokens(gguf: Any, tokenizer: dict[str, Any], size: int, fallback: bool) -> tuple[list[str], list[int]]:
    """Text and kind of each row of the embedding; rows without a token are padding."""
    kind = gguf.TokenType
    texts = [f"[PAD{i}]" for i in range(size)]
    kinds = [int(kind.UNUSED)] * size
    for text, number in tokenizer["model"]["vocab"].items():
        is_byte = fallback and len(text) == 6 and text.startswith("<0x")
        texts[number], kinds[number] = text, int(kind.BYTE if is_byte else kind.NORMAL)
    for token in tokenizer.get("added_tokens") or []:
        number = token["id"]
        texts[number], kinds[number] = token["content"], int(kind.CONTROL if token["special"] else kind.USER_DEFINED)
    if fallback and tokenizer["model"].get("unk_token"):
        kinds[texts.index(tokenizer["model"]["unk_token"])] = int(kind.UNKNOWN)
    return texts, kinds


def _cut(step: dict[str, Any]) -> str | None:
    """llama.cpp's name for a pre-tokenizer; None where it is none of those that are known."""
    steps = step.get("pretokenizers", [step])
    patterns = [one["pattern"].get("Regex", "") for one in steps if one.get("type") == "Split"]
    if patterns:
        return next((name for mark, name in _CUTS if mark in patterns[0]), None)
    return "gpt-2" if [one.get("type") for one in steps] == ["ByteLevel"] and steps[0].get("use_regex", True) else None
