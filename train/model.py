"""The shape of the bundled model and the constants that training, evaluation and export share."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tokenizer import BOS_ID, EOS_ID, VOCABULARY

SEED = 0
LENGTH = 512  # tokens per training row and per evaluation window


def make_model() -> LlamaForCausalLM:
    """Return the freshly initialised model; all widths are multiples of 128."""
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=5,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
    )
    return LlamaForCausalLM(config)
