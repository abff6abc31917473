# Shapes: N out_features, K in_features.
# pyright: reportUnknownMemberType=false
"""How fast a whole model writes, beside the same model in BF16 and with torch's INT4 linears.

All candidates take turns in one process, on the same prompt, through `model.generate` as a user calls it.
"""

import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from duotone.bench import provenance
from duotone.checkpoint.compressed_tensors import quantization_config, to_tensors
from duotone.checkpoint.hub import locate_model
from duotone.errors import DuotoneError
from duotone.models.skeleton import check_causal
from duotone.runtime.linear import QuantizedLinear
from duotone.runtime.load import load
from duotone.scheme import HOPPER, Scheme
from duotone.speed import measured_bandwidth, random_weight

#: What a turn takes, in seconds: until the first new token, and each one after it.
Turn = tuple[float, float]
#: TinyLlama's shape, 1.1 billion parameters; its weights here are random, which is all the same to time.
LLAMA_1B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 2048, "intermediate_size": 5632,
    "num_hidden_layers": 22, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 64, "vocab_size": 32000,
    "rms_norm_eps": 1e-5, "hidden_act": "silu", "max_position_embeddings": 2048, "tie_word_embeddings": False,
    "bos_token_id": 1, "eos_token_id": 2, "dtype": "bfloat16",
}  # fmt: skip


@dataclass(frozen=True)
class GenerateBench:
    """Which model, a checkpoint of ours or None for a random one, and what it is asked for."""

    model: str | None = None
    prompt_tokens: int = 128
    new_tokens: int = 32
    rounds: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.prompt_tokens, self.rounds) < 1 or self.new_tokens < 2:
            raise DuotoneError("bench generate: expected at least one round and prompt token, and two new tokens")


def generate_rows(bench: GenerateBench, others: dict[str, Callable[[], Turn]] | None = None) -> Iterator[dict[str, Any]]:
    """A row for each candidate once all rounds are over; `others` take their turns with them."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = locate_model(bench.model) if bench.model else random_checkpoint(Path(scratch), LLAMA_1B, bench.seed)
        models = {
            "duotone": _checked(load(folder, device="cpu")),
            "transformers BF16": dense_twin(folder),
            "torch int4pack (W4A16)": int4_twin(folder),
        }
    ours = models["duotone"]
    prompt = torch.randint(3, int(ours.config.vocab_size), (1, bench.prompt_tokens), generator=_generator(bench.seed))
    turns = {name: _turn_of(model, prompt, bench.new_tokens) for name, model in models.items()} | (others or {})
    taken: dict[str, list[Turn]] = {name: [] for name in turns}
    reading: list[float] = []
    for turn in turns.values():
        turn()  # the first one allocates
    for _ in range(bench.rounds):
        reading.append(measured_bandwidth())
        for name, turn in turns.items():
            taken[name].append(turn())
    sizes = {name: _nbytes(model) for name, model in models.items()}
    for name, both in taken.items():
        yield provenance(bench.seed) | {
            "model": Path(bench.model).name if bench.model else "random, 1.1 billion parameters",
            "runtime": name,
            "backend": _backend(ours) if name == "duotone" else None,
            "prompt_tokens": bench.prompt_tokens,
            "new_tokens": bench.new_tokens,
            "rounds": bench.rounds,
            "prefill_tokens_per_second": bench.prompt_tokens / statistics.median(prefill for prefill, _ in both),
            "decode_tokens_per_second": 1 / statistics.median(decode for _, decode in both),
            "weight_bytes": sizes.get(name),
            "read_gbytes_per_second": statistics.median(reading) / 1e9,
            "ours_times_as_fast": {
                "prefill": statistics.median(a[0] / b[0] for a, b in zip(both, taken["duotone"], strict=True)),
                "decode": statistics.median(a[1] / b[1] for a, b in zip(both, taken["duotone"], strict=True)),
            },
        }


def _checked(model: PreTrainedModel) -> PreTrainedModel:
    """A model that all candidates can run."""
    check_causal(model, "generation")
    if not any(isinstance(module, QuantizedLinear) for module in model.modules()):
        raise DuotoneError("bench generate: found no quantized linear in this model, expected a checkpoint of ours")
    if model.dtype != torch.bfloat16:
        raise DuotoneError(f"bench generate: found a model in {model.dtype}, expected bfloat16")
    return model


def random_checkpoint(folder: Path, config: dict[str, Any], seed: int) -> Path:
    """A quantized checkpoint of random weights for a Llama config, written layer by layer; its folder."""
    hidden, wide, heads = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * heads, config["num_key_value_heads"] * heads
    shapes = {
        "self_attn.q_proj": (queries, hidden), "self_attn.k_proj": (keys, hidden), "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries), "mlp.gate_proj": (wide, hidden), "mlp.up_proj": (wide, hidden),
        "mlp.down_proj": (hidden, wide),
    }  # fmt: skip
    scheme = Scheme(HOPPER, 128)
    generator = _generator(seed)
    weight_map: dict[str, str] = {}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        tensors: dict[str, Tensor] = {}
        for name, (rows, columns) in shapes.items():
            tensors |= to_tensors(f"{prefix}.{name}", random_weight(rows, columns, scheme.group_size, seed + layer))
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}.{name}.weight"] = torch.ones(hidden).bfloat16()
        _save(folder, f"model-{layer:05d}.safetensors", tensors, weight_map)
    table = lambda: (torch.randn(config["vocab_size"], hidden, generator=generator) * 0.02).bfloat16()  # noqa: E731
    rest = {"model.embed_tokens.weight": table(), "model.norm.weight": torch.ones(hidden).bfloat16()}
    if not config["tie_word_embeddings"]:
        rest["lm_head.weight"] = table()
    _save(folder, "model-rest.safetensors", rest, weight_map)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    whole = config | {"quantization_config": quantization_config(scheme, ["lm_head"])}
    (folder / "config.json").write_text(json.dumps(whole), encoding="utf-8")
    return folder


def dense_twin(folder: Path) -> PreTrainedModel:
    """The same model with BF16 linears, as transformers would run it: torch's own attention too."""

    def dense(layer: QuantizedLinear) -> nn.Module:
        linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        linear.weight = nn.Parameter(layer.dequantize().bfloat16(), requires_grad=False)
        linear.bias = layer.bias  # pyright: ignore[reportAttributeAccessIssue]
        return linear

    return _replaced(folder, dense)


def int4_twin(folder: Path) -> PreTrainedModel:
    """The same model with torch's INT4 linears, their codes random: W4A16, an arithmetic of its own."""
    return _replaced(folder, _Int4Linear)


class _Int4Linear(nn.Module):
    """torch's weight-only INT4 linear."""

    def __init__(self, layer: QuantizedLinear) -> None:
        super().__init__()
        assert isinstance(layer.scheme, Scheme)
        rows, columns, self.group_size = layer.out_features, layer.in_features, layer.scheme.group_size
        codes = torch.randint(0, 16, (rows, columns), dtype=torch.int32)
        self.weight = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
        self.scale = (torch.rand(columns // self.group_size, rows, 2) * 0.01).bfloat16()
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N]."""
        flat = x.reshape(-1, x.shape[-1])
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(flat, self.weight, self.group_size, self.scale)
        y = y.view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias


def _replaced(folder: Path, make: Callable[[QuantizedLinear], nn.Module]) -> PreTrainedModel:
    model = load(folder, device="cpu", shortcuts=False)
    for name, layer in [(n, m) for n, m in model.named_modules() if isinstance(m, QuantizedLinear)]:
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, make(layer))
    gc.collect()
    return model


class _Clock(StoppingCriteria):
    """Notes when each new token is there."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **_: Any) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        del scores
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool)


def _turn_of(model: PreTrainedModel, prompt: Tensor, new_tokens: int) -> Callable[[], Turn]:
    # Nothing ends a text early, and no step looks whether something does.
    assert model.generation_config is not None
    model.generation_config.eos_token_id = None

    def turn() -> Turn:
        clock = _Clock()
        begin = time.perf_counter()
        with torch.no_grad():
            model.generate(  # pyright: ignore[reportCallIssue]
                input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new_tokens, do_sample=False,
                pad_token_id=0, stopping_criteria=StoppingCriteriaList([clock]),
            )  # fmt: skip
        return clock.times[0] - begin, (clock.times[-1] - clock.times[0]) / (new_tokens - 1)

    return turn


def _backend(model: PreTrainedModel) -> str:
    return next(module.backend.describe(module.scheme) for module in model.modules() if isinstance(module, QuantizedLinear))


def _nbytes(model: PreTrainedModel) -> int:
    """Bytes of all weights in memory."""
    seen = {tensor.data_ptr(): tensor.nbytes for tensor in model.state_dict().values()}
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            seen |= {tensor.data_ptr(): tensor.nbytes for tensor in module.packed_tensors()}
        elif isinstance(module, _Int4Linear):
            seen |= {tensor.data_ptr(): tensor.nbytes for tensor in (module.weight, module.scale)}
    return sum(seen.values())


def _save(folder: Path, name: str, tensors: dict[str, Tensor], weight_map: dict[str, str]) -> None:
    save_file({key: value.contiguous() for key, value in tensors.items()}, folder / name, {"format": "pt"})
    weight_map |= dict.fromkeys(tensors, name)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
