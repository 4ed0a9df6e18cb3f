"""dpojax: python ours.py CASE_AS_JSON STEPS"""

from __future__ import annotations

import sys

import jax
import jax.numpy as jnp
import numpy as np
from cases import BETA, CLIP, LEARNING_RATE, WARM, Case, batches, read_case, report

from dpojax import sharding
from dpojax.data.packing import Costs, plan
from dpojax.data.rows import collate
from dpojax.data.tokenise import Example
from dpojax.launch.defaults import default_config
from dpojax.methods import preference
from dpojax.models import decoder
from dpojax.models.config import GPT2, LLAMA, DecoderConfig
from dpojax.training.forward import build_score, language_model
from dpojax.training.state import abstract_state, make_optimizer, make_schedule, new_state
from dpojax.training.step import build_step


def main(case: Case, steps: int) -> None:
    config, mesh = default_config(), sharding.make_mesh()
    with jax.set_mesh(mesh):
        model = decoder.build(
            _shape(case), compute_dtype=jnp.dtype(case.dtype), remat=config.model.remat
        )
        config.dpo.optimizer.clip_norm = CLIP
        optimizer = make_optimizer(config.dpo.optimizer)
        params = jax.jit(model.init)(jax.random.key(0))
        abstract = abstract_state(params, optimizer, mesh, decoder.SHARDING_RULES)
        made = _rows(case, WARM + steps)
        score = jax.jit(build_score(model, max_logits=config.max_logits))
        frozen = jax.tree.map(jnp.copy, params)
        scored = lambda rows: rows._replace(reference=score(frozen, rows).logprob)
        if case.reference == "cached":
            made = [jax.device_get(scored(sharding.put_rows(rows, mesh))) for rows in made]
            frozen = None
        state = new_state(params, optimizer, abstract, seed=0)
        options = preference.resolve("dpo", {"beta": BETA})
        hyper = preference.hyper(options | {"learning_rate": LEARNING_RATE})
        train = jax.jit(
            build_step(
                language_model(model, max_logits=config.max_logits),
                preference.objective("dpo", options),
                optimizer,
                make_schedule("constant", 0, 1),
            ),
            donate_argnums=0,
            out_shardings=(jax.tree.map(lambda x: x.sharding, abstract), None),
        )

        def step(index: int) -> None:
            nonlocal state
            rows = sharding.put_rows(made[index], mesh)
            rows = rows if frozen is None else scored(rows)
            state, found = train(state, rows, hyper)
            assert bool(found.finite)  # waits for the device

        shape = " x ".join(map(str, made[0].tokens.shape))
        report(step, steps, versions=f"jax {jax.__version__}", shape=shape)


def _shape(case: Case) -> DecoderConfig:
    family = {"gpt2": GPT2, "llama": LLAMA}[case.family]
    sizes = {"layers": case.layers, "width": case.width, "heads": case.heads}
    sizes |= {"kv_heads": case.kv_heads} if case.family == "llama" else {}
    sizes |= {"mlp_width": case.mlp_width, "vocab_size": case.vocabulary, "max_positions": 1024}
    return DecoderConfig(**family, **sizes)


def _rows(case: Case, count: int) -> list:
    """All batches in the one shape that is planned for them, as NumPy arrays."""
    array = lambda ids: np.array(ids, np.int32)
    made = [pair for batch in batches(case, count) for pair in batch]
    examples = [
        Example(
            f"pair {i}",
            array(p.prompt),
            (array(p.chosen), array(p.rejected)),
            (False,) * 2,
            None,
        )
        for i, p in enumerate(made)
    ]
    parts = [range(i, i + case.pairs) for i in range(0, len(made), case.pairs)]
    shape = plan(examples, parts, costs=Costs(attention=4 * case.width))
    return [collate(examples, part, shape) for part in parts]


if __name__ == "__main__":
    main(read_case(sys.argv[1]), int(sys.argv[2]))
