"""dpojax: python ours.py CASE_AS_JSON STEPS"""

from __future__ import annotations

import sys

import jax
import jax.numpy as jnp
import numpy as np
from cases import BETA, CLIP, WARM, Case, Pair, StepResult, batches, read_case, report

from dpojax import sharding
from dpojax.config.defaults import default_config
from dpojax.data.examples import Example
from dpojax.data.packing import plan
from dpojax.data.rows import Rows, collate
from dpojax.methods import preference
from dpojax.models import decoder, huggingface, kernels
from dpojax.training.costs import packing_costs
from dpojax.training.forward import build_score, language_model
from dpojax.training.memory import lean
from dpojax.training.reference import compute
from dpojax.training.state import abstract_state, make_optimizer, make_schedule, new_state
from dpojax.training.step import build_step
from dpojax.training.throughput import memory_bytes


def main(case: Case, steps: int) -> None:
    # One device, as the other systems have.
    config, mesh = default_config(), sharding.make_mesh(devices=jax.local_devices()[:1])
    config.preference.optimizer.clip_norm = CLIP
    with jax.set_mesh(mesh):
        shape, params, _ = huggingface.load(case.weights, mesh=mesh)
        dtype = jnp.dtype(case.dtype)
        kernel = kernels.choose("auto", shape, dtype, jax.local_devices()[0])
        model = decoder.build(shape, compute_dtype=dtype, remat=config.model.remat, kernel=kernel)
        pairs = [pair for batch in batches(case, WARM + steps) for pair in batch]
        examples = [_example(f"pair {i}", pair) for i, pair in enumerate(pairs)]
        parts = [range(i, i + case.pairs) for i in range(0, len(pairs), case.pairs)]
        costs = packing_costs(shape, params, mesh, remat=config.model.remat, dtype=case.dtype)
        planned = plan(examples, parts, costs=costs)

        def collated(part: range) -> Rows:
            return collate(examples, part, planned)

        frozen = jax.tree.map(jnp.copy, params)
        score = jax.jit(build_score(model, max_logits=config.max_logits))
        if case.reference == "cached":
            weights = frozen

            def logprob(rows: Rows) -> jax.Array:
                return score(weights, sharding.put_rows(rows, mesh)).logprob

            store = compute(logprob, examples, map(collated, parts))
            frozen = None

        train, state = _train(model, params, config, mesh, case.learning_rate)

        def step(index: int) -> StepResult:
            nonlocal state
            rows = collated(parts[index])
            scored = int((rows.response >= 0).sum())
            if case.reference == "cached":
                rows = sharding.put_rows(store.attach(rows), mesh)
            else:
                rows = sharding.put_rows(rows, mesh)
                rows = rows._replace(reference=score(frozen, rows).logprob)
            state, step_report = train(state, rows)
            assert bool(step_report.finite)  # waits for the device
            loss, norm = step_report.metrics["loss"], step_report.metrics["grad_norm"]
            return StepResult(float(loss.total / loss.weight), float(norm.total), scored)

        report(step, steps, _device_peak, shape=str(planned))


def _device_peak() -> int | None:
    """The most bytes in use on the device; None where JAX does not count them."""
    return memory_bytes().get("peak_device_bytes")


def _example(name: str, pair: Pair) -> Example:
    prompt, *responses = (np.array(ids, np.int32) for ids in pair)
    return Example(name, prompt, tuple(responses), (False, False), None)


def _train(model, params, config, mesh, learning_rate: float):
    """(state, rows) -> (state, report), compiled, and the first state."""
    optimizer = make_optimizer(config.preference.optimizer)
    abstract = abstract_state(params, optimizer, mesh, decoder.SHARDING_RULES)
    options = preference.resolve("dpo", {"beta": BETA})
    hyper = preference.hyper(options | {"learning_rate": learning_rate})
    step = jax.jit(
        build_step(
            language_model(model, max_logits=config.max_logits),
            preference.objective("dpo", options),
            optimizer,
            make_schedule("constant", 0, 1),
        ),
        donate_argnums=0,
        out_shardings=(jax.tree.map(lambda x: x.sharding, abstract), None),
    )
    state, train = new_state(params, optimizer, abstract, seed=0), lean(step)
    return lambda state, rows: train(state, rows, hyper), state


if __name__ == "__main__":
    main(read_case(sys.argv[1]), int(sys.argv[2]))
