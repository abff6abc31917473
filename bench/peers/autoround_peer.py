"""AutoRound: W4A16 in GPTQ's layout, or `fp8_to_int_sym`, its two-level FP8-to-INT4 weights with static FP8 activations.

No format of AutoRound 0.16.1 but `fake` takes 4-bit fp8_to_int_sym, so that recipe's checkpoint is what the tool holds in
memory after tuning, under names of ours (`read_gptq` in layout_gptq.py reads them back). For each quantized linear X:
    X.level        int8 [N, K], -8..7
    X.scale        float32 [N, G], signed: BF16 scale in FP8 units times outer_scale; weight = level * scale
    X.outer_scale  float32 scalar, max|W| / 448: the tool rounds W / outer_scale to E4M3 before it tunes the INT4 levels
    X.input_scale  float32 scalar, the static activation scale its exporters would write
Every other tensor is there under its own name. PEER_ITERS overrides a recipe's iterations (for quick checks of the plumbing).
"""

import os
from pathlib import Path
from typing import Any

import torch
from job import Job, Refusal, run

TWO_LEVEL = "fp8_to_int_sym"
#: Tokens of one tuning step: eight windows, the default, or more where windows are short. docs/LOG.md has the comparison.
STEP_TOKENS = 2048
RECIPES: dict[str, dict[str, Any]] = {  # without lr: 1/iters, AutoRound's own
    "w4a16-200": {"iters": 200},
    "w4a16-light": {"iters": 50, "lr": 5e-3},  # what its command auto-round-light sets
    "w4a16-awq": {"iters": 200},  # the same, saved in AutoAWQ's layout
    TWO_LEVEL: {
        "iters": 200, "data_type": TWO_LEVEL, "bits": 4, "sym": True,
        "act_bits": 8, "act_data_type": "fp8_sym", "act_dynamic": False, "act_group_size": 0,
    },
}  # fmt: skip


def quantize(job: Job) -> None:
    """The windows go in as token tensors, eight at a time; model and tuning dtype are the tool's choice."""
    import auto_round.schemes as schemes
    from auto_round import AutoRound
    from transformers import AutoTokenizer

    infer = schemes.infer_bits_by_data_type  # reads "fp8" off the name fp8_to_int_sym and makes it 8 bits, whatever bits= says
    schemes.infer_bits_by_data_type = lambda name: None if name == TWO_LEVEL else infer(name)
    settings = {"scheme": "W4A16", "group_size": job.group_size} | RECIPES[job.recipe]
    settings["iters"] = int(os.environ.get("PEER_ITERS", settings["iters"]))
    tokens = job.load_tokens()
    batch = max(8, STEP_TOKENS // tokens.shape[1])
    settings |= {"dataset": list(tokens.split(batch)), "batch_size": batch, "nsamples": len(tokens), "seqlen": tokens.shape[1]}
    model, tokenizer = job.load_model("auto"), AutoTokenizer.from_pretrained(job.model)
    layout = "auto_awq" if job.recipe == "w4a16-awq" else "auto_gptq"
    try:
        with job.refusable():
            tool = AutoRound(model, tokenizer, **settings, seed=job.seed, device_map="cpu")
        with job.timed():
            if job.recipe == TWO_LEVEL:
                model, _ = tool.quantize()
            else:
                _, folder = tool.quantize_and_save(str(job.out), format=layout)  # writes block by block: not separable
    except SystemExit as end:
        raise Refusal("AutoRound ended the process, see its log") from end
    if job.recipe == TWO_LEVEL:
        _save(job, model)
        tokenizer.save_pretrained(job.out)
    else:
        for file in Path(folder).iterdir():  # it makes a folder of its own, `wiki-6m-w4g128`
            file.rename(job.out / file.name)
        Path(folder).rmdir()


def _save(job: Job, model: Any) -> None:
    """Write the tuned model as the module's docstring says."""
    from safetensors.torch import save_file

    linears = {name: module.orig_layer for name, module in model.named_modules() if hasattr(module, "orig_layer")}
    tensors = {name.replace(".orig_layer.", "."): value for name, value in model.state_dict().items()}
    for name, linear in linears.items():
        outer = linear.w_bf16_to_fp8_scale.float()
        weight = tensors.pop(f"{name}.weight").float()
        group = torch.arange(weight.shape[1]) // (job.group_size if job.group_size > 0 else weight.shape[1])
        level = torch.round(weight / linear.scale.float()[:, group])
        tensors[f"{name}.level"] = level.to(torch.int8)
        tensors[f"{name}.scale"] = _inner_scale(weight, level, linear.scale.float(), outer, group) * outer
        tensors[f"{name}.outer_scale"] = outer
        tensors[f"{name}.input_scale"] = linear.act_scale.float().reshape(())
    config = {"quant_method": "auto-round", "data_type": TWO_LEVEL, "bits": 4, "group_size": job.group_size, "sym": True}
    model.config.quantization_config = config | {"act_data_type": "fp8_sym", "act_bits": 8, "act_dynamic": False}
    if getattr(model.config, "tie_word_embeddings", False):
        tensors.pop("lm_head.weight", None)
    save_file({name: value.contiguous() for name, value in tensors.items()}, job.out / "model.safetensors", {"format": "pt"})
    model.config.save_pretrained(job.out)


def _inner_scale(weight: Any, level: Any, rounded: Any, outer: Any, group: Any) -> Any:
    """The BF16 scales in FP8 units that the tool multiplied by: it keeps only their product with `outer`, rounded to BF16."""
    zeros = torch.zeros_like(rounded)
    numerator = zeros.index_add(1, group, weight * level)
    denominator = zeros.index_add(1, group, level * level)
    scale = torch.where(denominator > 0, numerator / denominator.clamp(min=1), rounded)
    return (scale / outer).bfloat16().float()


if __name__ == "__main__":
    run("auto-round", "auto-round", list(RECIPES), quantize)
