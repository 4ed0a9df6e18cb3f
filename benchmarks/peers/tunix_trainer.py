"""tunix's DPOTrainer on its Llama: python tunix_trainer.py CASE STEPS [--checkpointing]

Every batch is padded to the longest prompt and the longest response of all, since every new shape
would compile. In bfloat16 weights and moments are bfloat16 too: it computes in their dtype.
"""

from __future__ import annotations

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from cases import BETA, CLIP, Case, Clock, Pair, StepResult, batches, read_case
from flax import nnx
from tunix.models.llama3 import model as llama3
from tunix.models.llama3.params import create_model_from_safe_tensors
from tunix.sft.dpo import dpo_trainer

WARM = 2  # its second step compiles again


class Trainer(dpo_trainer.DPOTrainer):
    """tunix scores the reference in every step; here its log-probs may also come with the batch."""

    def _prepare_inputs(self, batch_and_reference):
        batch, reference = batch_and_reference
        made = super()._prepare_inputs(batch)
        return made if reference is None else dataclasses.replace(made, **reference)

    def references(self, batch) -> dict[str, jax.Array]:
        """The reference's log-probs of both responses, to pass along with `batch`."""
        made = super()._prepare_inputs(batch)
        names = "ref_chosen_logps", "ref_rejected_logps"
        return {name: getattr(made, name) for name in names}

    def forget_reference(self) -> None:
        self.ref_model, self._ref_model_exists = None, False


def main(case: Case, steps: int, checkpointing: bool) -> None:
    model = _model(case, checkpointing)
    adam = optax.adamw(case.learning_rate, weight_decay=0.0)
    trainer = Trainer(
        model=model,
        ref_model=_model(case, checkpointing),
        optimizer=optax.chain(optax.clip_by_global_norm(CLIP), adam),
        training_config=dpo_trainer.DPOTrainingConfig(
            eval_every_n_steps=10**9, max_steps=WARM + steps, beta=BETA, max_inflight_computations=1
        ),
    )
    all_batches = batches(case, WARM + steps)
    prompt = max(len(pair.prompt) for batch in all_batches for pair in batch)
    response = max(len(ids) for batch in all_batches for pair in batch for ids in pair[1:])

    def padded(batch: list[Pair]) -> dpo_trainer.TrainingInput:
        return _padded(batch, prompt, response)

    frozen = [None] * len(all_batches)
    if case.reference == "cached":
        frozen = [trainer.references(padded(batch)) for batch in all_batches]
        trainer.forget_reference()
    clock, scored = Clock(WARM), []

    def timed():
        for batch, reference in zip(all_batches, frozen, strict=True):
            clock.start()
            made = padded(batch)
            scored.append(int(made.chosen_mask.sum() + made.rejected_mask.sum()))
            yield made, reference
            jax.block_until_ready(jax.tree.leaves(nnx.state(model, nnx.Param)))
            clock.stop()

    trainer.train(timed())
    losses, norms = (
        trainer.metrics_logger.get_metric_history("", name, "train").tolist()
        for name in ("loss", "grad_norm")
    )
    clock.report([StepResult(*values) for values in zip(losses, norms, scored, strict=True)])


def _model(case: Case, checkpointing: bool) -> llama3.Llama3:
    kinds = llama3.RematConfig
    config = llama3.ModelConfig(
        num_layers=case.layers,
        vocab_size=case.vocabulary,
        embed_dim=case.width,
        hidden_dim=case.mlp_width,
        num_heads=case.heads,
        head_dim=case.width // case.heads,
        num_kv_heads=case.kv_heads,
        rope_theta=1_000_000,
        norm_eps=1e-5,
        weight_tying=False,
        remat_config=kinds.DECODER if checkpointing else kinds.NONE,
    )
    return create_model_from_safe_tensors(case.weights, config, dtype=jnp.dtype(case.dtype))


def _padded(batch: list[Pair], prompt: int, response: int) -> dpo_trainer.TrainingInput:
    """Prompts padded on the left, responses on the right."""

    def side(rows, length, left):
        ids = np.zeros((len(rows), length), np.int32)
        for row, tokens in enumerate(rows):
            ids[row, length - len(tokens) if left else 0 :][: len(tokens)] = tokens
        return ids, (ids > 0).astype(np.int32)

    fields = {}
    for name, length in (("prompt", prompt), ("chosen", response), ("rejected", response)):
        rows = [getattr(pair, name) for pair in batch]
        fields[f"{name}_ids"], fields[f"{name}_mask"] = side(rows, length, name == "prompt")
    return dpo_trainer.TrainingInput(**fields)


if __name__ == "__main__":
    main(read_case(sys.argv[1]), int(sys.argv[2]), "--checkpointing" in sys.argv)
