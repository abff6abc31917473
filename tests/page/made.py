"""Facts that no run has found out: a model of as many blocks as one likes, with odd names and figures among them."""

import math
from typing import Any

from duotone.page.census import Census
from duotone.page.facts import Facts, KeptFacts, LinearFacts, Place, Sizes
from duotone.page.measured import Continuation, Measured

SHAPES = {
    "self_attn.q_proj": (4096, 4096), "self_attn.k_proj": (1024, 4096), "self_attn.v_proj": (1024, 4096),
    "self_attn.o_proj": (4096, 4096), "mlp.gate_proj": (14336, 4096), "mlp.up_proj": (14336, 4096),
    "mlp.down_proj": (4096, 14336),
}  # fmt: skip


def made_facts(blocks: int, **changes: Any) -> Facts:
    """A report of a model with so many blocks; changes: fields that are otherwise."""
    linears = tuple(_linear(block, path) for block in range(blocks) for path in SHAPES)
    codes = tuple(int(1e6 * math.exp(-((level / 3) ** 2))) for level in range(-8, 8))
    scales = tuple((2.0**octave * (1 + step / 8), 100 * (octave + 4) + step) for octave in range(-3, 6) for step in range(8))
    figures = {
        "perplexity": 3.2189, "bits_per_byte": 0.6, "tokens": 65408, "kl": 0.0123, "kl_stderr": 0.0004, "top1_agreement": 0.961,
        "reference_perplexity": 3.2025, "nll_difference": 0.0051, "nll_difference_stderr": 0.0009,
    }  # fmt: skip
    windows = tuple(0.0123 * (1 + 0.6 * math.sin(i)) for i in range(128))
    continuation = Continuation("Once upon", " a time there", (" was", " a cat."), (" lived", " a dog."), 3, 24, (0.41, 0.39))
    fields: dict[str, Any] = {
        "name": "Made-126B-W4AFP8", "base": "maker/Made-126B", "scheme": "hopper, groups of 128", "written_by": "duotone 0",
        "sizes": Sizes(2 * 10**9 * blocks, False, 5 * 10**8 * blocks, 16 * 10**6 * blocks, 2 * 10**9, 10**6, 4.125, 0.97),
        "linears": linears, "kept": (KeptFacts("lm_head", 128256, 4096, "BF16", 2 * 10**9, "output head"),),
        "census": Census(tuple(range(-8, 8)), codes, scales, {layer.layer: layer.code_bits for layer in linears}),
        "places": tuple(
            Place(runtime, "1.0", gpu, "w4a8" if gpu == "h100" else "refused", "CUTLASS" if gpu == "h100" else None,
                  (f"the device is {gpu}",), (), "w4a16" if gpu == "a100" else None)
            for runtime in ("vllm", "sglang") for gpu in ("h100", "a100", "cpu")
        ),
        "refusal": None, "settings": {"method": "dpq", "effort": "default", "group_size": 128, "seed": 0, "symmetric": True},
        "calibration": {"text": ["c4.txt"], "tokens": 262144, "windows": 128, "sha256": "0" * 64, "dtype": "bfloat16"},
        "producer": "duotone 0", "notes": ("a note",),
        "run": {
            "seconds": {"read": 60.0, "forward": 4000.0, "solve": 2500.0, "write": 0.0}, "peak_bytes": 9 * 10**9,
            "phase_bytes": {"read": 10**9, "forward": 9 * 10**9, "solve": 8 * 10**9}, "resumed_at": None,
            "machine": {"processor": "a processor", "compiled solver": True, "number of processes": 1},
            "versions": {"torch": "2"},
        },
        "measured": Measured(("held_out.txt",), figures, "1" * 64, 512, windows, (continuation,)),
        "recorded": False, "command": "duotone quantize maker/Made-126B out",
    }  # fmt: skip
    return Facts(**fields | changes)


def _linear(block: int, path: str) -> LinearFacts:
    rows, columns = SHAPES[path]
    error = 1e-4 * (2 + math.sin(block + len(path))) * (4 if path == "mlp.down_proj" else 1)
    name = f"model.layers.{block}.{path}"
    errors = 0.01 + error, error
    return LinearFacts(name, block, path, rows, columns, rows * columns // 2, 3.6, *errors, 262144, 0.01, 0, 1e4 + block)
