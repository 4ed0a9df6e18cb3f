"""The weights that all systems start from, random: python weights.py CASE writes `case.weights`."""

from __future__ import annotations

import sys

import jax
from cases import Case, read_case

from dpojax.models import decoder, huggingface
from dpojax.models.config import GPT2, LLAMA, DecoderConfig, Rope

ROPE = Rope(theta=1e6)  # tunix 0.1.7 turns by this, whatever its ModelConfig.rope_theta says


def main(case: Case) -> None:
    config = _config(case)
    params = jax.jit(decoder.build(config).init)(jax.random.key(0))
    huggingface.save(case.weights, config, params)


def _config(case: Case) -> DecoderConfig:
    sizes = {"layers": case.layers, "width": case.width, "heads": case.heads}
    sizes |= {"mlp_width": case.mlp_width, "vocab_size": case.vocabulary, "max_positions": 1024}
    if case.family == "gpt2":
        return DecoderConfig(**GPT2, **sizes)
    return DecoderConfig(**LLAMA | {"rope": ROPE}, **sizes, kv_heads=case.kv_heads)


if __name__ == "__main__":
    main(read_case(sys.argv[1]))
