"""llm-compressor, W4AFP8 in compressed-tensors' packed layout: GPTQ with act-order, or round to nearest.

rtn-bytes: as it is written unless told otherwise.
"""

import torch
from job import Job, run


def quantize(job: Job) -> None:
    """One `oneshot` with the W4AFP8 preset; in BF16, as its examples load a model (dtype="auto" of BF16 checkpoints)."""
    from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from transformers import AutoTokenizer

    model = job.load_model(torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    scheme = preset_name_to_scheme("W4AFP8", ["Linear"])
    scheme.weights.group_size = job.group_size
    if job.recipe != "rtn-bytes":
        scheme.format = "pack-quantized"  # the default is one byte a weight, which vLLM's W4AFP8 does not read
    if job.recipe == "gptq":
        job.watch(GPTQModifier, "calibrate_module", "hessian")
        job.watch(GPTQModifier, "compress_module_list", "solve")
        modifier = GPTQModifier(config_groups={"group_0": scheme}, ignore=["lm_head"])
        tokens = job.load_tokens()
        rows = {"input_ids": tokens.tolist(), "attention_mask": torch.ones_like(tokens).tolist()}
        calibration = {
            "dataset": Dataset.from_dict(rows),
            "num_calibration_samples": len(tokens),
            "max_seq_length": tokens.shape[1],
            "shuffle_calibration_samples": False,
        }
    else:
        modifier = QuantizationModifier(config_groups={"group_0": scheme}, ignore=["lm_head"])
        calibration = {}
    with job.timed():
        oneshot(model=model, processor=tokenizer, recipe=modifier, **calibration)
    if job.weights:
        from compressed_tensors.quantization.lifecycle.forward import fake_quantize

        linears = {name: module for name, module in model.named_modules() if hasattr(module, "weight_scale")}
        job.keep_weights(
            {
                name: fake_quantize(module.weight, module.weight_scale, None, module.quantization_scheme.weights)
                for name, module in linears.items()
            }
        )
    with job.refusable():
        model.save_pretrained(job.out, save_compressed=True)
        tokenizer.save_pretrained(job.out)


if __name__ == "__main__":
    run("llmcompressor", "llmcompressor", ("gptq", "rtn", "rtn-bytes"), quantize)
