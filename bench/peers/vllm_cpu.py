"""vLLM on a CPU, as a user runs it: what it writes after prompts, greedily, and how likely it holds each token.

    .venvs/vllm_cpu/bin/python vllm_cpu.py CHECKPOINT PROMPTS.json OUT.json

PROMPTS: lists of token ids. OUT: vllm's version, and for each prompt the tokens it added with the logarithm of each one's
probability, or `refused`: what it raised.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

#: In this process, so that a refusal is an exception here and not a worker's end.
os.environ.update({"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_CPU_KVCACHE_SPACE": "1"})
#: The model lies on the disk.
os.environ["HF_HUB_OFFLINE"] = "1"
NEW_TOKENS = 24


def main() -> None:
    """One checkpoint."""
    import vllm

    checkpoint, prompts, out = sys.argv[1], json.loads(Path(sys.argv[2]).read_text()), Path(sys.argv[3])
    found = {"vllm": vllm.__version__, "refused": None, "tokens": [], "logprobs": []}
    try:
        model = vllm.LLM(checkpoint, dtype="bfloat16", enforce_eager=True, max_model_len=256, seed=0)
    except Exception as error:  # whatever it is, it is the tool's refusal
        found["refused"] = " ".join(str(error).split())
    else:
        found |= written_by(model, prompts)
    out.write_text(json.dumps(found))


def written_by(model: Any, prompts: list[list[int]]) -> dict[str, list[Any]]:
    """What it adds to each prompt: tokens, and the logarithm of each one's probability."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, min_tokens=NEW_TOKENS, logprobs=0)
    tokens, logprobs = [], []
    for result in model.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False):
        (written,) = result.outputs
        tokens.append(list(written.token_ids))
        pairs = zip(written.token_ids, written.logprobs or (), strict=True)
        logprobs.append([step[token].logprob for token, step in pairs])
    return {"tokens": tokens, "logprobs": logprobs}


if __name__ == "__main__":
    main()
