"""Continue a prompt, token by token."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import TextStreamer

from duotone.checkpoint.hub import locate_model
from duotone.device import check_seed
from duotone.errors import DuotoneError
from duotone.models.skeleton import check_causal
from duotone.models.tokenizer import check_tokens, load_tokenizer
from duotone.runtime.load import load


@dataclass(frozen=True)
class Generation:
    """The continuation, its length in tokens, and the speed of the whole call (prompt included) in new tokens a second."""

    text: str
    new_tokens: int
    tokens_per_second: float


class _Streamer(TextStreamer):
    """Hands each piece of text on as soon as its words are whole."""

    def __init__(self, tokenizer: object, on_text: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)  # pyright: ignore[reportArgumentType]
        self._on_text = on_text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Called by transformers with each finished piece."""
        del stream_end
        self._on_text(text)


def generate(
    model: str | Path,
    prompt: str,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    device: str = "auto",
    *,
    on_text: Callable[[str], None] | None = None,
) -> Generation:
    """Continue `prompt` with a model folder or hub id; temperature 0 is greedy. Raises DuotoneError for an unusable model."""
    if max_new_tokens < 1:
        raise DuotoneError(f"--max-new-tokens: found {max_new_tokens}, expected at least 1")
    if not 0 <= temperature < float("inf"):
        raise DuotoneError(f"--temperature: found {temperature}, expected 0 (greedy) or more")
    check_seed(seed)
    folder = locate_model(model)
    tokenizer, network = load_tokenizer(folder), load(folder, device=device)
    check_causal(network, "generation")
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(network.device)
    if not inputs["input_ids"].shape[1]:
        raise DuotoneError("PROMPT: gives no token, expected some text")
    check_tokens(inputs["input_ids"], network, folder)
    torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    start = time.perf_counter()
    with torch.no_grad():
        output = network.generate(  # pyright: ignore[reportCallIssue]
            **inputs,
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            streamer=None if on_text is None else _Streamer(tokenizer, on_text),
            **sampling,
        )
    seconds = time.perf_counter() - start
    new = output[0, inputs["input_ids"].shape[1] :]
    return Generation(str(tokenizer.decode(new, skip_special_tokens=True)), len(new), len(new) / seconds)
