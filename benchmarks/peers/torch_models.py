"""The models of the torch systems, with random weights."""

from __future__ import annotations

import torch
from cases import Case
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

IDS = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}


def build(case: Case):
    """A model in float32, without dropout."""
    torch.manual_seed(0)
    if case.family == "gpt2":
        off = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        return GPT2LMHeadModel(
            GPT2Config(
                vocab_size=case.vocabulary,
                n_positions=1024,
                n_embd=case.width,
                n_layer=case.layers,
                n_head=case.heads,
                n_inner=case.mlp_width,
                **off,
                **IDS,
            )
        )
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=case.vocabulary,
            hidden_size=case.width,
            num_hidden_layers=case.layers,
            num_attention_heads=case.heads,
            num_key_value_heads=case.kv_heads,
            intermediate_size=case.mlp_width,
            max_position_embeddings=1024,
            tie_word_embeddings=False,
            **IDS,
        )
    )
