"""GPTQModel: 4-bit symmetric GPTQ with group-aware reordering (GAR), saved in GPTQ's own layout."""

import contextlib
import os
import tempfile

from job import Job, run


def quantize(job: Job) -> None:
    """The tool's own loader, defaults but for what the recipe names; windows go in as token ids, eight at a time."""
    if (os.cpu_count() or 1) < 3:  # its loader takes 2 workers of a pool that has (cores + 1) // 2, and raises when that is 1
        os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    from gptqmodel import GPTQModel, QuantizeConfig
    from gptqmodel.quantization.gptq import GPTQ

    job.watch(GPTQ, "add_batch", "hessian")
    job.watch(GPTQ, "quantize", "solve")
    source, out = str(job.model.resolve()), str(job.out.resolve())
    windows = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in job.load_tokens().tolist()]
    with tempfile.TemporaryDirectory() as scratch, contextlib.chdir(scratch):  # it leaves a folder `logs` where it runs
        config = QuantizeConfig(bits=4, group_size=job.group_size, sym=True, desc_act=False, act_group_aware=True)
        with job.refusable():
            model = GPTQModel.load(source, config, device="cpu")
        with job.timed():
            model.quantize(windows, batch_size=8)
        with job.refusable():
            model.save(out)


if __name__ == "__main__":
    run("gptqmodel", "GPTQModel", ("gptq-gar",), quantize)
