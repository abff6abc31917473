"""Dense text decoders."""

from duotone.models.table import Adapter

_HEAD = ("lm_head", "output head: the last projection stays BF16, as every W4A8 runtime expects")

LLAMA = Adapter(
    model_types=("llama", "mistral", "qwen2", "qwen3"),
    blocks="model.layers",
    shared_inputs=(
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.o_proj",),
        ("mlp.gate_proj", "mlp.up_proj"),
        ("mlp.down_proj",),
    ),
    keep=(_HEAD,),
)

TEXT_ADAPTERS = (LLAMA,)
