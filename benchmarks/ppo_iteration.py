"""Seconds of a PPO iteration by stage, on the embedded task's model with random weights.

    python benchmarks/ppo_iteration.py
    python benchmarks/ppo_iteration.py --batch 256 --tokens 64 --epochs 4 --json ppo.json

Stages: draw (responses, to the host), score (the exact reward, on the host), prepare (log-probs,
reference, values, advantages), optimise (all epochs of minibatches). Responses of random weights
rarely stop, so they are as long as they may be; medians over iterations, after one that compiles.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpojax import sharding
from dpojax.config.defaults import default_config
from dpojax.data import reviews
from dpojax.methods import ppo
from dpojax.models import decoder
from dpojax.models.config import LLAMA, DecoderConfig
from dpojax.sampling import build_sampler, pad
from dpojax.training.state import make_optimizer

STAGES = ("draw", "score", "prepare", "optimise")


def main(argv: list[str] | None = None) -> None:
    args = _arguments(argv)
    result = measure(args.batch, args.tokens, args.epochs, args.minibatches, args.iterations)
    print(f"{result['device']}, jax {jax.__version__}: {args.batch} responses of {args.tokens}")
    for stage in STAGES:
        print(f"{stage:>10} {result[stage]:8.3f} s   first {result['first'][stage]:8.3f} s")
    total = sum(result[stage] for stage in STAGES)
    print(f"{'iteration':>10} {total:8.3f} s   {args.batch / total:,.1f} responses/s")
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--batch", type=int, default=128, help="prompts, one response each")
    add("--tokens", type=int, default=48, help="of a response, at most")
    add("--epochs", type=int, default=2)
    add("--minibatches", type=int, default=4)
    add("--iterations", type=int, default=5, help="timed ones")
    add("--json", type=pathlib.Path, metavar="OUT", help="also write the result here")
    return parser.parse_args(argv)


def measure(
    batch: int, tokens: int, epochs: int, minibatches: int, iterations: int
) -> dict[str, Any]:
    """Median seconds of each stage, and under `first` those of the iteration that compiles."""
    tokenizer = reviews.tokenizer()
    shape = {k: v for k, v in default_config().model.items() if k in DecoderConfig.__annotations__}
    config = DecoderConfig(**LLAMA, **shape, vocab_size=len(tokenizer))
    model = decoder.build(config)
    value = decoder.build(dataclasses.replace(config, scalar_head=True))
    settings = ppo.PPO(epochs=epochs, minibatches=minibatches)
    optimizer = make_optimizer(default_config().preference.optimizer)
    mesh = sharding.make_mesh(devices=jax.local_devices()[:1])
    reference = jax.jit(model.init)(jax.random.key(0))
    params = jax.tree.map(jnp.copy, reference), ppo.with_value_head(config, reference)[1]
    state = ppo.new_ppo_state(
        *params, optimizer, mesh, decoder.SHARDING_RULES, seed=0, kl_coefficient=0.05
    )
    sampler = build_sampler(model, max_new_tokens=tokens, stop=(tokenizer.eos_token_id,))
    prepare = jax.jit(ppo.build_experience(model, value, settings))
    optimise = jax.jit(ppo.build_optimise(model, value, settings, optimizer), donate_argnums=0)
    hyper = ppo.hyper(learning_rate=1e-4, value_learning_rate=1e-4)
    texts = reviews.prompts("train", batch, seed=0)
    prompts = pad([np.asarray(x) for x in tokenizer(texts)["input_ids"]], range(batch), batch)
    timed: list[dict[str, float]] = []
    for _ in range(iterations + 1):
        clock = [time.perf_counter()]
        samples = jax.device_get(ppo.draw(sampler, state, prompts))
        clock.append(time.perf_counter())
        drawn = [tokenizer.decode(tokens[0]) for tokens in samples.tokens]
        scores = np.float32(reviews.reward([f"{x} {y}" for x, y in zip(texts, drawn)]))
        clock.append(time.perf_counter())
        responses = ppo.pack(prompts, samples, multiple=minibatches)
        experience = jax.block_until_ready(prepare(state, reference, responses, scores, hyper)[0])
        clock.append(time.perf_counter())
        state = jax.block_until_ready(optimise(state, experience, hyper)[0])
        clock.append(time.perf_counter())
        timed.append(dict(zip(STAGES, np.diff(clock).tolist())))
    median = {stage: statistics.median(t[stage] for t in timed[1:]) for stage in STAGES}
    return median | {"first": timed[0], "device": jax.local_devices()[0].device_kind}


if __name__ == "__main__":
    main()
