"""vLLM on a CPU with Duotone's plugin, on one rank or several: what it has loaded, and what it writes.

    .venvs/vllm_cpu/bin/python vllm_plugin_cpu.py CHECKPOINT PROMPTS.json OUT RANKS DTYPE

The environment has duotone, installed beside vLLM. PROMPTS: lists of token ids. OUT gets `written.json` as of vllm_cpu.py with
what multiplies, and for each rank RANK.safetensors: the real weights [N, K] of each of vLLM's fused linears, float32, out of
what is multiplied, and how many bytes that takes.
"""

import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import vllm_cpu

#: Ours alone. Functions are sent to the ranks by name, which vLLM takes for unsafe; each rank has a core of its own.
SETTINGS = {"VLLM_PLUGINS": "duotone", "VLLM_ALLOW_INSECURE_SERIALIZATION": "1", "VLLM_LOGGING_LEVEL": "ERROR"}


def main() -> None:
    """One checkpoint."""
    checkpoint, out, ranks, dtype = sys.argv[1], Path(sys.argv[3]), int(sys.argv[4]), sys.argv[5]
    prompts = json.loads(Path(sys.argv[2]).read_text())
    os.environ.update(SETTINGS | {"VLLM_CPU_OMP_THREADS_BIND": "|".join(map(str, range(ranks)))})
    if ranks > 1:
        del os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"]
    import vllm_plugin_cpu  # what ranks can import: this file, not as the program
    from vllm import LLM, __version__

    model = LLM(checkpoint, dtype=dtype, enforce_eager=True, max_model_len=256, seed=0, tensor_parallel_size=ranks)
    (runs,) = set(model.apply_model(partial(vllm_plugin_cpu.save_weights, out)))
    found = {"vllm": __version__, "runs": runs, **vllm_cpu.written_by(model, prompts)}
    (out / "written.json").write_text(json.dumps(found))


def save_weights(out: Path, model: Any) -> str:
    """On a rank: write down its weights. What multiplies them, in words."""
    import torch
    from safetensors.torch import save_file
    from vllm.distributed import get_tensor_model_parallel_rank

    weights, size, runs = {}, 0, set()
    for name, module in model.named_modules():
        if hasattr(module, "duotone"):
            weights[name] = torch.cat([part.dequantize() for part in module.duotone])
            held = {tensor.data_ptr(): tensor.nbytes for part in module.duotone for tensor in part.packed_tensors()}
            size += sum(held.values())
            runs |= {part.backend.describe(part.scheme) for part in module.duotone}
    save_file(weights, out / f"{get_tensor_model_parallel_rank()}.safetensors", {"bytes": str(size)})
    return ", ".join(sorted(runs))


if __name__ == "__main__":
    main()
