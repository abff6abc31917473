"""NVIDIA ModelOpt, W4A8_AWQ_BETA_CFG: AWQ-lite over INT4 blocks, FP8 activations with static scales."""

import copy

import torch
from job import Job, run


def quantize(job: Job) -> None:
    """`mtq.quantize` and `export_hf_checkpoint`; in BF16, as its example scripts load a BF16 checkpoint."""
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint
    from transformers import AutoTokenizer

    model = job.load_model(torch.bfloat16)
    config = copy.deepcopy(mtq.W4A8_AWQ_BETA_CFG)
    for entry in config["quant_cfg"]:
        for numbers in entry["cfg"] if isinstance(entry.get("cfg"), list) else ():
            if numbers.get("block_sizes"):
                numbers["block_sizes"][-1] = job.group_size

    tokens = job.load_tokens()

    def calibrate(model: torch.nn.Module) -> None:
        with torch.no_grad():
            for window in tokens:
                model(input_ids=window[None])

    with job.timed():
        mtq.quantize(model, config, calibrate)
    if job.weights:
        from modelopt.torch.export.unified_export_hf import requantize_resmooth_fused_llm_layers

        twin = copy.deepcopy(model)
        requantize_resmooth_fused_llm_layers(twin)  # the export's first step: it changes weights, and the norms before them
        linears = {name: module for name, module in twin.named_modules() if getattr(module, "weight_quantizer", None)}
        job.keep_weights(
            {
                name: module.weight_quantizer(module.weight)
                for name, module in linears.items()
                if module.weight_quantizer.is_enabled
            }
        )
    with job.refusable():
        export_hf_checkpoint(model, export_dir=job.out)
        AutoTokenizer.from_pretrained(job.model).save_pretrained(job.out)


if __name__ == "__main__":
    run("modelopt", "nvidia-modelopt", ("w4a8_awq",), quantize)
