"""Text models: dense decoders, and encoders of the BERT kind under each head that a checkpoint may have."""

from dataclasses import replace

from transformers import AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification

from duotone.models.table import Adapter, NormedStream

_HEAD = ("lm_head", "output head: the last projection stays BF16, as every W4A8 runtime expects")
_POOLER_REASON = "pooler: reads one token of each sequence, and sentence embeddings do without it"
_ENCODER_HEAD_REASON = "output head: what follows the blocks stays BF16, as in decoders"

LLAMA = Adapter(
    model_types=("llama", "mistral", "qwen2", "qwen3"),
    blocks="model.layers",
    shared_inputs=(
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.o_proj",),
        ("mlp.gate_proj", "mlp.up_proj"),
        ("mlp.down_proj",),
    ),
    streams=(("self_attn.o_proj", "input_layernorm"), ("mlp.down_proj", "post_attention_layernorm")),
    keep=(_HEAD,),
    residual=NormedStream(
        norms=(
            ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
            ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
        ),
        values=("self_attn.v_proj", "self_attn.o_proj"),
        embedding="model.embed_tokens",
        final_norm="model.norm",
        head="lm_head",
    ),
)

BERT = Adapter(
    model_types=("bert",),
    blocks="encoder.layer",
    shared_inputs=(
        ("attention.self.query", "attention.self.key", "attention.self.value"),
        ("attention.output.dense",),
        ("intermediate.dense",),
        ("output.dense",),
    ),
    streams=(("attention.output.dense", "attention.self.query"), ("output.dense", "intermediate.dense")),
    keep=(("pooler.dense", _POOLER_REASON),),
    auto=AutoModel,
    architectures=("BertModel",),
)

BERT_MASKED_LM = replace(
    BERT,
    blocks="bert.encoder.layer",
    keep=(
        ("cls.predictions.transform.dense", _ENCODER_HEAD_REASON),
        ("cls.predictions.decoder", _ENCODER_HEAD_REASON),
    ),
    auto=AutoModelForMaskedLM,
    architectures=("BertForMaskedLM",),
)

BERT_CLASSIFIER = replace(
    BERT,
    blocks="bert.encoder.layer",
    keep=(("bert.pooler.dense", _ENCODER_HEAD_REASON), ("classifier", _ENCODER_HEAD_REASON)),
    auto=AutoModelForSequenceClassification,
    architectures=("BertForSequenceClassification",),
)

TEXT_ADAPTERS = (LLAMA, BERT, BERT_MASKED_LM, BERT_CLASSIFIER)
