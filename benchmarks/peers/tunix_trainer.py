"""tunix's DPOTrainer on its Llama: python tunix_trainer.py CASE STEPS

It has no cached reference; without a reference model it does the same arithmetic.
"""

from __future__ import annotations

import sys
from importlib.metadata import version

import jax
import jax.numpy as jnp
import numpy as np
import optax
from cases import BETA, CLIP, LEARNING_RATE, WARM, Case, Clock, batches, read_case
from flax import nnx
from tunix.models.llama3 import model as llama3
from tunix.sft.dpo import dpo_trainer


def main(case: Case, steps: int) -> None:
    model = _model(case)
    reference = _model(case) if case.reference == "live" else None
    config = dpo_trainer.DPOTrainingConfig(
        eval_every_n_steps=10**9, max_steps=WARM + steps, beta=BETA, max_inflight_computations=1
    )
    adam = optax.adamw(LEARNING_RATE, weight_decay=0.0)
    trainer = dpo_trainer.DPOTrainer(
        model=model,
        ref_model=reference,
        optimizer=optax.chain(optax.clip_by_global_norm(CLIP), adam),
        training_config=config,
    )
    made = batches(case, WARM + steps)
    # One shape for all batches, or it would compile in every step.
    prompt = max(len(pair.prompt) for batch in made for pair in batch)
    response = max(len(ids) for batch in made for pair in batch for ids in pair[1:])
    clock = Clock()

    def given():
        for batch in made:
            clock.start()
            yield _padded(batch, prompt, response)
            jax.block_until_ready(jax.tree.leaves(nnx.state(model, nnx.Param)))
            clock.stop()

    trainer.train(given())
    clock.report(versions=f"tunix {version('google-tunix')}, jax {jax.__version__}")


def _model(case: Case):
    config = llama3.ModelConfig(
        num_layers=case.layers,
        vocab_size=case.vocabulary,
        embed_dim=case.width,
        hidden_dim=case.mlp_width,
        num_heads=case.heads,
        head_dim=case.width // case.heads,
        num_kv_heads=case.kv_heads,
        rope_theta=10000,
        norm_eps=1e-5,
        weight_tying=False,
        remat_config=llama3.RematConfig.NONE,
    )
    model = llama3.Llama3(config, rngs=nnx.Rngs(0))
    if case.dtype == "bfloat16":  # it computes in the dtype of its weights
        low = lambda x: x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x
        nnx.update(model, jax.tree.map(low, nnx.state(model)))
    return model


def _padded(batch, prompt: int, response: int):
    """Prompts padded on the left, responses on the right."""

    def side(rows, length, left):
        ids = np.zeros((len(rows), length), np.int32)
        for row, own in enumerate(rows):
            ids[row, length - len(own) if left else 0 :][: len(own)] = own
        return ids, (ids > 0).astype(np.int32)

    fields = {}
    for name, length in (("prompt", prompt), ("chosen", response), ("rejected", response)):
        rows = [getattr(pair, name) for pair in batch]
        fields[f"{name}_ids"], fields[f"{name}_mask"] = side(rows, length, name == "prompt")
    return dpo_trainer.TrainingInput(**fields)


if __name__ == "__main__":
    main(read_case(sys.argv[1]), int(sys.argv[2]))
