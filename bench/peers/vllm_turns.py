"""vLLM on a CPU writing from one model folder; runs in its own environment, and takes a turn for every line it reads.

    .venvs/vllm_cpu/bin/python vllm_turns.py MODEL PROMPT_TOKENS NEW_TOKENS THREADS

Answers a line of JSON: first what it is, then for each turn the seconds until the first new token and those of each one after.
"""

import json
import os
import sys
import time

import vllm_cpu


def main() -> None:
    """Load, then take turns. vLLM's own lines go to the standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    prompt_tokens, new_tokens, threads = map(int, sys.argv[2:5])
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, range(threads)))
    from vllm import LLM, SamplingParams, __version__

    assert vllm_cpu.NEW_TOKENS  # it has set vLLM's environment
    length = prompt_tokens + new_tokens
    model = LLM(
        sys.argv[1], dtype="bfloat16", enforce_eager=True, max_model_len=length, max_num_batched_tokens=length, max_num_seqs=1,
        seed=0, skip_tokenizer_init=True, enable_prefix_caching=False,
    )  # fmt: skip
    print(json.dumps({"version": __version__}), file=answers, flush=True)
    prompt = {"prompt_token_ids": [3 + 7 * i % 1000 for i in range(prompt_tokens)]}

    def seconds(count: int) -> float:
        sampling = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)
        begin = time.perf_counter()
        model.generate([prompt], sampling, use_tqdm=False)
        return time.perf_counter() - begin

    for _ in sys.stdin:
        first, whole = seconds(1), seconds(new_tokens)
        print(json.dumps([first, (whole - first) / (new_tokens - 1)]), file=answers, flush=True)


if __name__ == "__main__":
    main()
