"""Intel Neural Compressor, DPQ: GPTQ that knows of the FP8 step (fp8_aware) with group-aware order (hybrid_order)."""

import contextlib
import tempfile
from typing import Any

import torch
from job import Job, run


def quantize(job: Job) -> None:
    """Weights only: on a CPU the tool has no way to calibrate or run the FP8 activations. BF16, as its W4A8 flow asks."""
    with tempfile.TemporaryDirectory() as scratch, contextlib.chdir(scratch):  # it leaves a folder nc_workspace where it runs
        from neural_compressor.torch.quantization import GPTQConfig, convert, prepare, save
        from transformers import AutoTokenizer

        model = job.load_model(torch.bfloat16)
        config = GPTQConfig(
            group_size=job.group_size, use_sym=True, fp8_aware=True, hybrid_order=True, block_size=128, percdamp=0.01
        )
        tokens = job.load_tokens()
        found = _record_weights() if job.weights else None
        with job.timed():
            model = prepare(model, config)
            for window in tokens:
                model(input_ids=window[None], use_cache=False)
            model = convert(model)
        if found is not None:
            names = [name for name, module in model.named_modules() if hasattr(module, "qweight")]
            job.keep_weights(dict(zip(names, found, strict=True)))
        with job.refusable():
            save(model, str(job.out), format="huggingface")
            AutoTokenizer.from_pretrained(job.model).save_pretrained(job.out)


def _record_weights() -> list[torch.Tensor]:
    """What the solver takes for each layer's weights, in the order of the layers: the packed module has no FP8 in it."""
    from neural_compressor.torch.algorithms.weight_only.gptq import GPTQ

    found: list[torch.Tensor] = []
    solve = GPTQ.fasterquant

    def recorded(*arguments: Any, **keywords: Any) -> Any:
        result = solve(*arguments, **keywords)
        found.append(result[-1].clone())
        return result

    GPTQ.fasterquant = recorded
    return found


if __name__ == "__main__":
    run("inc", "neural-compressor-pt", ("dpq",), quantize)
